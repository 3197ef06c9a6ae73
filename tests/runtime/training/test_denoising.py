"""Training of a denoiser on encoded images, and its adapter in diffusers' own pipelines."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from helpers.children import at_call, interrupt
from helpers.hashes import tree_hashes
from helpers.launched import launch, options
from helpers.launched_work import Fault, run_with_fault
from helpers.peft_adapters import quiet_peft
from onelayer.compiler import compile_emulator, correct_adapter, evaluate_model, merge_adapter, polish_adapter
from onelayer.compiler.denoising.batches import DrawnImages
from onelayer.compiler.emulators.reader import Emulator
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.storage.digests import file_digest
from onelayer.compiler.storage.files import read_json, write_json
from onelayer.compiler.storage.pipeline_directory import ENCODED_FILE
from onelayer.runtime import train_lora
from onelayer.runtime.anchors.anchors import Anchors
from onelayer.runtime.training import denoising
from onelayer.runtime.training.denoising import DenoisingPlan, DenoisingTrainer, DrawnRows
from scripts.sweep.diffusion_inputs import picture_difference
from scripts.sweep.encoded_pipelines import EncodedPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
LINEARS = r".*transformer_blocks.*\.(to_q|to_v|add_k_proj|proj_mlp|proj_out)"
HOW: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "learning_rate": 1e-2, "lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def adapter(flux: EncodedPipeline, flux_emulator: Path) -> Path:
    output = flux.pipeline.parent / "adapter"
    result = train_lora(flux_emulator, flux.images, output, eval_data=flux.images, **HOW)
    assert result.steps == 4
    assert [step for step, _ in result.losses] == [1, 2, 3, 4]
    assert len(result.held_out) == 1
    return output


def test_the_adapter_and_its_merge_fit_the_original(
    flux: EncodedPipeline, flux_emulator: Path, adapter: Path, tmp_path: Path
) -> None:
    corrected = tmp_path / "corrected"
    correct_adapter(adapter, emulator=flux_emulator, model=flux.pipeline, output=corrected)
    merge_adapter(corrected, model=flux.pipeline, output=tmp_path / "merged")
    batch = flux.noisy().at(0, 0.5, 1)
    for directory in (adapter, corrected):
        kind: Any = type(flux.pipe)
        pipe = kind.from_pretrained(str(flux.pipeline))
        with torch.no_grad():
            bare = pipe.transformer(**batch.inputs)[0]
            wanted = peft.PeftModel.from_pretrained(flux.load(), str(directory))(**batch.inputs)[0]
            pipe.load_lora_weights(str(directory), weight_name="pytorch_lora_weights.safetensors")
            answer = pipe.transformer(**batch.inputs)[0]
        torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-6)
        assert float((answer - bare).abs().max()) > 1e-3
    with torch.no_grad():
        merged = flux.load(tmp_path / "merged")(**batch.inputs)[0]
    torch.testing.assert_close(merged, wanted, rtol=0, atol=2e-6)


def test_a_training_ends_with_sample_pictures(flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {**HOW, "max_steps": 2, "seed": 5, "sample_prompt": ["a dog", "a cat"]}
    result = train_lora(flux_emulator, flux.images, tmp_path / "out", **how, sample_steps=2, sample_resolution=32)
    assert result.samples is not None
    assert result.samples.output == str(tmp_path / "out" / "samples")
    assert [picture.prompt for picture in result.samples.pictures] == ["a dog", "a cat"]
    pipe = type(flux.pipe).from_pretrained(str(flux.pipeline))
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
    drawing = {"steps": 2, "resolution": 32, "seed": 5}
    assert picture_difference(pipe, tmp_path / "out/samples/1.png", "a cat", drawing) <= 1


def test_pictures_need_the_pipeline_of_the_images(flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path) -> None:
    images = shutil.copytree(flux.images, tmp_path / "images")
    document = read_json(images / ENCODED_FILE)
    document["base"]["model"] = str(tmp_path / "gone")
    write_json(images / ENCODED_FILE, document)
    with pytest.raises(InputError, match=r"--sample-prompt: .*gone: no such directory"):
        train_lora(flux_emulator, images, tmp_path / "out", max_steps=1, sample_prompt=["a dog"])


def test_an_interrupted_training_continues_to_the_same_bytes(
    flux: EncodedPipeline, flux_emulator: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, output = (DenoisingTrainer, "training_step"), tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(*step, at_call(*step, 6, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train_lora(flux_emulator, flux.images, output, eval_data=flux.images, save_steps=2, **HOW)
    monkeypatch.setattr(*step, at_call(*step, 5, lambda: pytest.fail("trained more than two steps of two images")))
    train_lora(flux_emulator, flux.images, output, eval_data=flux.images, save_steps=2, resume=True, **HOW)
    ours, theirs = tree_hashes(output), tree_hashes(adapter)
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]
    assert ours["pytorch_lora_weights.safetensors"] == theirs["pytorch_lora_weights.safetensors"]


def test_right_after_a_renewal_the_emulator_answers_like_the_original(
    flux: EncodedPipeline, flux_emulator: Path
) -> None:
    how: dict[str, Any] = {"r": 2, "target_modules": LINEARS, "init_lora_weights": False, "task_type": None}
    emulator, original = (quiet_peft(flux.load(path), **how).eval() for path in (flux_emulator, None))
    trained = {name: value for name, value in emulator.named_parameters() if value.requires_grad}
    assert not original.load_state_dict(trained, strict=False).unexpected_keys
    rows = DrawnRows(DrawnImages(flux.noisy(), 1), DenoisingPlan(2, 1))
    drawn = [rows[number] for number in range(2)]

    def answers(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**row["arguments"])[0] for row in drawn]

    wanted, plain = answers(original), answers(emulator)
    with Meter(torch.device("cpu")) as meter:
        facts = Emulator.open(flux_emulator).facts
        anchors = Anchors(emulator, facts, flux.denoiser, 32, meter, nullcontext)
        anchors.renew(drawn)
        for row, answer, bare in zip(drawn, wanted, plain, strict=True):
            with anchors.next_batch(), torch.no_grad():
                found = emulator(**row["arguments"])[0]
            torch.testing.assert_close(found, answer, rtol=0, atol=2e-5)
            assert float((bare - answer).abs().max()) > 1e-2
        assert anchors.is_used_up


@pytest.fixture(scope="module")
def coded(flux: EncodedPipeline) -> Path:
    """Return an emulator of codes, whose small linears are quantized whole."""
    output = flux.pipeline.parent / "coded"
    result = compile_emulator(flux.pipeline, flux.images, output, form="coded", keep_bytes=0.26, samples=4)
    assert {linear.form for linear in result.linears} == {"coded", "dense"}
    assert all(0 < (linear.gradient_error or 0) < 0.7 for linear in result.linears)
    return output


def test_what_is_learned_on_codes_reaches_the_original(flux: EncodedPipeline, coded: Path, tmp_path: Path) -> None:
    adapter, corrected, polished = (tmp_path / name for name in ("adapter", "corrected", "polished"))
    train_lora(coded, flux.images, adapter, **{**HOW, "max_steps": 2})
    correct_adapter(adapter, emulator=coded, model=flux.pipeline, output=corrected)
    steps: dict[str, Any] = {"steps": 1, "batch_size": 2, "micro_batch_size": 2}
    polish_adapter(corrected, model=flux.pipeline, data=flux.images, output=polished, **steps)
    scores = evaluate_model(flux.pipeline, flux.images, adapters=[corrected, polished], noise_samples=1).results
    assert scores[2].loss < scores[1].loss < scores[0].loss - 1e-2


def test_an_anchored_training_continues_to_the_same_bytes(
    flux: EncodedPipeline, coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**HOW, "max_steps": 3, "batch_size": 1, "anchor_every": 2, "save_steps": 1, "dropout": 0.3}
    settings["model"] = flux.pipeline
    whole = train_lora(coded, flux.images, tmp_path / "whole", **settings)
    assert whole.anchors is not None
    assert whole.anchors.renewals == 2
    step = DenoisingTrainer, "training_step"
    with monkeypatch.context() as patch:
        patch.setattr(*step, at_call(*step, 2, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train_lora(coded, flux.images, tmp_path / "parts", **settings)
    train_lora(coded, flux.images, tmp_path / "parts", resume=True, **settings)
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert file_digest(tmp_path / "parts" / file) == file_digest(tmp_path / "whole" / file)


def test_the_loss_is_that_of_the_drawn_rows(flux: EncodedPipeline, tmp_path: Path) -> None:
    result = train_lora(flux.denoiser, flux.images, tmp_path / "out", max_steps=1, batch_size=2, weighting="none")
    rows, model = DrawnImages(flux.noisy(), 2), flux.load()
    wanted = []
    for number in range(2):
        batch = rows.batch(number)
        with torch.no_grad():
            wanted.append(float(batch.loss(model(**batch.inputs))))
    assert result.losses[0][1] == pytest.approx(sum(wanted) / 2, rel=1e-5)
    compressed: dict[str, Any] = {"activations": "layer", "activation_rank": 0.5, "activation_report": True}
    again = train_lora(
        flux.denoiser, flux.images, tmp_path / "more", max_steps=1, batch_size=2, weighting="none", **compressed
    )
    assert again.losses[0][1] == pytest.approx(result.losses[0][1], rel=1e-5)
    assert again.saved_activation_bytes < 0.7 * result.saved_activation_bytes
    assert again.activations is not None
    assert 0.9 < (again.activations.gradient_cosine or 0) < 1
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in weights)


@pytest.mark.parametrize("anchors", [{}, {"anchor_every": 2, "anchor_bits": 32}])
def test_images_computed_together_give_the_same_training(
    flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path, anchors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {**HOW, **anchors, "max_steps": 2, "batch_size": 3, "prior_weight": 0.5}
    how["model"] = flux.pipeline if anchors else None
    alone = train_lora(flux_emulator, flux.images, tmp_path / "alone", **how)
    step = DenoisingTrainer, "training_step"
    monkeypatch.setattr(*step, at_call(*step, 5, lambda: pytest.fail("more than two calls in a step")))
    together = train_lora(flux_emulator, flux.images, tmp_path / "together", micro_batch_size=2, **how)
    for (_, one), (_, other) in zip(alone.losses, together.losses, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_every_second_row_is_of_the_class(flux: EncodedPipeline) -> None:
    noisy = flux.noisy()
    rows = DrawnImages(noisy, 2)
    taken = [rows.row(number) for number in range(12)]
    assert [noisy.images.rows[row].is_class for row in taken] == [False, True] * 6
    assert sorted(taken[0:6:2]) == sorted(taken[6:12:2]) == [0, 1, 2]
    assert [rows.row(number) for number in range(12)] == taken
    noisy.prior_weight = 0.0
    assert {rows.row(number) for number in range(6)} == {0, 1, 2}


def test_processes_share_the_images_of_a_step(flux: EncodedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate gives a process every second row here; rows of up to two images come from a process's own three."""
    drawn = DrawnImages(flux.noisy(), 3)
    monkeypatch.setattr(DrawnImages, "batch", lambda self, number: number)
    monkeypatch.setattr(denoising, "joined_batches", lambda images, most: [images])
    monkeypatch.setattr(denoising, "row_of", lambda images: images)
    rows = DrawnRows(drawn, DenoisingPlan(steps=2, batch_size=3, together=2, processes=2))
    shares: Any = [[rows[number] for number in range(process, len(rows), 2)] for process in range(2)]
    assert shares == [[[0, 1], [2], [6, 7], [8]], [[3, 4], [5], [9, 10], [11]]]


