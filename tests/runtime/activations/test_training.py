"""Compressed activations in `train_lora` and in manifests: training, resuming, reports, and the measured rank."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.reference_emulators import emulator_and_texts
from helpers.resident_gradients import with_lora
from onelayer.compiler.adapters.reader import adapter_digest
from onelayer.compiler.errors import InputError
from onelayer.runtime import TrainResult, compress_activations, load_emulator, train_lora
from onelayer.runtime.activations import probe
from onelayer.runtime.activations.probe import choose_rank, cosine, gradient_report
from onelayer.runtime.manifest.manifest import load_manifest
from onelayer.runtime.pipeline.steps import steps_of
from onelayer.runtime.training.trainers import LoraTrainer

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "what is the sum", "of two and three", "it is five", "rome"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator_and_texts(tmp_path_factory.mktemp("activations"), TEXTS)


def train(place: Path, output: Path, **settings: Any) -> TrainResult:
    quick: dict[str, Any] = {"max_steps": 3, "batch_size": 3, "lora_rank": 4, "learning_rate": 1e-2, **settings}
    return train_lora(place / "emulator", place / "text.jsonl", output, **quick)


@pytest.mark.parametrize("where", ["layer", "sublayer"])
def test_full_rank_trains_as_without(place: Path, tmp_path: Path, where: str) -> None:
    settings: dict[str, Any] = {"lora": {"lora_dropout": 0.3}, "gradient_accumulation": 2}
    plain = train(place, tmp_path / "plain", **settings)
    full = train(place, tmp_path / "full", activations=where, activation_rank=32, **settings)
    assert full.train_loss == pytest.approx(plain.train_loss, abs=1e-5)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "full"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=0)


def test_saved_bytes_fall_from_plain_to_layer_to_sub_layers_of_low_rank(place: Path, tmp_path: Path) -> None:
    once: dict[str, Any] = {"max_steps": 1, "batch_size": 6}
    plain = train(place, tmp_path / "plain", **once).saved_activation_bytes
    theirs = train(place, tmp_path / "theirs", args={"activation_checkpointing": True}, **once).saved_activation_bytes
    layer = train(place, tmp_path / "layer", activations="layer", activation_rank=32, **once)
    low = train(place, tmp_path / "low", activations="layer", activation_rank=2, **once)
    sub = train(place, tmp_path / "sub", activations="sublayer", activation_rank=2, **once)
    assert layer.activations is not None
    assert layer.activations.gradient_cosine is None
    # Torch keeps the inputs of both layers exactly, as compression does at full rank; only the latter counts keyword
    # arguments.
    inputs = layer.activations.saved_bytes["layer inputs"]
    assert layer.saved_activation_bytes - layer.activations.saved_bytes["shared inputs"] == theirs
    assert inputs < theirs < plain / 2
    assert low.saved_activation_bytes < sub.saved_activation_bytes < theirs


def test_an_interrupted_run_resumes_with_the_measured_rank(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "lora": {"lora_dropout": 0.3},
        "args": {"save_steps": 1},
        "activations": "sublayer",
        "activation_rank": "auto",
    }
    monkeypatch.setattr(probe.choose_rank, "__defaults__", (0.8,))
    whole = train(place, tmp_path / "whole", **settings)
    step = LoraTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(LoraTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(place, tmp_path / "parts", **settings)
    with pytest.raises(InputError, match="begun with other activations"):
        train(place, tmp_path / "parts", **{**settings, "activations": "layer"}, resume=True)
    parts = train(place, tmp_path / "parts", **settings, resume=True)
    assert parts.train_loss == whole.train_loss
    assert adapter_digest(tmp_path / "parts") == adapter_digest(tmp_path / "whole")
    assert whole.activations is not None
    assert whole.activations.rank in probe.AUTO_SHARES


def test_the_report_compares_with_the_exact_gradient(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"activations": "sublayer", "activation_rank": 8}
    plain = train(place, tmp_path / "plain", **settings)
    result = train(place, tmp_path / "reported", activation_report=True, **settings)
    assert adapter_digest(tmp_path / "plain") == adapter_digest(tmp_path / "reported")
    assert result.train_loss == plain.train_loss
    report = result.activations
    assert report is not None
    assert (report.where, report.rank) == ("sublayer", 8)
    assert report.gradient_cosine is not None
    assert 0.2 < report.gradient_cosine < 0.999
    assert len(report.layers) == 4
    assert all(layer.where == "sublayer" and len(layer.errors) == 1 for layer in report.layers)
    record = json.loads((tmp_path / "reported" / "onelayer.json").read_text())
    assert record["activations"] == {"where": "sublayer", "rank": 8}
    assert record["training"]["activations"] == report.model_dump(mode="json")
    exact = train(
        place, tmp_path / "exact", activations="layer", activation_rank=32, activation_report=True
    ).activations
    assert exact is not None
    assert exact.gradient_cosine == pytest.approx(1)


def test_the_rank_is_the_smallest_that_keeps_the_gradient(place: Path) -> None:
    model = with_lora(load_emulator(place / "emulator"))
    ids = torch.arange(96).reshape(2, 48) % 20 + 3
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    compression = compress_activations(model)

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    cosines = {}
    for share in probe.AUTO_SHARES:
        compression.rank = share
        cosines[share] = gradient_report(compression, parameters, loss).gradient_cosine or 0.0
    threshold = sorted(cosines.values())[2]
    state = torch.get_rng_state()
    chosen = choose_rank(compression, parameters, loss, threshold)
    assert torch.equal(torch.get_rng_state(), state)
    assert chosen == compression.rank == next(share for share, found in cosines.items() if found >= threshold)
    assert choose_rank(compression, parameters, loss, 1.1) is None
    assert compression.rank is None
    zeros = [torch.zeros(2)]
    assert (cosine(zeros, zeros), cosine(zeros, [torch.ones(2)])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "sub"}, "activations: "),
        ({"activations": "layer", "activation_rank": 0}, "activation_rank"),
        ({"activations": "layer", "activation_rank": 1.0}, "activation_rank"),
        ({"activations": "layer", "activation_rank": "most"}, "activation_rank"),
        ({"activation_report": True}, "nothing is compressed"),
        ({"activations": "layer", "args": {"gradient_checkpointing": True}}, "recomputes layers already"),
    ],
)
def test_refusals(place: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(place, tmp_path / "adapter", **settings)
    assert not list(tmp_path.iterdir())


def test_a_manifest_sets_where_and_rank(place: Path, tmp_path: Path) -> None:
    def fields(train_section: str, task_section: str = "") -> dict[str, Any]:
        path = tmp_path / "m.yaml"
        text = f"""
            version: 1
            model: {{path: {place / "original"}}}
            emulator: {{calibration: {{data: {place / "text.jsonl"}}}}}
            train: {{max_length: 64{train_section}}}
            tasks: {{a: {{train: {place / "text.jsonl"}{task_section}}}}}
        """
        path.write_text(textwrap.dedent(text))
        steps = {step.name: step for step in steps_of(load_manifest(path), ["a"])}
        return dict(steps["a.train"].fields)

    plain = fields("")
    assert "activations" not in plain
    assert fields(", activations: {rank: 64}") == plain
    compressed = fields(", activations: {rank: 128, where: sublayer}")
    assert compressed == {**plain, "activations": {"where": "sublayer", "rank": 128}}
    changed = fields(", activations: {rank: 128, where: sublayer}", ", activations: {rank: auto}")
    assert changed["activations"] == {"where": "sublayer", "rank": "auto"}
    with pytest.raises(InputError, match=r"train\.activations\.where"):
        fields(", activations: {where: everywhere}")
