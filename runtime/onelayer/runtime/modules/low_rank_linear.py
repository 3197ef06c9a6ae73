"""Linears with two thin factors instead of one weight, which an emulator computes with, and how it is loaded.

Shapes: N tokens, `in` and `out` the features of the linear that was replaced, k its rank.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onelayer.compiler.errors import InputError
from onelayer.runtime.modules.weight_guard import GuardWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedLinear(nn.Linear):
    """The replacement of a linear. It subclasses `nn.Linear`, since PEFT attaches to that, but has no weight.

    `was_conv1d` says that the original module is a GPT-2 style `Conv1D`, whose weight is transposed; adapters that are
    trained here note it in their configuration. `factors` are the names of the frozen tensors that replace the weight.
    """

    factors: tuple[str, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        was_conv1d: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        self.in_features, self.out_features, self.was_conv1d = in_features, out_features, was_conv1d
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def freeze(self) -> None:
        """Freeze the tensors that replace the weight."""
        for name in self.factors:
            self.get_parameter(name).requires_grad_(False)


class LowRankLinear(CompressedLinear):
    """y = (x down^T) up^T + bias, with `lr_up` (out, k) and `lr_down` (k, in); columns ordered by energy."""

    factors = ("lr_up", "lr_down")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        was_conv1d: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, was_conv1d)
        self.rank = rank
        self.lr_up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.lr_down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nn.Linear declares a parameter
        """A guard with the shape, dtype and device of the missing weight."""
        return GuardWeight.like(self.lr_up, (self.out_features, self.in_features), self.lr_up.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (N, in) to (N, out), through k."""
        return nn.functional.linear(nn.functional.linear(input, self.lr_down), self.lr_up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def load_emulator(path: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """Load an emulator directory as the model class that its `architectures` names.

    This checks the files, then does the same as `from_pretrained(path, **kwargs)` of that class after
    `import onelayer.runtime`. Raises `InputError` if `path` is not an emulator.
    """
    from onelayer.compiler.libraries.library import library_of
    from onelayer.compiler.storage.checkpoint import Checkpoint
    from onelayer.compiler.storage.model_config import read_model_config

    directory = Path(path)
    section = read_model_config(directory).get("quantization_config") or {}
    if section.get("quant_method") != "onelayer":
        raise InputError(f"{directory}: is not an emulator; make one with `onelayer compile`")
    Checkpoint.open(directory)
    library = library_of(directory)
    model_class = library.model_class(library.load_config(directory), directory)
    model: PreTrainedModel = model_class.from_pretrained(str(directory), **kwargs)
    return model
