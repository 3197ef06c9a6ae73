"""The page of complete Python examples: every block runs, in the order of the page."""

import json
import re
from pathlib import Path

import pytest

from helpers.places import ROOT
from helpers.tiny_models import save_tiny

BLOCKS = re.findall(r"^## (.+?)$|^```python\n(.*?)^```$", (ROOT / "runtime/EXAMPLES.md").read_text(), re.M | re.S)
SHORTER = {"max_steps=500": "max_steps=1", "steps=10": "steps=1", "keep_bytes=0.25": "keep_bytes=0.4"}


def shortened(code: str) -> str:
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    return code


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # the stock Trainer, without a GPU
# Ten passes with real weights: compile, training (three times), correction, exact steps, merge, scores, generation.
def test_every_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", "llama-8b")
    Path("mix.jsonl").write_text('{"text": "the quick brown fox jumps"}\n{"text": "what is the sum"}\n')
    row = json.dumps({"prompt": "one plus two is", "completion": " three"})
    for part in ("train", "dev", "test"):
        Path(f"sql.{part}.jsonl").write_text(f"{row}\n" * 2)
    Path("support.csv").write_text("question,reply\nname a city,rome\n")
    title, ran = "", 0
    for heading, code in BLOCKS:
        title = heading or title
        if code:
            exec(compile(shortened(code), f"EXAMPLES.md: {title}", "exec"), {})
            ran += 1
    assert ran >= 7
    assert Path("own-adapter/adapter_config.json").is_file()
    printed = capsys.readouterr().out
    assert "the original" in printed
    assert "0 rows were longer than 256 tokens" in printed
