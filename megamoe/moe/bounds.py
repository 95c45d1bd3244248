"""Capacity: how many rows an expert may keep of a micro-batch, fixed or following training.

A bound is an estimate of the previous optimizer steps, moved once per step from sums over the whole global batch. So
it is the same number on all ranks without a further message, and known to the host before the forward pass begins.
(Ours, for a maximum over the group: ranks cannot differ, and none waits for another.)
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megamoe.config.moe import CapacityConfig

LARGEST_SAMPLE = 1 << 15
"""Affinities of a micro-batch that a bound looks at, in rows evenly spread. An average over many steps needs no more,
and looking at those of 64 experts would cost more than choosing them."""
SIZES = 16
"""Padded exchanges have at most about this many different sizes."""
BINS = 256


class Limits(NamedTuple):
    """What one micro-batch may keep."""

    per_expert_E: Tensor
    """int64 [E]: C_i, rows that expert i keeps at most."""
    slots: int | None
    """Rows per expert of a padded exchange: the largest C_i, rounded up; the same on all ranks of equal T.
    None: a rank's part of what an expert keeps has no bound of its own."""


class StaticBound(nn.Module):
    """C = ceil(cf * K * T / E), and what all bounds share.

    Every bound is clamped to [max(8, ceil(minimum * K * T / E)), ceil(cf * K * T / E)] and to T (ours: with fewer rows
    an expert has no usable gradient; above the static capacity a bound would only cost).
    """

    def __init__(self, config: CapacityConfig, num_experts: int, top_k: int, hidden_size: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k, self.hidden_size = config, num_experts, top_k, hidden_size
        self._limits: dict[tuple[int, torch.device], Limits] = {}

    def limits(self, num_tokens: int, device: torch.device) -> Limits:
        """The limits of a micro-batch of T rows."""
        key = (num_tokens, device)
        if key not in self._limits:
            capacities = self.capacities(num_tokens)
            limits_E = torch.tensor(capacities)
            if device.type == "cuda":  # a copy from pinned memory does not wait
                limits_E = limits_E.pin_memory().to(device, non_blocking=True)
            self._limits[key] = Limits(limits_E.to(device), self._slots(max(capacities), num_tokens))
        return self._limits[key]

    def capacities(self, num_tokens: int) -> list[int]:
        """C_i of every expert, clamped."""
        balanced = Fraction(self.top_k * num_tokens, self.num_experts)
        # Exact, with the numbers as they are written: in floating point 1.1 * 50 is a little more than 55.
        static = _decimal(self.config.factor) * balanced
        least = max(8, math.ceil(_decimal(self.config.minimum) * balanced))
        most = max(least, math.ceil(static))
        return [min(num_tokens, most, max(least, wanted)) for wanted in self.wanted(static, most)]

    def wanted(self, static: Fraction, most: int) -> list[int]:
        """C_i of every expert before the clamps; `most` where a bound is not finite."""
        return [math.ceil(static)] * self.num_experts

    def observe(self, affinity_TE: Tensor) -> dict[str, Tensor]:
        """Sums over this micro-batch, from affinities fp32 [T, E]."""
        return {}

    def update(self, observations: dict[str, Tensor]) -> None:
        """Move the estimate by one optimizer step, from the sums over the global batch (on the host)."""

    def metrics(self) -> dict[str, Tensor]:
        """The estimate, for the log."""
        return {}

    def _slots(self, capacity: int, num_tokens: int) -> int:
        """Rounded up to the tile, in steps so coarse that only about SIZES sizes occur: buffers are then reused."""
        tile = self.config.tile
        static = math.ceil(_decimal(self.config.factor) * self.top_k * num_tokens / self.num_experts)
        step = tile * max(1, math.ceil(static / SIZES / tile))
        return min(num_tokens, math.ceil(capacity / step) * step)


class _FollowingBound(StaticBound):
    """A bound with an estimate: a buffer on the device, for checkpoints, and its copy on the host.

    The copy holds as long as nobody wrote into the buffers, which torch counts; so a loaded checkpoint is noticed,
    however it was loaded.
    """

    num_updates: Tensor
    estimate: Tensor

    def __init__(self, config: CapacityConfig, num_experts: int, top_k: int, hidden_size: int, size: int) -> None:
        super().__init__(config, num_experts, top_k, hidden_size)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("estimate", torch.zeros(size, dtype=torch.float32))
        self._host: tuple[int, list[float]] = 0, [0.0] * size
        self._written = self._writes()

    def limits(self, num_tokens: int, device: torch.device) -> Limits:
        self.state()
        return super().limits(num_tokens, device)

    def state(self) -> tuple[int, list[float]]:
        """Number of updates and the estimate. Waits for the device once after a checkpoint was loaded, never else."""
        if self._written != self._writes():
            self._keep(int(self.num_updates), self.estimate.tolist())
        return self._host

    def _writes(self) -> tuple[int, int]:
        return self.num_updates._version, self.estimate._version

    def _keep(self, updates: int, estimate: list[float]) -> None:
        self._host, self._written = (updates, estimate), self._writes()
        self._limits.clear()

    def following(self) -> bool:
        """Whether there is an estimate and the warm-up is over."""
        return self.state()[0] >= max(1, self.config.warmup_steps)

    def move(self, fresh: list[float], momentum: float) -> None:
        """One step of the moving average. The first one is taken whole: there is no past to keep."""
        updates, past = self.state()
        keep = momentum if updates else 0.0
        moved = [keep * old + (1 - keep) * new for old, new in zip(past, fresh, strict=True)]
        rounded = torch.tensor(moved, dtype=torch.float32)
        self.estimate.copy_(rounded, non_blocking=True)
        self.num_updates.add_(1)
        # The host goes on from what the buffer holds, so that a resumed run continues with the same numbers.
        self._keep(updates + 1, rounded.tolist())


class LocMoEBound(_FollowingBound):
    """LocMoE's theorem (arXiv 2401.13920): C >= 1 / (E * erfc(sqrt(x))), x = d^2 D / (2 - d^2).

    d is the affinity between a token and its expert; ours: its mean over tokens and their first choices. In practice a
    switch between floor and ceiling, since x is about (d sqrt(D))^2 / 2. Estimated in the first step, then frozen.
    """

    frozen = True

    def __init__(self, config: CapacityConfig, num_experts: int, top_k: int, hidden_size: int) -> None:
        super().__init__(config, num_experts, top_k, hidden_size, size=1)

    def observe(self, affinity_TE: Tensor) -> dict[str, Tensor]:
        first_T = sample(affinity_TE).amax(-1)
        return {"first_affinity": first_T.sum()[None], "first_count": first_T.new_full((1,), first_T.numel())}

    def update(self, observations: dict[str, Tensor]) -> None:
        if self.frozen and self.state()[0]:
            return
        mean = float(observations["first_affinity"] / observations["first_count"].clamp_min(1))
        self.move([exponent(mean, self.hidden_size)], self.config.momentum)

    def wanted(self, static: Fraction, most: int) -> list[int]:
        if not self.following():
            return [math.ceil(static)] * self.num_experts
        bound = locmoe_bound(self.state()[1][0], self.num_experts)
        return [math.ceil(min(bound, most))] * self.num_experts

    def following(self) -> bool:
        # Frozen after its first step, it has no later one to count.
        return self.state()[0] > 0 if self.frozen else super().following()

    def metrics(self) -> dict[str, Tensor]:
        return {"bound_exponent": self.estimate.mean()}


class EtrBound(LocMoEBound):
    """The same bound, re-estimated as the distribution of tokens evolves (arXiv 2406.00023)."""

    frozen = False


class EtrSuccessBound(_FollowingBound):
    """C_i = ceil(cf * (K * T / E) * q_i / q_0) (ours, from Theorem 5 of arXiv 2406.00023).

    The theorem: expert choice succeeds once C >= 2 s q_i, with q_i the chance that a token that is not expert i's
    outranks one that is. q_i is 1 - AUC of "the token's first choice is i" by affinity to i, from a histogram;
    isotropic tokens give q_0 = 1 / (2 (E + 1)). So it begins at the static capacity and shrinks as experts tell their
    tokens apart. It looks at affinities, also where experts rank their tokens by something else.
    """

    def __init__(self, config: CapacityConfig, num_experts: int, top_k: int, hidden_size: int) -> None:
        super().__init__(config, num_experts, top_k, hidden_size, size=num_experts)

    def observe(self, affinity_TE: Tensor) -> dict[str, Tensor]:
        misranked_E, pairs_E = misranked_pairs(sample(affinity_TE), self.hidden_size)
        # Both as shares of a micro-batch's pairs, which fp32 can add up however many tokens there are.
        scale = 1.0 / max(1, affinity_TE.shape[0]) ** 2
        return {"misranked": misranked_E * scale, "pairs": pairs_E * scale}

    def update(self, observations: dict[str, Tensor]) -> None:
        misranked, pairs = observations["misranked"].tolist(), observations["pairs"].tolist()
        unseen = self.state()[1] if self.state()[0] else [self.isotropic] * self.num_experts
        # An expert that nobody chose, or everybody, ranked nothing: its estimate stays.
        fresh = [m / p if p > 0 else old for m, p, old in zip(misranked, pairs, unseen, strict=True)]
        self.move(fresh, self.config.momentum)

    @property
    def isotropic(self) -> float:
        """q_0."""
        return 1.0 / (2 * (self.num_experts + 1))

    def wanted(self, static: Fraction, most: int) -> list[int]:
        if not self.following():
            return [math.ceil(static)] * self.num_experts
        return [math.ceil(static * Fraction(q / self.isotropic)) for q in self.state()[1]]

    def metrics(self) -> dict[str, Tensor]:
        return {"misranking": self.estimate.clone()}


BOUNDS: dict[str, type[StaticBound]] = {
    "static": StaticBound,
    "locmoe": LocMoEBound,
    "etr_bound": EtrBound,
    "etr_success": EtrSuccessBound,
}


def build_bound(config: CapacityConfig, num_experts: int, top_k: int, hidden_size: int) -> StaticBound | None:
    """The bound that `moe.capacity` describes; None: dropless."""
    if config.mode == "dropless":
        return None
    return BOUNDS[config.mode](config, num_experts, top_k, hidden_size)


def exponent(affinity: float, hidden_size: int) -> float:
    """x = d^2 D / (2 - d^2)."""
    return affinity**2 * hidden_size / (2 - affinity**2)


def locmoe_bound(x: float, num_experts: int) -> float:
    """1 / (E * erfc(sqrt(x))); infinite where erfc is below what a float holds."""
    tail = math.erfc(math.sqrt(x))
    return 1 / (num_experts * tail) if tail > 0 else math.inf


def sample(rows_TE: Tensor) -> Tensor:
    """Rows with at most LARGEST_SAMPLE values in all, evenly spread, without gradient."""
    stride = max(1, math.ceil(rows_TE.numel() / LARGEST_SAMPLE))
    return rows_TE.detach()[::stride]


def misranked_pairs(affinity_TE: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """For each expert, the pairs (a token that it is the first choice of, another token), and how many rank wrongly.

    A pair ranks wrongly if the other token has the higher affinity to the expert; in one bin counts half. The bins are
    even in asinh(affinity * sqrt(D)): fine around 0, where affinities of random tokens differ by 1 / sqrt(D), and wide
    enough for an affinity of 1. (AUC does not change under monotone maps.)

    Returns:
        misranked_E, pairs_E, fp32.
    """
    num_experts = affinity_TE.shape[1]
    root = math.sqrt(hidden_size)
    scaled_TE = torch.asinh(affinity_TE.float() * root) * (BINS / (2 * math.asinh(root))) + BINS / 2
    bins_TE = scaled_TE.long().clamp_(0, BINS - 1)
    own_TE = (affinity_TE.argmax(-1, keepdim=True) == torch.arange(num_experts, device=affinity_TE.device)).to(
        torch.long
    )
    # One histogram per expert and side: index (side, expert, bin).
    place_TE = (own_TE * num_experts + torch.arange(num_experts, device=affinity_TE.device)) * BINS + bins_TE
    # Not bincount: on a GPU it would make the host wait.
    counts = torch.zeros(2 * num_experts * BINS, device=affinity_TE.device)
    counts.scatter_add_(0, place_TE.flatten(), torch.ones_like(affinity_TE, dtype=torch.float32).flatten())
    others_EB, own_EB = counts.view(2, num_experts, BINS)
    above_EB = others_EB.sum(-1, keepdim=True) - others_EB.cumsum(-1) + others_EB / 2
    return (own_EB * above_EB).sum(-1), own_EB.sum(-1) * others_EB.sum(-1)


def _decimal(value: float) -> Fraction:
    return Fraction(str(value))
