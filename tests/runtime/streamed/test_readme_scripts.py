"""The scripts of the pages: an ordinary one of TRL, in which one line says that the model streams."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from datasets import Dataset  # type: ignore[import-untyped]
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from helpers.places import ROOT
from helpers.tiny_models import save_tiny
from helpers.training_rows import TEXTS
from onelayer.runtime import streamed_for_training

LINE = re.compile(r"^model = streamed_for_training\((.+?)\)  # instead of (\S+)$", re.M)
QUICK: dict[str, Any] = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}


def scripts() -> list[str]:
    """List the blocks of both pages that have the line."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "runtime/README.md")]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)]
    return [block for block in blocks if LINE.search(block)]


def loss_of(script: str) -> float:
    names: dict[str, Any] = {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "LoraConfig": partial(peft.LoraConfig, task_type="CAUSAL_LM"),
        "SFTConfig": partial(SFTConfig, output_dir="out", **QUICK),
        "SFTTrainer": SFTTrainer,
        "rows": Dataset.from_list([{"text": text} for text in TEXTS]),
        "streamed_for_training": streamed_for_training,
    }
    exec(compile(script, "README.md", "exec"), names)
    return float(names["trainer"].train().training_loss)


@pytest.mark.filterwarnings("ignore")  # of the stock trainer, about tiny models and a missing GPU
def test_the_script_of_a_page_gives_the_loss_that_its_original_line_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", Path("llama-8b"))
    found = scripts()
    assert len(found) == 2
    for script in found:
        plain = LINE.sub(r"model = \2(\1)", script)
        assert len(set(script.splitlines()) - set(plain.splitlines())) == 1
        assert loss_of(script) == pytest.approx(loss_of(plain), rel=1e-6)
