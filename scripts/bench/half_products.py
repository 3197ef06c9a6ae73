"""Times the products of a linear in half precision on this CPU, as torch takes them and by way of float32.

    python -m scripts.bench.half_products [--rows 384] [--inputs 576] [--outputs 1536]

`forward` is x W^T and `gradient` g W, in billions of multiply-adds per second. On a CPU with instructions for a dtype
nothing is replaced, and both lines of it agree.
"""

import sys
import time
from statistics import median

import torch

from onelayer.compiler.machine.half_products import quicken_half_products, slow_dtypes
from scripts.bench.options import parser_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUNS = 5


def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the median time of a product, without the first."""
    a @ b
    found = []
    for _ in range(RUNS):
        started = time.perf_counter()
        a @ b
        found.append(time.perf_counter() - started)
    return median(found)


def print_rates(name: str, rows: int, inputs: int, outputs: int) -> None:
    """Print a line for every dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    products = rows * inputs * outputs / 1e9
    for dtype in DTYPES:
        x, weight, gradient = (item.to(dtype) for item in drawn)
        forward, back = seconds(x, weight.T), seconds(gradient, weight)
        print(f"{name:16}{dtype!s:16}{products / forward:8.1f} {products / back:9.1f}", flush=True)


def main() -> int:
    """Time all dtypes twice."""
    given = parser_of(__doc__, rows=384, inputs=576, outputs=1536).parse_args()
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; without instructions:", end=" "
    )
    print(", ".join(sorted(map(str, slow_dtypes()))) or "none")
    print(f"{'products':16}{'dtype':16}{'forward':>8} {'gradient':>9}")
    print_rates("torch's", given.rows, given.inputs, given.outputs)
    quicken_half_products()
    print_rates("by float32", given.rows, given.inputs, given.outputs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
