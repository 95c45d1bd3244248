"""What this GPU reaches at most: a copy and a bf16 matrix product of random data, over buffers beyond its cache.

python -m kernels.bench.ceilings --out FOLDER [--smoke]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels.bench import draw
from kernels.bench.results import write_part
from kernels.bench.run import device_of, parser
from kernels.bench.timing import Timed, measure

COPY_ELEMENTS, MATRIX = 1 << 29, 8192
SMOKE_ELEMENTS, SMOKE_MATRIX = 1 << 12, 64


def ceilings(device: torch.device, elements: int, side: int) -> dict[str, Any]:
    """Rates of both, with the times they come from; bytes of a copy count read and written."""
    copy, product = measure_copy(device, elements), measure_product(device, side)
    return {
        "copy": {"bytes": 4 * elements, "bytes_per_second": _rate(4 * elements, copy), **copy.to_json()},
        "matmul": {"side": side, "flops_per_second": _rate(2 * side**3, product), **product.to_json()},
    }


def measure_copy(device: torch.device, elements: int) -> Timed:
    """One bf16 tensor into another."""
    sources = [draw.rows(1, elements, draw.generator(device, number)) for number in range(draw.SETS)]
    calls = [partial(torch.empty_like(source).copy_, source) for source in sources]
    return measure({"copy": calls}, device)["copy"]


def measure_product(device: torch.device, side: int) -> Timed:
    """Square bf16 matrices."""
    streams = [draw.generator(device, number) for number in range(draw.SETS)]
    pairs = [(draw.rows(side, side, stream), draw.rows(side, side, stream)) for stream in streams]
    return measure({"matmul": [partial(torch.mm, a, b) for a, b in pairs]}, device)["matmul"]


def _rate(amount: int, timed: Timed) -> float | None:
    return amount / (timed.best / 1e6) if timed.best else None


def main() -> None:
    args = parser("Measure the ceilings.").parse_args()
    device = device_of(args.smoke)
    sizes = (SMOKE_ELEMENTS, SMOKE_MATRIX) if args.smoke else (COPY_ELEMENTS, MATRIX)
    found = ceilings(device, *sizes)
    write_part(args.out, "ceilings", found)
    copy, matmul = found["copy"]["bytes_per_second"], found["matmul"]["flops_per_second"]
    print(f"copy   {copy / 1e9:.0f} GB/s" if copy else f"copy   {found['copy']['status']}")
    print(f"matmul {matmul / 1e12:.0f} TFLOP/s" if matmul else f"matmul {found['matmul']['status']}")


if __name__ == "__main__":
    main()
