"""Puts tiny diffusion pipelines of eight families through every command, on a folder of images, and compares.

    python -m scripts.sweep.diffusion [--only flux,wan]

Prints one row per family. Differences are relative to the largest value: recorded arguments from those of the resident
pipeline, the latent that it decodes from its VAE's, the streamed denoiser from the resident one, gradients of exact
steps from autograd's (of norms), `pipe.load_lora_weights` from PEFT, the merged denoiser from the adapted one; those of
sample pictures are in levels of 8 bits. Then the held-out losses of the original, the corrected and the polished
adapter. A pipeline that is refused prints the refusal.
"""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers

from onelayer.compiler import (
    compile_emulator,
    correct_adapter,
    evaluate_model,
    merge_adapter,
    polish_adapter,
    refine_emulator,
)
from onelayer.compiler.adapters.pipeline_weights import PIPELINE_FILE
from onelayer.compiler.adapters.reader import Adapter
from onelayer.compiler.denoising.batches import DenoisingBatch, DrawnImages, joined_batches
from onelayer.compiler.encode.images import captioned_images, pixels
from onelayer.compiler.machine.meter import Meter
from onelayer.compiler.polish.trained_adapter import attach_trainable
from onelayer.compiler.streaming.denoising_loss import loss_of
from onelayer.compiler.streaming.gradient_stream import GradientStream
from onelayer.runtime import train_lora
from scripts.devices import CPU
from scripts.sweep.compare import difference, first_line, outputs_of, prepared, streamed_outputs
from scripts.sweep.diffusion_inputs import latent_difference, picture_difference, recorded_difference
from scripts.sweep.encoded_pipelines import SIZE, SUBJECT, EncodedPipeline, encoded_pipeline
from scripts.sweep.pipelines import FAMILIES

STEPS: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "lora_rank": 4}
DRAWING = {"steps": 2, "resolution": SIZE, "seed": 0}
SAMPLED: dict[str, Any] = {"sample_prompt": [SUBJECT], "sample_steps": 2, "sample_resolution": SIZE}


def encoded_differences(sample: EncodedPipeline) -> tuple[float, float]:
    """Compare the arguments for the first prompt, and the latent of its image, with the resident pipeline's."""
    sample.pipe.set_progress_bar_config(disable=True)
    image = captioned_images(sample.photos, SUBJECT, "", is_class=False)[0]
    what = sample.pipe, sample.denoiser.name, sample.encoded, SUBJECT, 0
    return recorded_difference(*what, SIZE), latent_difference(*what, pixels(image, SIZE), SIZE)


def streamed_difference(sample: EncodedPipeline) -> float:
    """Compare the streamed denoiser with the resident one, on three noisy images."""
    batches = [batch.inputs for batch in sample.noisy().stratified([0, 1], 3)]
    found, _, _ = streamed_outputs(sample.denoiser, batches)
    return difference(found, outputs_of(prepared(sample.load()), batches))


