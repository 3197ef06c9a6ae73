"""What a resident pipeline gives its denoiser and its VAE, and what it draws, next to what was made without weights."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from onelayer.compiler.denoising.encoded import EncodedImages
from scripts.sweep.compare import difference


class FoundError(BaseException):
    """Ends a resident pipeline with what was to be seen."""


def called_with(pipe: Any, name: str, prompt: str, size: int, guidance: float = 1.0) -> dict[str, Any]:
    """Return the arguments of the resident pipeline's denoiser at its first time."""
    denoiser = getattr(pipe, name)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def forward(*args: Any, **kwargs: Any) -> None:
        raise FoundError({**dict(zip(names, args, strict=False)), **kwargs})

    arguments: dict[str, Any] = _found(pipe, prompt, size, {name: {"forward": forward}}, guidance)
    return arguments


def decoded_from(pipe: Any, name: str, prompt: str, size: int, sample: torch.Tensor, answer: Any) -> torch.Tensor:
    """Return what the resident pipeline hands to its VAE if its last sample is `sample`."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return (sample.reshape(args[2].shape),)

    def decode(latent: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise FoundError(latent)

    replaced: dict[str, dict[str, Callable[..., Any]]] = {
        name: {"forward": lambda *args, **kwargs: answer},
        "scheduler": {"step": step},
        "vae": {"decode": decode},
    }
    latent: torch.Tensor = _found(pipe, prompt, size, replaced)
    return latent


def _found(
    pipe: Any, prompt: str, size: int, replaced: dict[str, dict[str, Callable[..., Any]]], guidance: float = 1.0
) -> Any:
    """Run one step, with some methods replaced, until one of them ends it."""
    asked = {
        "height": size,
        "width": size,
        "num_inference_steps": 1,
        "num_frames": 1,
        "guidance_scale": guidance,
        "use_resolution_binning": False,
    }
    known = inspect.signature(type(pipe).__call__).parameters
    for part, methods in replaced.items():
        getattr(pipe, part).__dict__.update(methods)
    try:
        pipe(prompt, **{name: value for name, value in asked.items() if name in known})
    except FoundError as found:
        return found.args[0]
    finally:
        for part, methods in replaced.items():
            for method in methods:
                del getattr(pipe, part).__dict__[method]
    raise AssertionError("the pipeline ended before what was to be seen")


def recorded_difference(pipe: Any, name: str, encoded: EncodedImages, prompt: str, number: int, size: int) -> float:
    """Compare recorded arguments for the prompt of a number with the resident pipeline's; infinite if forms differ.

    Guidance is off, at 1 in most pipelines and at 0 in others.
    """
    found = (called_with(pipe, name, prompt, size, guidance) for guidance in (1.0, 0.0))
    return min(_distance(encoded, number, wanted, float(pipe.scheduler.timesteps[0])) for wanted in found)


def _distance(encoded: EncodedImages, number: int, wanted: dict[str, Any], time: float) -> float:
    sample = [leaf for leaf in tree_leaves(wanted) if isinstance(leaf, torch.Tensor)][encoded.form.sample]
    if sample.shape != encoded.template_of(number).leaves[encoded.form.sample].shape:
        return float("inf")
    got = tree_leaves(encoded.template_of(number).arguments(sample, time, torch.float32))
    leaves = tree_leaves(wanted)
    if len(leaves) != len(got):
        return float("inf")
    pairs = list(zip(got, leaves, strict=True))
    if any(one != other for one, other in pairs if not isinstance(other, torch.Tensor)):
        return float("inf")
    tensors = [(one.float(), other.float()) for one, other in pairs if isinstance(other, torch.Tensor)]
    return difference([[one for one, _ in tensors]], [[other for _, other in tensors]])


def latent_difference(
    pipe: Any, name: str, encoded: EncodedImages, prompt: str, number: int, pixels: torch.Tensor, size: int
) -> float:
    """Compare a latent that the resident pipeline decodes from the encoded one with the latent of its own VAE."""
    with torch.no_grad():
        answer = getattr(pipe, name)(**called_with(pipe, name, prompt, size))
        seen = decoded_from(pipe, name, prompt, size, encoded.latent(number), answer)
        made = pipe.vae.encode(pixels.unsqueeze(2) if seen.ndim == 5 else pixels)
    if hasattr(made, "latent_dist"):
        wanted = made.latent_dist.sample(torch.Generator().manual_seed(number))
    else:
        wanted = made.latent
    return difference([[seen]], [[wanted]])


def picture_difference(pipe: Any, file: Path, prompt: str, how: Mapping[str, int]) -> float:
    """Compare a sample picture with the one that the resident pipeline draws; in levels of 8 bits, infinite by shape.

    `how` are the `steps`, `resolution` and `seed` of `sample_pictures`.
    """
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": how["steps"], "num_frames": 1, "use_resolution_binning": False}
    asked |= {"height": how["resolution"], "width": how["resolution"]}
    asked |= {"generator": torch.Generator().manual_seed(how["seed"]), "output_type": "np", "return_dict": False}
    known = inspect.signature(type(pipe).__call__).parameters
    drawn = pipe(prompt, **{name: value for name, value in asked.items() if name in known})[0]
    wanted = np.asarray(drawn, np.float64) * 255
    found = np.asarray(Image.open(file), np.float64)
    wanted = wanted.reshape(wanted.shape[-3:])
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
