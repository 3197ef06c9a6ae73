"""Scores on held-out rows, checkpoints, warm-up, dropout and reports of a training; and a stop with Ctrl-C."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.runtime import TrainResult, train_lora
from onelayer.runtime.training.trainer_args import REPORTERS, reporter_fault
from onelayer.runtime.training.trainers import LoraTrainer

Train = Callable[..., TrainResult]
WRITER = """
from pathlib import Path

class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir) / "events"
    def add_scalar(self, name, value, step):
        with open(self.file, "a") as file:
            print(name, value, step, file=file)
    def add_text(self, *given): ...
    def flush(self): ...
    def close(self): ...
"""


def token_loss(directory: Path, texts: list[str]) -> float:
    """The mean over all labeled tokens, as `onelayer evaluate` defines it; texts as training ends them."""
    import onelayer.runtime.modules.transformers_plugin  # noqa: F401

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    losses = []
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            losses.append(cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"))
    return float(torch.cat(losses).mean())


def test_held_out_rows_are_scored_by_token_and_change_nothing(train: Train, place: Path, tmp_path: Path) -> None:
    rows = [{"text": "rome"}, {"text": "jumps over the lazy dog what is the sum of two"}, {"text": "it is five"}]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"dropout": 0.3, "activations": "sublayer", "max_steps": 3, "learning_rate": 1e-12}
    plain = train("plain", **settings)
    scored = train("scored", eval_data=tmp_path / "dev.jsonl", eval_steps=2, **settings)
    assert [score.step for score in scored.held_out] == [2, 3]
    wanted = token_loss(place / "half", [row["text"] for row in rows])
    assert [score.loss for score in scored.held_out] == pytest.approx([wanted, wanted], rel=1e-5)
    assert plain.held_out == ()
    assert adapter_digest(tmp_path / "plain") == adapter_digest(tmp_path / "scored")
    saved = json.loads((tmp_path / "scored" / "onelayer.json").read_text())
    assert saved["training"]["held_out"][0]["step"] == 2
    again = train("at-the-end", eval_data=tmp_path / "dev.jsonl", **settings)
    assert [score.step for score in again.held_out] == [3]


def test_steps_to_score_need_data(train: Train) -> None:
    with pytest.raises(InputError, match="--eval-steps 2: there is nothing to score; give --eval-data too"):
        train(eval_steps=2)


def test_warm_up_and_dropout_reach_the_trainer(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    dropouts: set[float] = set()

    def step(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        rates.append(self.lr_scheduler.get_last_lr()[0])
        dropouts.update(module.p for module in self.model.modules() if isinstance(module, torch.nn.Dropout))
        return real(self, *arguments, **keywords)

    real = LoraTrainer.training_step
    monkeypatch.setattr(LoraTrainer, "training_step", step)
    train(warmup=2, dropout=0.25, learning_rate=1e-3)
    assert rates == [0.0, 5e-4]
    assert 0.25 in dropouts
    rates.clear()
    train("share", warmup=0.5, max_steps=4, learning_rate=1e-3)
    assert rates[:3] == [0.0, 5e-4, 1e-3]


def test_ctrl_c_saves_the_step_and_the_run_goes_on_from_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "lora_rank": 4, "dropout": 0.3}
    train_lora(place / "half", place / "text.jsonl", tmp_path / "calm", **settings)
    real, steps = LoraTrainer.training_step, []

    def interrupted(self: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(LoraTrainer, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)  # a shell lets programs in the background ignore it
    with pytest.raises(KeyboardInterrupt):
        train_lora(place / "half", place / "text.jsonl", tmp_path / "out", **settings)
    assert "stopped after step 2 of 4; checkpoint-2 is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    train_lora(place / "half", place / "text.jsonl", tmp_path / "out", **settings, resume=True)
    assert steps == [0, 1, 2, 3]
    assert adapter_digest(tmp_path / "out") == adapter_digest(tmp_path / "calm")


def test_the_tools_and_their_packages_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert REPORTERS.keys() == INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "swanlab"}, "--report-to swanlab: needs a package that is not installed; pip install swanlab"),
        ({"args": {"report_to": ["none", "swanlab"]}}, "args.report_to: swanlab: needs a package"),
        ({"report_to": ["tensorbord"]}, "--report-to tensorbord: unknown tool, nearest is `tensorboard`"),
    ],
)
def test_a_tool_that_cannot_report_is_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=message):
        train_lora(tmp_path / "model", tmp_path / "absent.jsonl", tmp_path / "adapter", **settings)


def test_reports_end_in_the_output(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorboardX.py").write_text(WRITER)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert reporter_fault("tensorboard") is None
    train(report_to="tensorboard")
    (events,) = (tmp_path / "adapter" / "runs").rglob("events")
    assert "train/loss" in events.read_text()
    assert not list(tmp_path.glob(".*"))


def test_choosing_a_rank_forms_no_full_logits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[int] = []
    real = LoraTrainer._plain_loss

    def watched(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, args, logits: formed.append(logits.numel()))
        loss = real(self, model, inputs)
        hook.remove()
        return loss

    monkeypatch.setattr(LoraTrainer, "_plain_loss", watched)
    result = train(max_steps=1, activations="layer", activation_rank="auto")
    assert (result.steps, formed) == (1, [])
