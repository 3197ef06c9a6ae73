"""Exact steps on a denoiser: gradients against autograd on the resident model, and the whole pass."""

from pathlib import Path

import pytest
import torch

from helpers.hashes import tree_hashes
from helpers.peft_adapters import random_adapter
from onelayer.compiler import polish_adapter
from onelayer.compiler.denoising.batches import DrawnImages, NoisyImages, joined_batches
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.errors import InputError
from scripts.sweep.diffusion import gradient_difference
from scripts.sweep.encoded_pipelines import EncodedPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
PARTS = (slice(0, 3), slice(3, 5))


def test_images_of_one_shape_are_computed_together(flux: EncodedPipeline, tmp_path: Path) -> None:
    images = DrawnImages(NoisyImages(EncodedImages.open(flux.images), torch.float32, 0, prior_weight=0.5), 5).step(0)
    batches = joined_batches(images, 3)
    assert [batch.order for batch in batches] == [sum((image.order for image in images[part]), ()) for part in PARTS]
    model = flux.load()
    with torch.no_grad():
        one_by_one = [batch.loss(model(**batch.inputs)) for batch in images]
        together = [batch.loss(model(**batch.inputs)) for batch in batches]
    torch.testing.assert_close(sum(together), sum(one_by_one), rtol=1e-5, atol=0)


def test_gradients_of_exact_steps_equal_autograd(flux: EncodedPipeline, tmp_path: Path) -> None:
    linears = r".*transformer_blocks.*\.(to_q|to_v|proj_mlp|proj_out|linear)"
    random_adapter(flux.load(), tmp_path, size=0.05, r=4, target_modules=linears, task_type=None)
    assert gradient_difference(flux, tmp_path) < 1e-5


def test_a_fresh_adapter_is_polished_the_same_twice(flux: EncodedPipeline, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        result = polish_adapter(
            None,
            model=flux.pipeline,
            data=flux.images,
            output=tmp_path / name,
            lora_rank=2,
            steps=2,
            batch_size=2,
            learning_rate=1e-2,
        )
        made.append(tree_hashes(tmp_path / name))
        report = result.report
        assert report.peak_device_bytes <= report.largest_unit_bytes + report.workspace_bytes
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert made[0][file] == made[1][file]
    noisy = NoisyImages(EncodedImages.open(flux.images), torch.float32, 0, "logit_normal")
    model, batches = flux.load(), DrawnImages(noisy, 2)
    with torch.no_grad():
        losses = [float(batch.loss(model(**batch.inputs))) for batch in batches.step(0)]
    assert result.steps[0].loss == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_packing_is_refused(flux: EncodedPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--packing: is for models of text"):
        polish_adapter(None, model=flux.pipeline, data=flux.images, output=tmp_path / "out", lora_rank=2, packing=True)
