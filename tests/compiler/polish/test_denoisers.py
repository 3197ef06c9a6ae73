"""Exact steps on a denoiser: gradients against autograd on the resident model, and the whole pass."""

from pathlib import Path

import peft
import pytest
import torch

from helpers.encoded_pipelines import EncodedPipeline, encoded_pipeline
from helpers.hashes import tree_hashes
from helpers.peft_adapters import random_adapter
from onelayer.compiler import polish_adapter
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.denoising.batches import DrawnImages, NoisyImages
from onelayer.compiler.denoising.encoded import EncodedImages
from onelayer.compiler.errors import InputError
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.polish.trained_adapter import attach_trainable
from onelayer.compiler.streaming.denoising_loss import loss_of
from onelayer.compiler.streaming.gradient_stream import GradientStream

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> EncodedPipeline:
    return encoded_pipeline("flux", tmp_path_factory.mktemp("flux"))


def test_gradients_of_exact_steps_equal_autograd(flux: EncodedPipeline, tmp_path: Path) -> None:
    linears = r".*transformer_blocks.*\.(to_q|to_v|proj_mlp|proj_out|linear)"
    random_adapter(flux.load(), tmp_path, size=0.05, r=4, target_modules=linears, task_type=None)
    batches, held_out = DrawnImages(flux.noisy(), 3).step(0), flux.noisy().held_out(0, 1)
    resident = peft.PeftModel.from_pretrained(flux.load(), str(tmp_path), is_trainable=True).eval()
    for batch in batches:
        (batch.loss(resident(**batch.inputs)) / len(batches)).backward()
    wanted = {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in resident.named_parameters()
        if parameter.grad is not None
    }
    adapted, trained = attach_trainable(flux.denoiser, Adapter.open(tmp_path), CPU)
    with Meter(CPU) as meter, GradientStream(adapted.streamed, CPU, meter, trained=3, dropout=False) as stream:
        loss = loss_of([*batches, *held_out], 3, CPU)
        stream.run(loss.inputs, loss.take)
        assert loss.finish()
        stream.reverse()
    with torch.no_grad():
        assert loss.held_out_loss == pytest.approx(float(held_out[0].loss(resident(**held_out[0].inputs))), rel=1e-5)
    assert wanted.keys() == trained.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert float((parameter.grad - wanted[name]).norm() / wanted[name].norm()) < 1e-5, name


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
