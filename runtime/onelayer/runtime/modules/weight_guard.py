"""The stand-in for a weight that no longer exists: it answers metadata and refuses every computation.

A `CompressedLinear` is an `nn.Linear` to other libraries, and PEFT, Trainer and accelerate read `.weight` of such
modules for its shape, dtype and device. The product of the factors would cost a full matrix at each access, and a
merge, DoRA or PiSSA would silently write into a temporary and give wrong numbers. So the guard has no storage and
raises.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from onelayer.compiler.errors import InputError

# The metadata that a guard answers. Properties arrive as the `__get__` of their descriptors.
_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf is_meta is_cpu is_cuda is_xpu is_mps is_sparse is_quantized "
    "is_nested grad grad_fn itemsize nbytes"
)
_METHODS = (
    "size dim ndimension numel nelement element_size stride is_floating_point is_complex is_contiguous get_device "
    "__len__ __hash__"
)
_METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()]
    + [getattr(torch.Tensor, name) for name in _METHODS.split()]
)
# PEFT and diffusers read shapes from `weight.data`, which is the guard again.
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_MESSAGE = (
    "this module of an emulator holds two low-rank factors and no weight (or packed bytes), so {operation} cannot use "
    "its weight; "
    "merging, DoRA, PiSSA and the like need the original: correct the adapter with `onelayer correct`, merge it there"
)


def _rebuilt(shape: Sequence[int], dtype: torch.dtype) -> "GuardWeight":
    return GuardWeight.like(torch.empty(()), shape, dtype)


class GuardWeight(torch.Tensor):
    """A tensor with a shape (out, in), a dtype and a device, and no numbers."""

    # transformers' initializers skip a tensor with this mark; GPT-2's initializer uses its children's weights by name.
    _is_hf_initialized = True

    @classmethod
    def like(cls, factor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> "GuardWeight":
        """Return a guard of the given shape and dtype, on the device of `factor`."""
        return factor.new_empty((), dtype=dtype).expand(*shape).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer metadata; refuse everything else."""
        if func == _DATA:
            return args[0]
        if func not in _METADATA:
            raise InputError(_MESSAGE.format(operation=getattr(func, "__name__", str(func))))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> "GuardWeight":
        """Return the guard itself: it has nothing to copy."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the shape and dtype, which are the whole state."""
        return _rebuilt, (tuple(self.shape), self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # printing a model must not raise
        return f"GuardWeight({tuple(self.shape)}, {self.dtype}, {self.device})"
