"""Plans and descriptions of diffusion pipelines."""

import json
import shutil
from pathlib import Path

import pytest

from onelayer.compiler import inspect_path
from onelayer.compiler.models.streamed_model import StreamedModel
from onelayer.runtime import plan_run
from onelayer.runtime.planning.media import PROMPT_POSITIONS, picture_positions
from onelayer.runtime.planning.read_shapes import read_shapes
from onelayer.runtime.planning.speed import Speed
from onelayer.runtime.reporting.run_summaries import plan_summary
from scripts.plan.denoisers import MODELS, write_pipeline
from scripts.sweep.encoded_pipelines import EncodedPipeline

SPEED = Speed(read_bytes_per_second=3e9, flops_per_second=6e13, device="assumed")


def test_shapes_are_those_that_stream(flux: EncodedPipeline, tmp_path: Path) -> None:
    shapes, streamed = read_shapes(flux.denoiser, image_side=32), StreamedModel(flux.denoiser)
    assert {block.name for block in shapes.blocks} == {unit.name for unit in streamed.units if "blocks" in unit.name}
    blocks = [flux.load().get_submodule(block.name) for block in shapes.blocks]
    sizes = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks]
    assert shapes.largest_block_bytes == max(sizes)
    assert shapes.parameters == sum(parameter.numel() for parameter in flux.load().parameters())
    assert shapes.positions == 8 * 8 + PROMPT_POSITIONS  # a latent of 16 x 16, packed by two
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        shutil.copy(flux.pipeline / part / "config.json", tmp_path / part)
    alone = read_shapes(tmp_path / "transformer", image_side=32)
    assert (alone.blocks, alone.positions) == (shapes.blocks, shapes.positions)


@pytest.mark.parametrize(
    ("denoiser", "vae", "wanted"),
    [
        ({"in_channels": 64, "patch_size": 2}, {"dim_mult": [1, 2, 4, 4], "z_dim": 16}, 64),
        ({"in_channels": 16, "patch_size": [1, 2, 2]}, {"dim_mult": [1, 2, 4, 4], "z_dim": 16}, 64),
        ({"in_channels": 32, "patch_size": 1}, {"encoder_block_out_channels": [1] * 6, "latent_channels": 32}, 32),
        ({"in_channels": 4}, {"block_out_channels": [1] * 4, "latent_channels": 4}, 128),
        ({"in_channels": 64, "patch_size": 1}, {}, 64),
    ],
)
def test_positions_of_a_picture(denoiser: dict[str, object], vae: dict[str, object], wanted: int) -> None:
    assert picture_positions(denoiser, vae, 1024) == wanted**2 + PROMPT_POSITIONS


def test_flux_fits_on_a_small_card(tmp_path: Path) -> None:
    write_pipeline(tmp_path, *MODELS["FLUX.1-dev"])
    plan = plan_run(tmp_path, 8 << 30, image_side=512, speed=SPEED)
    assert plan.fits
    assert (plan.positions, plan.max_length, plan.batch_size) == (1536, 1536, 1)
    assert plan.predicted.model_bytes == pytest.approx(23.8e9, rel=0.01)
    assert "streamed" not in {way.way for way in plan.ways}
    shown = plan_summary(json.loads(plan.model_dump_json()))
    assert "a picture with its prompt at a time, 1536 positions" in shown
    assert "--max-length" not in shown


def test_pipelines_and_encoded_images_are_described(flux: EncodedPipeline) -> None:
    described = inspect_path(flux.pipeline)
    assert (described["kind"], described["class"], described["denoiser"]) == ("pipeline", "FluxPipeline", "transformer")
    assert described["architectures"] == ["FluxTransformer2DModel"]
    assert described["components"]["vae"]["class"] == "AutoencoderKL"
    images = inspect_path(flux.images)
    assert (images["kind"], images["images"], images["class_images"]) == ("encoded", 3, 2)
    assert images["captions"] == ["a photo of sks dog", "a photo of dog"]
    assert images["base"]["digest"] == described["digest"]