def test_one_process_goes_on_with_the_training_of_two(
    flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path
) -> None:
    """Two take two steps with two images each; the third is that of one with four."""
    how = {**HOW, "max_steps": 3, "save_steps": 1}
    wanted = train_lora(flux_emulator, flux.images, tmp_path / "one", **{**how, "batch_size": 4}).losses
    fault = Fault(1, "SIGKILL", "onelayer.runtime.training.denoising:DenoisingTrainer", "training_step", 6)
    command = ["train", flux_emulator, "--data", flux.images, *options(**how), "--output", tmp_path / "on"]
    launch(2, [json.dumps(asdict(fault)), *command], tmp_path / "logs", run_with_fault)
    found = train_lora(flux_emulator, flux.images, tmp_path / "on", resume=True, **how).losses
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "dpo"}, "--method dpo: the original is the reference"),
        ({"args": {"packing": True}}, "--packing: is for models of text"),
        ({"way": "streamed"}, "use `onelayer polish` for exact steps"),
        ({"target_modules": ["to_qq"]}, "target_modules: to_qq"),
        ({"anchor_every": 2}, "needs the original; give --model"),
    ],
)
def test_settings_that_do_not_fit_a_denoiser_are_refused(
    how: dict[str, Any], message: str, flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path
) -> None:
    model = flux.denoiser if "way" in how else flux_emulator
    with pytest.raises(InputError, match=message):
        train_lora(model, flux.images, tmp_path / "out", max_steps=1, **how)
