"""Products in half precision on a CPU that has no instructions for them.

There torch multiplies value by value. A gradient that goes back through a linear in bfloat16 was 70 times slower than
in float32 on cores with AVX2, which is all that many desktops have. Here float32 multiplies and adds up, block by
block, and each result is rounded once. Gradients of attention are computed so too, head by head: in bfloat16 they took
five times as long as in float32. What a process computes in float32 stays the same.

`torch.library.get_kernel` exists for this: a kernel of ours that calls the one below it.
Semi-private: `torch.ops.mkldnn._is_mkldnn_bf16_supported` and `_is_mkldnn_fp16_supported`.

Shapes: a (M, K) and b (K, N), or with a batch B before them; in attention B rows, H heads, T queries, S keys.
"""

import warnings
from collections.abc import Callable, Iterator, Set
from functools import cache
from typing import Any

import torch

# What an operand or a result takes in float32 at most; `primitive_bytes` counts kernels that are not made then.
BLOCK_BYTES = 8 << 20
SIDE = 1024  # rows and columns of a result at once
_VALUE_BYTES = 4
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu_backward"
_libraries: list[torch.library.Library] = []  # kernels are gone with the library that registered them


def slow_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that this CPU has no instructions for."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_supported in supported.items() if not is_supported)


@cache
def quicken_half_products() -> None:
    """Let this process multiply on the CPU by way of float32 in each dtype that is slow there; once is enough."""
    slow = slow_dtypes()
    if not slow:
        return
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name, product in _PRODUCTS.items():
            library.impl(name, _kernel(name, product, slow), "CPU", with_keyset=True)
        library.impl(ATTENTION, _attention_kernel(slow), "CPU", with_keyset=True)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices, or batches of them, in float32; round to their dtype once."""
    result = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for place, found in _blocks(a, b):
        result[place] = found
    return result


def product_added(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Return beta c + alpha a b as `product` does, with c broadcast; without c where beta is 0."""
    result = a.new_empty((*a.shape[:-1], b.shape[-1]))
    c = c.expand_as(result)
    for place, found in _blocks(a, b):
        found = found if alpha == 1 else found.mul_(alpha)
        result[place] = found if beta == 0 else found.add_(c[place], alpha=beta)
    return result


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": product,
    "bmm": product,
    "addmm": product_added,
    "baddbmm": product_added,
}


def _kernel(name: str, product: Callable[..., torch.Tensor], slow: Set[torch.dtype]) -> Callable[..., Any]:
    below = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, *tensors: torch.Tensor, **scales: float) -> Any:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) == 1 and dtypes <= slow and tensors[-2].shape[-1] == tensors[-1].shape[-2]:
            return product(*tensors, **scales)
        # Other dtypes; and what does not fit together, for torch's own error.
        return below.call_boxed(keys, *tensors, **scales)

    return kernel


def _attention_kernel(slow: Set[torch.dtype]) -> Callable[..., Any]:
    below = torch.library.get_kernel(f"aten::{ATTENTION}", "CPU")

    def kernel(keys: Any, grad: torch.Tensor, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        (key, value, out, logsumexp, *settings), mask = rest, options.pop("attn_mask", None)
        tensors = (grad, query, key, value, out)
        heads, (queries, depth), (pairs, tokens) = query.shape[1], query.shape[-2:], key.shape[1:3]
        sharing = heads // pairs
        # Of one head of keys with the heads that share it: the operands and the gradients, in float32, and masks.
        own = sharing * queries * (4 * depth + (mask is not None) * tokens)
        head_bytes = _VALUE_BYTES * (own + 4 * tokens * depth)
        if query.dtype not in slow or head_bytes > BLOCK_BYTES:
            return below.call_boxed(keys, *tensors, logsumexp, *settings, attn_mask=mask, **options)
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if mask is not None:
            mask = mask.expand(len(query), heads, queries, tokens)
        for row in range(len(query)):
            for group in _slices(pairs, BLOCK_BYTES // max(1, head_bytes)):
                shared = slice(row, row + 1), group
                place = shared[0], slice(sharing * group.start, sharing * group.stop)
                places = (place, place, shared, shared, place)
                wide = [tensor[at].float() for tensor, at in zip(tensors, places, strict=True)]
                masks = None if mask is None else mask[place].float()
                found = below.call_boxed(keys, *wide, logsumexp[place], *settings, attn_mask=masks, **options)
                for gradient, part, at in zip(gradients, found, (place, shared, shared), strict=True):
                    gradient[at] = part
        return tuple(gradients)

    return kernel


def _blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """Yield the places in the result, and what belongs there in float32."""
    values = BLOCK_BYTES // _VALUE_BYTES
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    if a.ndim == 3:
        together = values // max(1, rows * inner, inner * columns, rows * columns)
        if together:
            for group in _slices(len(a), together):
                yield (group,), torch.bmm(a[group].float(), b[group].float())
            return
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from (((number, *place), found) for place, found in _blocks(*pair))
        return
    depth = values // max(1, min(rows, SIDE), min(columns, SIDE))
    for down in _slices(rows, SIDE):
        for across in _slices(columns, SIDE):
            found = torch.zeros(len(range(rows)[down]), len(range(columns)[across]))
            for along in _slices(inner, depth):
                found.addmm_(a[down, along].float(), b[along, across].float())
            yield (down, across), found


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))
