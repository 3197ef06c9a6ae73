"""A pretend accelerator: tensors on `pretend:0` whose values lie in host memory.

PyTorch's Python-only backend. Every operation runs on the host after a check that its tensors lie on the device, and
fails as on CUDA where they do not. `COUNTS` has the bytes held, the waits and the transfers. A transfer that does not
block (pinned memory, `non_blocking`) happens when its stream is waited for, so a forgotten wait shows in the values.
`register()` once in a process; the fixture `pretend` patches what a test needs besides.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from helpers.pretend_counts import COUNTS, PretendStream, empty_like, is_pinned, pin_memory, product_line

NAME = "pretend"
DEVICE_ERROR = "Expected all tensors to be on the same device, but found at least two devices, pretend:0 and cpu!"
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_aten = torch.ops.aten
# CUDA, too, takes indices that lie on the host.
_MIXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Operations whose result the host has to know.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_linalg_check_errors", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "item", "linalg_eigh", "_linalg_eigh", "_linalg_svd",
}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "addmm", "_linalg_eigh", "linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex"}
_kept: list[Any] = []
_own_generators: dict[int, Any] = {}


class _Memory:
    """The host storage that holds the values of a device storage; counted while it lives."""

    __slots__ = ("__weakref__", "raw", "size_bytes")

    def __init__(self, raw: torch.UntypedStorage) -> None:
        self.size_bytes = 0
        COUNTS.took(raw.nbytes())
        self.raw, self.size_bytes = raw, raw.nbytes()

    def __del__(self) -> None:
        COUNTS.gave_back(self.size_bytes)


def _on_device(cpu: torch.Tensor) -> torch.Tensor:
    """A device tensor over the storage of a host tensor that nobody else holds."""
    empty: Any = torch._C._acc.create_empty_tensor((0,), cpu.dtype)
    empty.untyped_storage()._memory = _Memory(cpu.untyped_storage())  # lives as long as the storage
    return _strided(empty, cpu)


def _strided(owner: Any, like: torch.Tensor) -> torch.Tensor:
    if owner.dtype != like.dtype:
        view = torch._C._acc.create_empty_tensor((0,), like.dtype)
        set_ = _aten.set_.source_Storage_storage_offset
        owner = set_.redispatch(_META, view, owner.untyped_storage(), 0, (0,), (1,))
    result: torch.Tensor = _aten.as_strided.default.redispatch(
        _META, owner, like.size(), like.stride(), like.storage_offset()
    )
    return result


def host_values(tensor: torch.Tensor) -> torch.Tensor:
    """The host's view of a device tensor's values."""
    memory = tensor.untyped_storage()._memory  # type: ignore[attr-defined]
    with torch._C._DisableTorchDispatch():
        out = torch.empty(0, dtype=tensor.dtype)
        out.set_(memory.raw, tensor.storage_offset(), tensor.size(), tensor.stride())
    out = out.conj() if tensor.is_conj() else out
    return torch._neg_view(out) if tensor.is_neg() else out


def _is_ours(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


class _Call:
    """One operation on its way to the host and back."""

    def __init__(self, op: Any) -> None:
        self.name = op._schema.name.removeprefix("aten::")
        self.owners: dict[int, torch.Tensor] = {}
        self.hosts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.is_mixed = False

    def to_host(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if _is_ours(value):
                if id(value) not in self.hosts:
                    self.hosts[id(value)] = (value, host_values(value))
                    self.owners[value.untyped_storage()._memory.raw._cdata] = value  # type: ignore[attr-defined]
                return self.hosts[id(value)][1]
            self.is_mixed |= value.device.type == "cpu" and value.dim() > 0
            return value
        if isinstance(value, list | tuple):
            return type(value)(self.to_host(item) for item in value)
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if isinstance(value, _RealGenerator) and value._cdata not in _own_generators:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        return value

    def to_device(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            for tensor, host in self.hosts.values():
                if host is value:
                    return tensor
            owner = self.owners.get(value.untyped_storage()._cdata)
            return _on_device(value) if owner is None else _strided(owner, value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.to_device(item) for item in value))
        if isinstance(value, list | tuple):
            return type(value)(self.to_device(item) for item in value)
        return value


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    call = _Call(op)
    args = tuple(call.to_host(item) for item in args)
    kwargs = {name: call.to_host(item) for name, item in kwargs.items()}
    if call.is_mixed and call.name not in _MIXED and (call.owners or not call.name.startswith("_to_")):
        raise RuntimeError(f"{DEVICE_ERROR} (in {op._schema.name})")
    if call.name in _WAITING:
        COUNTS.wait(call.name)
    if call.name in _PRODUCTS and any(t.dtype == torch.float64 for _, t in call.hosts.values()):
        COUNTS.double_products[product_line()] += 1
    shapes = {key: (host.size(), host.stride()) for key, (_, host) in call.hosts.items()}
    kinds = [str(item.type) for item in op._schema.arguments]
    args = tuple(
        torch.tensor(item) if kind == "Tensor" and type(item) in (bool, int, float) else item
        for item, kind in zip(args, kinds, strict=False)
    )
    if call.name == "histc" and not args[0].is_floating_point():  # CUDA has it for integers
        out = op(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        out = op(*args, **kwargs)
    for key, (tensor, host) in call.hosts.items():
        if (host.size(), host.stride()) != shapes[key]:
            _resize(tensor, host)
    return call.to_device(out)


def _resize(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Follow an operation that gave its `out=` argument another shape."""
    memory = tensor.untyped_storage()._memory  # type: ignore[attr-defined]
    COUNTS.took(memory.raw.nbytes() - memory.size_bytes)
    memory.size_bytes = memory.raw.nbytes()
    set_ = _aten.set_.source_Storage_storage_offset
    set_.redispatch(_META, tensor, tensor.untyped_storage(), host.storage_offset(), host.size(), host.stride())


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    from_host, to_host = (not _is_ours(tensor) for tensor in (source, target))
    read, written = (host_values(tensor) if _is_ours(tensor) else tensor for tensor in (source, target))
    if from_host == to_host:
        written.copy_(read)
        return target
    host_side = source if from_host else target
    later = non_blocking and is_pinned(host_side) and source.dtype == target.dtype
    direction = "to device" if from_host else "to host"
    COUNTS.transfers[direction if later else f"{direction}, blocking", product_line()] += 1
    if not later:
        if to_host:
            COUNTS.wait("copy to host")
        COUNTS.stream_now.drain()
        written.copy_(read)
        return target
    if written.is_floating_point():
        written.fill_(float("nan"))
    stream: PretendStream = COUNTS.stream_now
    # Work on the default stream is done in order, at once; only a side stream lags, and what comes back to the host.
    if from_host and stream is COUNTS.default_stream_:
        written.copy_(read)
    elif stream is COUNTS.default_stream_:
        stream.waiting.append(partial(_copy_later, written, read.clone(), (target,)))
    else:
        stream.waiting.append(partial(_copy_later, written, read, (source, target)))
    return target


