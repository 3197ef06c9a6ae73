"""Anchored training: what it equals, when it renews, and that a run that was killed ends like one that was not."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import reference_emulators
from helpers.classifiers import FAMILIES, save_classifier, write_labeled
from helpers.reference_emulators import write_emulator
from helpers.tiny_models import save_tiny, tiny_tokenizer
from helpers.training_rows import ROWS
from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.runtime import TrainResult, train_lora
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.anchors.settings import ANCHOR_EVERY
from onelayer.runtime.training.trainers import LoraTrainer

Train = Callable[..., TrainResult]


@pytest.fixture
def anchored(train: Train, place: Path) -> Train:
    """`train_lora` on the half-size emulator, anchored."""

    def run(name: str = "adapter", **settings: Any) -> TrainResult:
        return train(name, **{"model": place / "original", "anchor_every": 2, "anchor_bits": 32, **settings})

    return run


class KilledError(Exception):
    """Stands for the power going off."""


SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "accumulated": {"gradient_accumulation": 2, "lora": {"lora_dropout": 0.3}},
    "packed": {"args": {"packing": True}, "max_length": 24},
    "layer": {"activations": "layer", "activation_rank": 0.5},
}


@pytest.mark.parametrize("name", ["accumulated", "packed", "layer"])
def test_the_first_loss_is_that_of_the_original(anchored: Train, train: Train, name: str) -> None:
    settings = {"batch_size": 3, **SETTINGS[name], "max_steps": 1, "lora": {}}
    losses = [train(emulator, emulator=emulator, **settings).train_loss for emulator in ("original", "half")]
    assert anchored(**settings).train_loss == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_and_their_heads_are_anchored(family: str, tmp_path: Path) -> None:
    model = save_classifier(family, tmp_path / "original")
    write_emulator(model, tmp_path / "original", tmp_path / "half", ratio=0.5, skip=("classifier", "score"))
    data = write_labeled(tmp_path / "labeled.jsonl")
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4}
    direct = train_lora(tmp_path / "original", data, tmp_path / "direct", **settings)
    anchor: dict[str, Any] = {"model": tmp_path / "original", "anchor_every": 1, "anchor_bits": 32}
    result = train_lora(tmp_path / "half", data, tmp_path / "anchored", **settings, **anchor)
    assert result.losses[0][1] == pytest.approx(direct.losses[0][1], abs=1e-5)
    assert result.anchors is not None
    assert result.anchors.renewals == 3
    assert result.losses[2][1] < result.losses[0][1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "padded"),
        ("llama", "layer"),
        ("classifier", "padded"),
        ("t5", "accumulated"),
        ("mixtral", "accumulated"),
    ],
)
def test_an_emulator_equal_to_the_original_gives_direct_trainings_bytes(
    whole_of: Callable[[str], Path], tmp_path: Path, kind: str, name: str
) -> None:
    whole = whole_of(kind)
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 3, "lora_rank": 4, **SETTINGS[name]}
    anchor: dict[str, Any] = {"model": whole / "original", "anchor_every": 1}
    train_lora(whole / "original", whole / "data.jsonl", tmp_path / "direct", **settings)
    result = train_lora(whole / "emulator", whole / "data.jsonl", tmp_path / "anchored", **settings, **anchor)
    weights = [(tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("direct", "anchored")]
    assert weights[0] == weights[1]
    assert result.anchors is not None
    assert result.anchors.renewals == 3


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By kind of model: an original, an emulator whose factors are its weights and identities, and data."""

    def make(kind: str) -> Path:
        root: Path = tmp_path_factory.mktemp(kind)
        is_classifier = kind == "classifier"
        model = save_classifier("bert", root / "original") if is_classifier else save_tiny(kind, root / "original")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(reference_emulators, "rank_for", lambda out_features, in_features, ratio: in_features)
            patched.setattr(reference_emulators, "svd_factors", lambda weight, rank: (weight, torch.eye(rank)))
            write_emulator(model, root / "original", root / "emulator", skip=("classifier",))
        if is_classifier:
            write_labeled(root / "data.jsonl")
        else:
            tiny_tokenizer(root / "original")
            rows = PROMPTED if kind == "t5" else ROWS["text"]
            (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return root

    return cache(make)


PROMPTED = [
    {"prompt": "what is the sum of two and three ?", "completion": " five"},
    {"prompt": "a", "completion": " b c"},
] * 3


def test_encoder_decoders_are_trained_and_anchored(tmp_path: Path) -> None:
    model = save_tiny("t5", tmp_path / "original")
    tiny_tokenizer(tmp_path / "original")
    write_emulator(model, tmp_path / "original", tmp_path / "half", ratio=0.5)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTED))
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "lora_rank": 4}
    anchor: dict[str, Any] = {"model": tmp_path / "original", "anchor_every": 2, "anchor_bits": 32}
    losses = {
        name: train_lora(tmp_path / kind, tmp_path / "data.jsonl", tmp_path / name, **settings, **more).losses
        for name, kind, more in (("direct", "original", {}), ("plain", "half", {}), ("anchored", "half", anchor))
    }
    assert losses["anchored"][0][1] == pytest.approx(losses["direct"][0][1], abs=1e-5)
    assert abs(losses["plain"][0][1] - losses["direct"][0][1]) > 1e-3
    assert losses["anchored"][2][1] < losses["anchored"][0][1]
    scored = evaluate_model(tmp_path / "original", tmp_path / "data.jsonl", adapters=[tmp_path / "direct"]).results
    assert scored[1].loss < scored[0].loss


