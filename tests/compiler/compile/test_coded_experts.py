"""Experts of a coded emulator: stacks of codes, which stock transformers, PEFT and Trainer load, train and save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.hashes import hashes
from helpers.mixtures import WIDE_MIXTURES, compiled, error_of, logits, save_mixture, weight_of, what_experts_read
from helpers.resident_gradients import batch_for, distance, gradients, with_lora
from onelayer.compiler.codes.forms import code_row_bytes
from onelayer.compiler.compile import job
from onelayer.compiler.data.tokens import load_tokenizer
from onelayer.compiler.emulators.facts import CODEBOOK, CODES, DOWN, UP
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.emulators.slice import slice_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.command import evaluate_model
from onelayer.compiler.factors.stored_forms import SCALE_BYTES
from onelayer.compiler.inspect import inspect_path
from onelayer.compiler.refine.command import refine_emulator
from onelayer.runtime import train_lora

KEEP_BYTES = 0.25


@pytest.fixture(scope="module", params=list(WIDE_MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    root: Path = tmp_path_factory.mktemp(request.param)
    model = save_mixture(request.param, root, wide=True)
    compiled(root, ratio=None, keep_bytes=KEEP_BYTES, form="coded")
    return model, root


def loaded(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def test_experts_are_codes_of_the_size_asked_for_with_true_figures(mixture: tuple[Any, Path]) -> None:
    model, root = mixture
    emulator, read = Emulator.open(root / "emulator"), what_experts_read(model, root)
    document = json.loads((root / "emulator" / "emulator.json").read_text())
    assert document["format_version"] == 5
    assert 0.95 * KEEP_BYTES <= document["kept_bytes_share"] <= KEEP_BYTES
    assert {row["form"] for row in document["stacks"]} == {"coded"}
    assert len(document["stacks"]) == 4
    for row in document["stacks"]:
        path, _, leaf = row["name"].rpartition(".")
        module, held = model.get_submodule(path), emulator.stack(row["name"])
        energies, lost = [], []
        for expert, rows in enumerate(read[row["name"]]):
            weight, (kept, nothing) = (
                weight_of(module, leaf, expert),
                emulator.expert_factors(row["name"], held, expert),
            )
            assert nothing is None
            energies.append(float((rows.double() @ weight.double().T).square().sum()))
            lost.append(error_of(kept, weight, rows) ** 2 * energies[-1] if len(rows) else 0.0)
        assert (sum(lost) / sum(energies)) ** 0.5 == pytest.approx(row["error"], rel=0.25)
        assert row["error"] < 0.4


def test_stock_classes_load_train_and_save_it(mixture: tuple[Any, Path]) -> None:
    _, root = mixture
    emulator = Emulator.open(root / "emulator")
    model = loaded(root / "emulator")
    dense = AutoModelForCausalLM.from_pretrained(root / "model")
    for name in emulator.facts.compressed:
        dense.get_submodule(name).weight.data = emulator.factors(name)[0]
    for name in emulator.facts.stacks:
        path, _, leaf = name.rpartition(".")
        held, stack = emulator.stack(name), getattr(dense.get_submodule(path), leaf)
        stack.data = torch.stack([emulator.expert_factors(name, held, expert)[0] for expert in range(len(stack))])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    batch = batch_for(dense)
    assert distance(gradients(with_lora(model), batch), gradients(with_lora(dense), batch)) < 1e-4
    loaded(root / "emulator").save_pretrained(root / "again")
    stored, saved = (Emulator.open(root / name).checkpoint for name in ("emulator", "again"))
    assert stored.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(stored.read(name), saved.read(name)) for name in stored.tensors)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_refinement_trains_the_codebooks_scales_and_factors_of_experts(
    mixture: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], backward: bool
) -> None:
    model, root = mixture
    given: dict[str, Any] = {"model": root / "model", "calibration": root / "mix.jsonl", "backward": backward}
    steps: dict[str, Any] = {"steps": 4, "step_samples": 8, "samples": 8, "batch_size": 8, "learning_rate": 0.01}
    result = refine_emulator(root / "emulator", output=tmp_path / "refined", **given, **steps)
    assert "stay as they are" not in capsys.readouterr().err
    assert all(unit.after < unit.before for unit in result.units)
    before, after = (Emulator.open(path) for path in (root / "emulator", tmp_path / "refined"))
    for name, facts in before.facts.stacks.items():
        first, last = (each.stack(name) for each in (before, after))
        for ending in (CODEBOOK, UP, DOWN):
            assert not torch.equal(first[ending], last[ending]), name
        assert facts.code_shape is not None
        codes = code_row_bytes(facts.shape[2], facts.code_shape) - SCALE_BYTES
        assert torch.equal(first[CODES][..., :codes], last[CODES][..., :codes])
        assert not torch.equal(first[CODES], last[CODES]), "the scales after the codes are trained"
    # What was trained is what is stored: computed by stock transformers, the emulator is nearer on these rows too.
    tokenizer = load_tokenizer(root / "model")
    texts = [json.loads(line)["text"] for line in (root / "mix.jsonl").read_text().splitlines()]
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    models = (model, *map(loaded, (root / "emulator", tmp_path / "refined")))
    wanted, *found = (torch.cat([logits(each, ids) for ids in rows], dim=1) for each in models)
    distances = [float((each - wanted).norm()) for each in found]
    assert distances[1] < distances[0]


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_it_is_evaluated_and_inspected_and_slices_are_refused(mixture: tuple[Any, Path]) -> None:
    _, root = mixture
    scored = evaluate_model(root / "model", root / "mix.jsonl", against=root / "emulator")
    assert scored.against is not None
    assert scored.against.loss == pytest.approx(scored.results[0].loss, rel=0.2)
    assert "experts" in str(inspect_path(root / "emulator"))
    with pytest.raises(InputError, match="holds codes, which cannot be sliced"):
        slice_emulator(root / "emulator", 0.1, root / "less")


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_an_adapter_is_trained_on_it_with_anchors_and_reloaded(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    _, root = mixture
    settings: dict[str, Any] = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "lora_rank": 4}
    anchors: dict[str, Any] = {"model": root / "model", "anchor_every": 3, "anchor_bits": 32}
    direct, plain, anchored = (
        train_lora(root / base, root / "mix.jsonl", tmp_path / name, **settings, **more).losses
        for base, name, more in (("model", "direct", {}), ("emulator", "plain", {}), ("emulator", "anchored", anchors))
    )
    assert anchored[0][1] == pytest.approx(direct[0][1], abs=1e-4)
    assert abs(plain[0][1] - direct[0][1]) > 1e-3
    PeftModel.from_pretrained(loaded(root / "emulator"), tmp_path / "anchored").save_pretrained(str(tmp_path / "again"))
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("anchored", "again")]
    assert saved[0] == saved[1]


@pytest.mark.parametrize("mixture", ["mixtral"], indirect=True)
def test_a_stopped_compile_goes_on_to_the_same_bytes(
    mixture: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = mixture
    real, done = job.Compilation._write_unit, list[str]()

    def dying(self: Any, unit: Any, *arguments: Any) -> Any:
        done.append(unit.name)
        if len(done) == 2:
            raise OSError("killed")
        return real(self, unit, *arguments)

    settings: dict[str, Any] = {"ratio": None, "keep_bytes": KEEP_BYTES, "form": "coded"}
    with monkeypatch.context() as patch:
        patch.setattr(job.Compilation, "_write_unit", dying)
        with pytest.raises(OSError, match="killed"):
            compiled(root, "stormy", **settings)
    compiled(root, "stormy", **settings)
    assert hashes(root / "stormy") == hashes(root / "emulator")
