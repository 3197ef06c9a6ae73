"""Passes over denoisers in processes of their own: memory at two depths, and kills that cost no byte of the result."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.children import at_call, killed_at
from helpers.hashes import tree_hashes
from helpers.promised_runs import check_promise, compiled, measured, polished, sampled
from onelayer.compiler import compile_emulator, encode_images
from onelayer.compiler.compile.job import Compilation
from onelayer.compiler.encode.command import _Encoding
from onelayer.compiler.results import Report
from onelayer.compiler.sampling.sampler import _Streams
from onelayer.runtime import train_lora
from onelayer.runtime.training.denoising import DenoisingTrainer
from scripts.sweep.encoded_pipelines import SIZE, EncodedPipeline, encoded_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
PASSES: dict[Any, dict[str, Any]] = {
    compiled: {"samples": 4},
    polished: {"batch_size": 4, "micro_batch_size": 2},
    sampled: {"resolution": SIZE},
}


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, own_store: Path) -> None:
    found: list[list[Report]] = []
    weight_bytes: list[int] = []
    for layers in (1, 5):
        root = tmp_path / str(layers)
        made = encoded_pipeline("flux", root, layers=layers, heads=16)
        weight_bytes.append(sum(file.stat().st_size for file in made.denoiser.glob("*.safetensors")))
        (root / "model").symlink_to(made.pipeline)
        found.append([measured(command, root, own_store, **settings) for command, settings in PASSES.items()])
    for few, many in zip(*found, strict=True):
        for report in (few, many):
            check_promise(report)
        # What a polish trains grows, with its optimizer and kept inputs. Weights that stay would add all of theirs.
        assert many.peak_device_bytes - few.peak_device_bytes < weight_bytes[1] - weight_bytes[0]


def test_a_killed_process_is_resumed_to_the_same_bytes(
    flux: EncodedPipeline, flux_emulator: Path, tmp_path: Path, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos: dict[str, Any] = {"data": flux.photos, "resolution": SIZE, "instance_prompt": "a photo of sks dog"}
    encode_images(flux.pipeline, output=tmp_path / "calm", **photos)
    trained: dict[str, Any] = {
        "data": flux.images,
        "max_steps": 3,
        "batch_size": 1,
        "lora_rank": 2,
        "save_steps": 1,
        "resume": True,
        "sample_prompt": ["a photo of sks dog"],
        "sample_steps": 2,
        "sample_resolution": SIZE,
    }
    train_lora(flux_emulator, output=tmp_path / "adapter", **trained)
    emulated: dict[str, Any] = {"keep_bytes": 0.25, "factor_dtype": "nf4", "samples": 6, "calibration": flux.images}
    cases: list[tuple[Any, Any, dict[str, Any], Path]] = [
        ((_Encoding, "_latent", 2), encode_images, {"model": flux.pipeline, **photos}, tmp_path / "calm"),
        ((Compilation, "compressed", 2), compile_emulator, {"model": flux.pipeline, **emulated}, flux_emulator),
        (
            (DenoisingTrainer, "training_step", 3),
            train_lora,
            {"emulator": flux_emulator, **trained},
            tmp_path / "adapter",
        ),
        # In the second denoising step: the adapter and the first step are finished, the picture is not.
        ((_Streams, "_streamed", 4), train_lora, {"emulator": flux_emulator, **trained}, tmp_path / "adapter"),
    ]
    for moment, run, keywords, calm in cases:
        output = tmp_path / "stormy"
        killed_at(moment, run, {**keywords, "output": output}, str(own_store))
        assert not output.exists()
        with monkeypatch.context() as patch:
            if moment[0] is _Streams:
                again = at_call(DenoisingTrainer, "training_step", 1, lambda: pytest.fail("trained again"))
                patch.setattr(DenoisingTrainer, "training_step", again)
                again = at_call(_Streams, "_streamed", 5, lambda: pytest.fail("drew a finished step again"))
                patch.setattr(_Streams, "_streamed", again)
            run(**keywords, output=output)
        found, wanted = (
            {name: value for name, value in tree_hashes(path).items() if name.endswith((".safetensors", ".png"))}
            for path in (output, calm)
        )
        assert len(found) > 1
        assert found == wanted
        shutil.rmtree(output)