def test_renewals_come_every_k_steps_and_where_an_epoch_begins(
    anchored: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew, sizes = Anchors.renew, []

    def counted(self: Anchors, batches: Any, bar: Any = None) -> None:
        sizes.append(len(batches))
        renew(self, batches, bar)

    monkeypatch.setattr(Anchors, "renew", counted)
    # Six examples make six batches, so three steps of two: two steps, one; and a step that is the last of all.
    result = anchored(batch_size=1, gradient_accumulation=2, max_steps=4)
    assert sizes == [4, 2, 2]
    assert result.anchors is not None
    assert result.anchors.renewals == 3


def test_rows_come_in_the_order_of_a_training_without_anchors(
    anchored: Train, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says what broke if transformers draws or trains batches in another way."""
    step, seen = LoraTrainer.training_step, list[Any]()

    def noted(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", noted)
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 2, "epochs": 2}
    train("plain", max_steps=None, **settings)
    plain, seen = seen, []
    anchored(max_steps=None, **settings)
    assert len(plain) == 6
    assert seen == plain


@pytest.mark.parametrize("name", ["accumulated", "packed"])
def test_resuming_equals_not_stopping(
    anchored: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings: dict[str, Any] = {"max_steps": 7, "batch_size": 1, **SETTINGS[name], "anchor_bits": 2}
    settings["args"] = {**settings.get("args", {}), "save_steps": 3}
    whole = anchored("whole", **settings)
    step = LoraTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise KilledError
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", dying)
    with pytest.raises(KilledError):
        anchored("parts", **settings)
    monkeypatch.setattr(LoraTrainer, "training_step", step)
    with pytest.raises(InputError, match="begun with other anchor"):
        anchored("parts", **{**settings, "anchor_every": 3}, resume=True)
    saved = [int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / ".parts.training").glob("checkpoint-*")]
    parts = anchored("parts", **settings, resume=True)
    assert saved == [3]
    assert parts.train_loss == whole.train_loss
    assert adapter_digest(tmp_path / "parts") == adapter_digest(tmp_path / "whole")


def test_one_bar_shows_renewals_and_steps_with_what_is_left(
    anchored: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onelayer.compiler.machine.console.LINE_SECONDS", -1.0)
    anchored(max_steps=3, args={"logging_steps": 1})
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("onelayer: note:")]
    units = [f"anchoring, model.{name}, peak" for name in ("layers.0", "layers.1")]
    shown = [(0, *units), (1, "loss"), (2, "loss", *units), (3, "loss")]
    wanted = [(step, text) for step, *texts in shown for text in texts]
    assert len(lines) == len(wanted)
    for line, (step, text) in zip(lines, wanted, strict=True):
        assert line.startswith(f"onelayer: train: {step} of 3 steps, {text} ")
        assert ("about" if step else "an unknown time") in line
        assert line.endswith(" left")


def test_an_emulator_whose_original_is_named_is_anchored(anchored: Train, capsys: pytest.CaptureFixture[str]) -> None:
    result = anchored(anchor_every=None, max_steps=1)
    assert result.anchors is not None
    assert result.anchors.every == ANCHOR_EVERY == 10
    assert "anchors are renewed every 10 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "--anchor-every 2: needs the original; give --model"),
        ({"anchor_every": None, "emulator": "original"}, "nothing reads it, since .*original is no emulator"),
        ({"emulator": "original"}, "is no emulator, so nothing can be anchored"),
        ({"model": "half"}, "give the original it was compiled from"),
        ({"lora": {"bias": "all"}}, "lora.bias: biases that are trained cannot be anchored"),
        ({"anchor_bits": 3}, "anchor_bits: must be 1, 2, 4 or 32"),
        ({"anchor_every": 0}, "anchor_every"),
    ],
)
def test_refusals(anchored: Train, place: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    if isinstance(settings.get("model"), str):
        settings["model"] = place / settings["model"]
    with pytest.raises(InputError, match=message):
        anchored(**settings)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(anchored: Train, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "original", tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(InputError, match="its tokenizer has other tokens"):
        anchored(model=tmp_path / "other")