def _copy_later(written: torch.Tensor, read: torch.Tensor, kept: Any) -> None:
    written.copy_(read)


def _convolution(op: Any) -> Any:
    """CUDA's convolutions have entries of their own."""

    def run(*args: Any) -> Any:
        call = _Call(op)
        hosts = [call.to_host(item) for item in args]
        if call.is_mixed:
            raise RuntimeError(f"{DEVICE_ERROR} (in a convolution)")
        if op is _aten.convolution_backward.default:
            weight, transposed, groups = hosts[2], hosts[6], hosts[8]
            hosts.insert(3, [weight.shape[1] * groups if transposed else weight.shape[0]])
        return call.to_device(op(*hosts))

    return run


def _empty(size: Any, dtype: Any = None, stride: Any = None, memory_format: Any = None) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    if stride is not None:
        return _on_device(torch.empty_strided(size, stride, dtype=dtype))
    return _on_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def register() -> None:
    """Make the device known to PyTorch; once in a process."""
    if _kept:
        return
    # bitsandbytes compiles what it has no kernel for: for minutes, or it fails at once. A real device has kernels.
    torch.compiler.set_stance("force_eager")
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=COUNTS)
    own, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _kept.extend((own, everything))
    everything.fallback(_fallback, "PrivateUse1")
    set_ = _aten.set_.source_Storage_storage_offset

    def set_storage(self: Any, source: Any, offset: int = 0, size: Any = None, stride: Any = ()) -> Any:
        return set_.redispatch(_META, self, source, offset, size, stride)

    def set_tensor(self: Any, source: Any) -> Any:
        return set_storage(self, source.untyped_storage(), source.storage_offset(), source.size(), source.stride())

    def as_strided(self: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
        offset = self.storage_offset() if storage_offset is None else storage_offset
        return _aten.as_strided.default.redispatch(_META, self, size, stride, offset)

    def empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **rest: Any) -> Any:
        return _empty(size, dtype, None, rest.get("memory_format"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, **rest: Any) -> Any:
        return _empty(size, dtype, stride)

    kernels = {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "_copy_from": _copy_from,
        "_copy_from_and_resize": _copy_from,
        "set_.source_Storage_storage_offset": set_storage,
        "set_.source_Tensor": set_tensor,
        "as_strided": as_strided,
        "convolution_overrideable": _convolution(_aten.convolution.default),
        "convolution_backward_overrideable": _convolution(_aten.convolution_backward.default),
    }
    for name, kernel in kernels.items():
        own.impl(name, kernel, "PrivateUse1")


_RealGenerator: Any = torch.Generator
_real_data: Any = torch.Tensor.data
_real_cpu: Any = torch.UntypedStorage.cpu


class _GeneratorMeta(type):
    def __instancecheck__(cls, item: Any) -> bool:
        return isinstance(item, _RealGenerator)


class AnyGenerator(metaclass=_GeneratorMeta):
    """Generators of the device, which serve only there, as on CUDA; all others are PyTorch's own."""

    def __new__(cls, device: Any = "cpu") -> Any:
        """Make a generator."""
        if torch.device(device).type != NAME:
            return _RealGenerator(device)
        made = _RealGenerator()
        _own_generators[made._cdata] = made  # kept: an address must not serve twice
        return made


def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    """Let `parameter.data = ...` change the device, which PyTorch allows for CUDA and not for this backend."""
    if self.device.type != value.device.type and NAME in (self.device.type, value.device.type):
        torch._C._swap_tensor_impl(self, value.detach().requires_grad_(self.requires_grad))
    else:
        _real_data.__set__(self, value)


def _storage_cpu(self: Any) -> Any:
    memory = getattr(self, "_memory", None)  # pickling wants the host's copy
    return _real_cpu(self) if memory is None else memory.raw.clone()


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the device, and give PyTorch for one test what a backend in C++ would have."""
    register()
    monkeypatch.setattr(torch, "Generator", AnyGenerator)
    monkeypatch.setattr(torch.Tensor, "data", property(lambda self: _real_data.__get__(self), _set_data))
    monkeypatch.setattr(torch.UntypedStorage, "cpu", _storage_cpu)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    COUNTS.reset()