def gradient_difference(sample: EncodedPipeline, adapter: Path) -> float:
    """Compare gradients of exact steps with autograd's, of three images; relative to the norm of each gradient.

    The stream computes images together where it can, and autograd one by one.
    """
    images = DrawnImages(sample.noisy(), 3).step(0)
    batches = joined_batches(images, 2)
    resident = peft.PeftModel.from_pretrained(sample.load(), str(adapter), is_trainable=True).eval()
    for image in images:
        (image.loss(resident(**image.inputs)) / len(images)).backward()
    wanted = {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in resident.named_parameters()
        if parameter.grad is not None
    }
    adapted, trained = attach_trainable(sample.denoiser, Adapter.open(adapter), CPU)
    with Meter(CPU) as meter, GradientStream(adapted.streamed, CPU, meter, dropout=False) as stream:
        loss = loss_of(batches, len(batches), CPU)
        stream.trained = loss.trained
        stream.run(loss.inputs, loss.take)
        if not loss.finish():
            return float("inf")
        stream.reverse()
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    if not wanted or found.keys() != wanted.keys():
        return float("inf")
    least = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())  # what should vanish is rounding
    distances = [(found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(least) for name in wanted]
    return float(torch.stack(distances).max())


def adapted_outputs(
    sample: EncodedPipeline, adapter: Path, batches: Sequence[DenoisingBatch]
) -> list[list[torch.Tensor]]:
    """Run the resident denoiser with an adapter attached by PEFT."""
    model: Any = peft.PeftModel.from_pretrained(sample.load(), str(adapter))
    return outputs_of(model, [batch.inputs for batch in batches])


def loaded_difference(sample: EncodedPipeline, adapter: Path) -> float | None:
    """Compare `pipe.load_lora_weights` with PEFT. None for a pipeline that loads no adapters."""
    pipe: Any = type(sample.pipe).from_pretrained(str(sample.pipeline))
    if not hasattr(pipe, "load_lora_weights"):
        return None
    pipe.load_lora_weights(str(adapter), weight_name=PIPELINE_FILE)
    batches = [sample.noisy().at(0, 0.5, 1)]
    denoiser = getattr(pipe, sample.denoiser.name)
    found = outputs_of(denoiser, [batch.inputs for batch in batches])
    return difference(found, adapted_outputs(sample, adapter, batches))


def merged_difference(sample: EncodedPipeline, adapter: Path, merged: Path) -> float:
    """Compare the merged denoiser with the adapted one."""
    batches = [sample.noisy().at(0, 0.5, 1)]
    found = outputs_of(sample.load(merged), [batch.inputs for batch in batches])
    return difference(found, adapted_outputs(sample, adapter, batches))


def drawn_difference(sample: EncodedPipeline, adapter: Path) -> float:
    """Compare the sample picture of a training with that of the resident pipeline with the adapter in it."""
    adapted: Any = peft.PeftModel.from_pretrained(sample.load(), str(adapter))
    denoiser = {sample.denoiser.name: adapted.merge_and_unload()}
    pipe: Any = type(sample.pipe).from_pretrained(str(sample.pipeline), **denoiser)
    return picture_difference(pipe, adapter / "samples" / "0.png", SUBJECT, DRAWING)


def verdict(family: str) -> str:
    """Run every command for one family, and describe what came out as cells of a table."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sample = encoded_pipeline(family, root)
        model, images = sample.pipeline, sample.images
        emulator, adapter, corrected, polished = (root / part for part in ("emulator", "adapter", "corrected", "last"))
        compiled = compile_emulator(model, images, root / "first", keep_bytes=0.25, factor_dtype="nf4", samples=6)
        refine_emulator(root / "first", model=model, calibration=images, output=emulator, samples=4, steps=3)
        train_lora(emulator, images, adapter, **STEPS, **SAMPLED)
        correct_adapter(adapter, emulator=emulator, model=model, output=corrected)
        polish_adapter(corrected, model=model, data=images, output=polished, steps=1, batch_size=2, micro_batch_size=2)
        merge_adapter(polished, model=model, output=root / "merged")
        scores = evaluate_model(model, images, adapters=[corrected, polished], noise_samples=2).results
        loaded = loaded_difference(sample, polished)
        cells = [
            str(len(compiled.linears)),
            *(f"{value:.1e}" for value in encoded_differences(sample)),
            f"{streamed_difference(sample):.1e}",
            f"{gradient_difference(sample, polished):.1e}",
            "no loader" if loaded is None else f"{loaded:.1e}",
            f"{merged_difference(sample, polished, root / 'merged'):.1e}",
            f"{drawn_difference(sample, adapter):.2f}",
            *(f"{score.loss:.4f}" for score in scores),
        ]
        return " | ".join(cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help="families, separated by commas")
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    names = "pipeline | linears | arguments | latent | streamed | gradients | load_lora_weights | merged | picture"
    print(f"| {names} | loss | corrected | polished |")
    print("|" + "---|" * 12)
    for family in parser.parse_args(arguments).only.split(","):
        try:
            print(f"| {family} | {verdict(family)} |", flush=True)
        except Exception as error:
            print(f"| {family} | {type(error).__name__}: {first_line(error)} |", flush=True)


if __name__ == "__main__":
    main()
