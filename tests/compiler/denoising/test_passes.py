"""Compile, refine and evaluate on denoisers, and their emulators in stock diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.quantizers import auto

import onelayer.runtime  # noqa: F401  # registers the loader of emulators
from helpers.peft_adapters import quiet_peft
from onelayer.compiler import compile_emulator, evaluate_model, refine_emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.evaluate.denoising import DenoisingScoring
from onelayer.compiler.evaluate.settings import EvaluateSettings
from onelayer.compiler.machine.distributed import Processes
from scripts.sweep.encoded_pipelines import EncodedPipeline

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_emulator_loads_in_stock_diffusers_and_saves_again(
    flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path
) -> None:
    loaded, batch = flux.load(flux_emulator), flux.noisy().at(0, 0.5, 1)
    with torch.no_grad():
        answer = loaded(**batch.inputs)[0]
        original = flux.load()(**batch.inputs)[0]
    assert 0 < float((answer - original).norm() / original.norm()) < 0.5
    loaded.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(flux.load(tmp_path)(**batch.inputs)[0], answer)
    compressed = evaluate_model(flux.pipeline, flux.images, against=flux_emulator, noise_samples=1)
    assert compressed.against is not None
    assert 0 < (compressed.against.velocity_drift or 0) < 0.1


def test_without_the_plugin_an_emulator_is_refused(
    flux: EncodedPipeline, flux_emulator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(registry, "onelayer")
    with pytest.raises(ValueError, match="Unknown quantization type, got onelayer"):
        flux.load(flux_emulator)


def test_a_refined_emulator_is_nearer_to_the_original(
    flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path
) -> None:
    result = refine_emulator(
        flux_emulator, model=flux.pipeline, calibration=flux.images, output=tmp_path / "refined", samples=4, steps=3
    )
    assert all(unit.after <= unit.before for unit in result.units)
    assert len(result.units) == 3
    flux.load(tmp_path / "refined")


def test_evaluate_equals_the_resident_losses(flux: EncodedPipeline, tmp_path: Path) -> None:
    adapted = quiet_peft(flux.load(), r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, task_type=None)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    result = evaluate_model(flux.pipeline, flux.images, adapters=[tmp_path / "adapter"], noise_samples=2)
    assert result.report.workspace_bytes < 256 << 20, "not the whole budget of states that wait"
    batches = [batch for row in range(5) for batch in flux.noisy().held_out(row, 2)]
    plain, losses, moved, squares = flux.load(), [], [], []
    with torch.no_grad():
        for batch in batches:
            original, changed = (batch.prediction(model(**batch.inputs)) for model in (plain, adapted))
            losses.append([float((answer - batch.target).square().mean()) for answer in (original, changed)])
            moved.append(float((changed - original).square().mean()))
            squares.append(float(original.square().mean()))
    for variant, score in enumerate(result.results):
        assert score.loss == pytest.approx(sum(loss[variant] for loss in losses[:6]) / 6, rel=1e-6)
        assert score.class_loss == pytest.approx(sum(loss[variant] for loss in losses[6:]) / 4, rel=1e-6)
        assert score.tokens == 3
    assert result.results[0].velocity_drift is None
    assert result.results[1].velocity_drift == pytest.approx(sum(moved[6:]) / sum(squares[6:]), rel=1e-5)
    together = evaluate_model(
        flux.pipeline, flux.images, adapters=[tmp_path / "adapter"], noise_samples=2, batch_size=4
    )
    for one, other in zip(result.results, together.results, strict=True):
        values = [(score.loss, score.class_loss, score.velocity_drift or 0, score.tokens) for score in (one, other)]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
    settings = EvaluateSettings(noise_samples=2, batch_size=4)
    job = DenoisingScoring.of(flux.encoded, torch.float32, settings, 1, Processes())
    assert [len(batch.order) for batch in job.batches] == [4, 4, 2]
    report = result.report
    assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes


def test_data_of_another_kind_or_model_is_refused(flux: EncodedPipeline, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a dog"}')
    with pytest.raises(InputError, match="holds no encoded images; a denoiser reads what `onelayer encode"):
        compile_emulator(flux.pipeline, tmp_path / "text.jsonl", tmp_path / "out")
    document = json.loads((flux.images / "encoded.json").read_text())
    document["base"]["digest"] = "0" * 64
    other = tmp_path / "other"
    other.mkdir()
    for kind in ("latents", "prompts"):
        (other / kind).symlink_to(flux.images / kind)
    (other / "encoded.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"was encoded for .* not for"):
        evaluate_model(flux.pipeline, other)
    with pytest.raises(InputError, match="a denoiser reads one directory"):
        evaluate_model(flux.pipeline, [flux.images, flux.images])
