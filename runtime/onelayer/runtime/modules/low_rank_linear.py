"""What an emulator computes with: two thin factors in the place of one weight, plain or packed; and how it is loaded.

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
    """What stands for a linear: a subclass of `nn.Linear`, since that is what PEFT attaches to, without a weight.

    `was_conv1d` says that the original module is a GPT-2 style `Conv1D`, whose weight lies the other way round;
    adapters made here note it in their configuration. `factors` are the names of the frozen tensors that stand for the
    weight.
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
        """Nothing trains what stands for the weight."""
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
        """A guard: shape, dtype and device of the weight that is not there."""
        return GuardWeight.like(self.lr_up, (self.out_features, self.in_features), self.lr_up.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, in) -> (N, out), through k."""
        return nn.functional.linear(nn.functional.linear(input, self.lr_down), self.lr_up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, as `print(model)` shows them."""
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def load_emulator(path: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """Load an emulator directory as the model class that its `architectures` names.

    The same as importing `onelayer.runtime` and calling that class's `from_pretrained(path, **kwargs)`, with the files
    checked first. Raises `InputError` where `path` is not an emulator.
    """
    from transformers import AutoConfig

    from onelayer.compiler.models.transformers_models import model_class
    from onelayer.compiler.storage.checkpoint import Checkpoint
    from onelayer.compiler.storage.files import read_json

    directory = Path(path)
    document = read_json(directory / "config.json")
    if (document.get("quantization_config") or {}).get("quant_method") != "onelayer":
        raise InputError(f"{directory}: is not an emulator; make one with `onelayer compile`")
    Checkpoint.open(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    model: PreTrainedModel = model_class(config, directory).from_pretrained(directory, **kwargs)
    return model
