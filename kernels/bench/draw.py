"""Inputs of measurements: random data, never zeros, which run faster than real data would."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from kernels.bench.model import Shape

SEED = 20_240_611
SETS = 3
"""Input sets that a measurement rotates over."""
SMALLEST_SETS_BYTES = 512 << 20
"""Input sets together: far beyond an L2 cache of 60 MB."""
MOST_SETS = 12


def generator(device: torch.device, number: int = 0) -> Generator:
    """The stream of input set `number`."""
    return Generator(device=device).manual_seed(SEED + number)


def number_of_sets(bytes_per_set: int, device: torch.device) -> int:
    """As many as make the caches useless; on a CPU one, because nothing is timed there."""
    if device.type != "cuda":
        return 1
    return min(MOST_SETS, max(SETS, -(-SMALLEST_SETS_BYTES // max(1, bytes_per_set))))


def rows(count: int, width: int, stream: Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows [count, width]."""
    return torch.randn(count, width, generator=stream, device=stream.device, dtype=torch.float32).to(dtype)


def choices(shape: Shape, stream: Generator, routing: str = "natural") -> Tensor:
    """int64 [T, K], the experts of each token, all different.

    natural: top-k of random scores of which some experts have more than others, as a router's are. balanced: in turns.
    """
    device = stream.device
    if routing == "balanced":
        turns = torch.arange(shape.rows, device=device)
        return (turns % shape.experts).view(shape.tokens, shape.top_k)
    scores = torch.randn(shape.tokens, shape.experts, generator=stream, device=device)
    favour = 0.5 * torch.randn(shape.experts, generator=stream, device=device)
    return (scores + favour).topk(shape.top_k, dim=-1).indices


def weights(shape: Shape, stream: Generator) -> Tensor:
    """fp32 [T, K], adding up to 1 for each token."""
    return torch.rand(shape.tokens, shape.top_k, generator=stream, device=stream.device).softmax(-1)
