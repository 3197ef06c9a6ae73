"""Limits what a CPU keeps of products in half precision. Torch-free.

oneDNN compiles a kernel for every shape of a product, of 0.7 MiB each in bfloat16, and keeps 1024 of them; ideep, by
which torch calls it, keeps another 1024. A pass over rows of many lengths then holds a gigabyte that no plan of its
tensors counts. Both read the number from the environment at their first product.
"""

import os

# The variables of oneDNN and of ideep.
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# All products of a layer with low-rank factors, forward and back, fit into so many.
KEPT = 64
# Per kernel in both caches, with those of attention and the holes that dropped ones leave in the heap: measured 1.7.
KERNEL_BYTES = 2 << 20


def limit_primitives() -> None:
    """Let this process and its children keep few kernels, unless the user has set how many."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(KEPT))


def primitive_bytes(value_bytes: int, on_gpu: bool) -> int:
    """Bound what the kernels of a model with values of `value_bytes` take on a host that computes."""
    if on_gpu or value_bytes != 2:
        return 0
    kept = max((int(value) for name in VARIABLES if (value := os.environ.get(name, "")).isdigit()), default=KEPT)
    return kept * KERNEL_BYTES
