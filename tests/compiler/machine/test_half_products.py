"""Products in half precision by way of float32: the values, and what a process computes once they are in place."""

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from helpers.children import fork_server
from onelayer.compiler.machine import half_products
from onelayer.compiler.machine.half_products import product, product_added, quicken_half_products, slow_dtypes

HALVES = (torch.bfloat16, torch.float16)
SIZES = [((5, 7), (7, 3)), ((1, 40), (40, 9)), ((3, 5, 7), (3, 7, 4)), ((0, 4), (4, 2)), ((2, 0), (0, 3))]


def random(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check_rounded_once(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Check that values in half precision are those of a float32 reference up to one rounding."""
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.float(), wanted, rtol=torch.finfo(found.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("a_shape", "b_shape"), SIZES)
@pytest.mark.parametrize("block_bytes", [16, 1 << 8, 1 << 20])
def test_blocks_give_the_product_in_float32_rounded_once(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    block_bytes: int,
) -> None:
    monkeypatch.setattr(half_products, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(half_products, "SIDE", max(1, math.isqrt(block_bytes // 8)))
    c_shape = (1, b_shape[-1]) if len(a_shape) == 2 else (3, a_shape[1], b_shape[-1])
    a, b, c = random(a_shape, b_shape, c_shape, dtype=dtype)
    exact = a.float() @ b.float()
    check_rounded_once(product(a, b), exact)
    check_rounded_once(product_added(c, a, b), c.float() + exact)
    check_rounded_once(product_added(c, a, b, beta=0.5, alpha=-2), 0.5 * c.float() - 2 * exact)
    unread = torch.full_like(c, torch.nan)
    check_rounded_once(product_added(unread, a, b, beta=0), exact)


def figures_of_a_slow_cpu() -> dict[str, Any]:
    """Compute before and after products by way of float32 are in place, as on a CPU that needs them."""
    torch.set_num_threads(1)
    torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False  # type: ignore[attr-defined]
    x, weight, bias = random((2, 3, 64), (32, 64), (32,), dtype=torch.float32)
    before = torch.nn.functional.linear(x, weight, bias)
    calls = list[torch.dtype]()
    blocks = half_products._blocks

    def counted(a: torch.Tensor, b: torch.Tensor) -> Any:
        calls.append(a.dtype)
        return blocks(a, b)

    half_products._blocks = counted
    quicken_half_products()
    quicken_half_products()
    same = torch.equal(before, torch.nn.functional.linear(x, weight, bias))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [item.to(torch.bfloat16).to(dtype).requires_grad_() for item in (x, weight, bias)]
        y = torch.nn.functional.linear(*leaves)
        scores = torch.matmul(y, y.transpose(1, 2))
        results[dtype] = [y.detach(), scores.detach(), *torch.autograd.grad(scores.sum() + y.sum(), leaves)]
    pairs = zip(results[torch.bfloat16], results[torch.float32], strict=True)
    errors = [float((half.float() - whole).norm() / whole.norm()) for half, whole in pairs]
    refused = 0
    for left, right in ((x[0].bfloat16(), weight.bfloat16()), (x[0].bfloat16(), weight.T)):
        try:
            torch.mm(left, right)
        except RuntimeError:
            refused += 1
    return {"same": same, "dtypes": {str(item) for item in calls}, "errors": errors, "refused": refused}


def test_a_process_on_a_slow_cpu_multiplies_by_way_of_float32() -> None:
    run: Callable[[], dict[str, Any]] = figures_of_a_slow_cpu
    with ProcessPoolExecutor(1, mp_context=fork_server()) as pool:
        found = pool.submit(run).result(timeout=100)
    assert found["same"]
    assert found["dtypes"] == {"torch.bfloat16"}
    assert max(found["errors"]) < 4e-3
    assert found["refused"] == 2


def gradients_of_attention(block_bytes: int, masked: bool, heads: int) -> list[bool]:
    """Tell which gradients in bfloat16 are those in float32, rounded once, on a CPU that needs that."""
    torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False  # type: ignore[attr-defined]
    quicken_half_products()
    half_products.BLOCK_BYTES = block_bytes
    aten = torch.ops.aten
    halves = random((2, heads, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8), (2, heads, 5, 8), dtype=torch.bfloat16)
    mask = random((2, 1, 5, 6), dtype=torch.bfloat16)[0] if masked else None
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*halves[:3], attn_mask=mask)

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        query, key, value, grad, result = (item.to(dtype) for item in (*halves, out))
        added = None if mask is None else mask.to(dtype)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found: tuple[torch.Tensor, ...] = backward(
            grad, query, key, value, result, logsumexp, 0.0, False, attn_mask=added, scale=0.3
        )
        return found

    pairs = zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True)
    return [torch.equal(half, wide.bfloat16()) for half, wide in pairs]


@pytest.mark.parametrize(("block_bytes", "is_ours"), [(8 << 20, True), (3000, True), (100, False)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [3, 6])
def test_attention_on_a_slow_cpu_has_gradients_rounded_once(
    block_bytes: int, is_ours: bool, masked: bool, heads: int
) -> None:
    with ProcessPoolExecutor(1, mp_context=fork_server()) as pool:
        found = pool.submit(gradients_of_attention, block_bytes, masked, heads).result(timeout=100)
    assert all(found) == is_ours


def test_torch_still_tells_what_it_has_no_instructions_for() -> None:
    assert slow_dtypes() <= set(HALVES)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        assert torch.bfloat16 in slow_dtypes()
