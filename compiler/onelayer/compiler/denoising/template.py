"""The arguments of a denoiser for one prompt, with the places of the sample and of the time left open.

Arguments are nested dictionaries, lists and tuples. Their tensors are the leaves; everything else is plain JSON.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The two times at which a pipeline is recorded, to see how it passes the time on.
FIRST_TIME, OTHER_TIME = 500.0, 250.0


class NotATemplateError(ValueError):
    """Recorded arguments that cannot be filled in for other samples and times."""


def taken_apart(value: Any, leaves: list[torch.Tensor]) -> Any:
    """Return the JSON form of arguments, and append their tensors to `leaves`. Raises `NotATemplateError`."""
    if isinstance(value, torch.Tensor):
        leaves.append(value.detach())
        return {"tensor": len(leaves) - 1}
    if isinstance(value, Mapping):
        return {"dict": {str(key): taken_apart(item, leaves) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [taken_apart(item, leaves) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise NotATemplateError(f"an argument is a {type(value).__name__}, which cannot be stored")


def put_together(form: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
    """Return the arguments of a JSON form, with `leaves` as its tensors."""
    ((kind, content),) = form.items()
    if kind == "tensor":
        return leaves[content]
    if kind == "dict":
        return {key: put_together(item, leaves) for key, item in content.items()}
    if kind == "value":
        return content
    items = [put_together(item, leaves) for item in content]
    return items if kind == "list" else tuple(items)


@dataclass(frozen=True)
class Form:
    """What the arguments of all prompts have in common.

    `tree` is their JSON form. Leaf number `sample` is the noisy sample, leaf number `time` is `slope` times the time of
    the scheduler plus `offset`. `joining` says how the arguments of several images become those of one call, if
    the pipeline showed how.
    """

    tree: Mapping[str, Any]
    sample: int
    time: int
    slope: float
    offset: float
    joining: Any = None


@dataclass(frozen=True)
class Template:
    """The arguments for one prompt: `leaves` are their tensors."""

    form: Form
    leaves: Sequence[torch.Tensor]

    @classmethod
    def of(cls, first: Any, at_other_time: Any, of_other_noise: Any) -> "Template":
        """Find the open places from three recordings, the first at `FIRST_TIME`, the second at `OTHER_TIME`.

        Raises `NotATemplateError` if more than the sample or the time differs: the pipeline still guides.
        """
        a, b, c = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        tree = taken_apart(first, a)
        if taken_apart(at_other_time, b) != tree or taken_apart(of_other_noise, c) != tree:
            raise NotATemplateError("its denoiser gets other arguments at another time")
        samples, times = _differing(a, c), _differing(a, b)
        if len(samples) != 1 or len(times) != 1 or a[samples[0]].is_floating_point() is False:
            raise NotATemplateError("its denoiser sees several samples at once, so the pipeline still guides")
        one, other = (float(leaves[times[0]].float().mean()) for leaves in (a, b))
        slope = (one - other) / (FIRST_TIME - OTHER_TIME)
        return cls(Form(tree, samples[0], times[0], slope, one - slope * FIRST_TIME), a)

    def arguments(self, sample: torch.Tensor, time: float, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments for a noisy sample at a time of the scheduler.

        Floating tensors become `dtype`, but for the time and other plain numbers, which models convert themselves.
        """
        leaves = [leaf.to(dtype) if leaf.is_floating_point() and leaf.ndim > 1 else leaf for leaf in self.leaves]
        form = self.form
        leaves[form.sample] = sample.reshape(leaves[form.sample].shape).to(dtype)
        leaves[form.time] = torch.full_like(leaves[form.time], form.slope * time + form.offset)
        arguments: dict[str, Any] = put_together(form.tree, leaves)
        return arguments

    @property
    def positions(self) -> int:
        """The positions that units see: those of the sample and of everything as long as a text, together."""
        return sum(_positions(leaf) for leaf in self.leaves if leaf.is_floating_point())


def _differing(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[int]:
    pairs = enumerate(zip(left, right, strict=True))
    return [index for index, (one, other) in pairs if one.shape != other.shape or not torch.equal(one, other)]


def _positions(tensor: torch.Tensor) -> int:
    """Count positions: (B, T, C) has B T, images (B, C, H, W) and videos have those of their pixels."""
    if tensor.ndim < 3:
        return 0
    return tensor.numel() // tensor.shape[-1 if tensor.ndim == 3 else 1]
