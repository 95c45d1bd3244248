"""From the outputs of micro-batches to the numbers of one optimizer step, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from megamoe.model.decoder import ModelOutput
from megamoe.parallel.collectives import gather_objects, reduce_dict
from megamoe.parallel.exchanges import LayerSeconds
from megamoe.parallel.groups import Groups

NO_FLAGS: Mapping[str, bool] = MappingProxyType({})
_TOLD = "told"


@dataclass
class StepMetrics:
    """One optimizer step, or one validation, reduced."""

    values: dict[str, Tensor]
    """`loss`, `cross_entropy`, auxiliary losses summed over layers, and `layers.<i>.<name>`."""
    observations: dict[int, dict[str, Tensor]]
    """Per block, the sums over the global batch that update its router's statistics."""
    flags: dict[str, bool] = field(default_factory=dict)
    """By name, whether any rank said so."""
    busy_P: Tensor = field(default_factory=lambda: torch.zeros(0))
    """What every rank said that it was busy, seconds; 0 of those that did not say."""
    exposed_P: Tensor = field(default_factory=lambda: torch.zeros(0))
    """How long every rank stood waiting for exchanges, seconds; empty where there are none, or none is known yet."""

    def exposed(self, step_seconds: float) -> dict[str, float]:
        """`exchange.exposed_share`: part of the ranks' time in a step of that length that they stood waiting for
        exchanges; `exchange.exposed_share_least`: of the rank that waited least. That one came last, so this much is
        the link, and what the others waited longer is imbalance."""
        if not len(self.exposed_P):
            return {}
        shares = {"exposed_share": self.exposed_P.mean(), "exposed_share_least": self.exposed_P.min()}
        return {f"exchange.{name}": float(value) / step_seconds for name, value in shares.items()}

    def scalars(self) -> dict[str, float]:
        """The values that are one number."""
        return {name: float(value) for name, value in self.values.items() if value.numel() == 1}

    def worst(self, name: str) -> float:
        """Largest value of a per-layer scalar; 0 where no layer has it."""
        return max((v for n, v in self.scalars().items() if n.endswith(f".{name}")), default=0.0)

    def mean(self, name: str) -> float:
        """Mean of a per-layer scalar over layers; 0 where no layer has it."""
        found = [v for n, v in self.scalars().items() if n.endswith(f".{name}")]
        return sum(found) / len(found) if found else 0.0


@dataclass
class Accumulator:
    """Collects micro-batches on this rank. Nothing waits for the device until `reduce`.

    Attributes:
        exchanges: of this stage's blocks with experts, over all micro-batches; the same blocks on every rank. Empty:
            nothing is exchanged. None: nothing is known.
    """

    count: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    exchanges: dict[int, LayerSeconds] | None = None

    def add(self, output: ModelOutput) -> None:
        """Take in one micro-batch."""
        self.count += 1
        _add(self.means, "loss", output.loss)
        _add(self.means, "cross_entropy", output.cross_entropy)
        for index, aux in enumerate(output.layers):
            for name, value in aux.losses.items():
                _add(self.means, name, value)
            for name, value in aux.observations.items():
                _add(self.sums, f"{index}.{name}", value)
            for name, (value, reduction) in aux.metrics.items():
                self._add_metric(f"layers.{index}.{name}", value, reduction)

    def _add_metric(self, name: str, value: Tensor, reduction: str) -> None:
        if reduction == "max":
            past = self.maxima.get(name)
            self.maxima[name] = value.detach() if past is None else torch.maximum(past, value.detach())
        else:
            _add(self.means if reduction == "mean" else self.sums, name, value)

    def reduce(self, groups: Groups, flags: Mapping[str, bool] = NO_FLAGS, busy: float = 0.0) -> StepMetrics:
        """Combine micro-batches and ranks. Collective; two small all-reduces, and one exchange between stages if any.

        The results lie on the host: this is the one place of a step that waits for the device.

        Args:
            flags: what this rank has to tell all others; the same names on every rank.
            busy: seconds that this rank worked, for all to know.
        """
        group = groups.stage.handle
        share = 1.0 / (max(1, self.count) * groups.stage.size)
        means = {f"mean/{name}": value * share for name, value in self.means.items()}
        device = next(iter(self.means.values())).device
        sums = self.sums | _seconds(self.exchanges or {}, groups.stage.size, device)
        added = reduce_dict(means | {f"sum/{name}": value for name, value in sums.items()}, group)
        exposed = sum(seconds.exposed for seconds in (self.exchanges or {}).values())
        told = _told(flags, busy, exposed, groups).to(device, non_blocking=True)
        largest = reduce_dict(self.maxima | {_TOLD: told}, group, "max")
        added, largest = on_host(added), on_host(largest)
        told = largest.pop(_TOLD)
        said = dict(zip(flags, (told[: len(flags)] > 0).tolist(), strict=True))
        values = {name.removeprefix("mean/"): v for name, v in added.items() if name.startswith("mean/")}
        sums = {name.removeprefix("sum/"): v for name, v in added.items() if name.startswith("sum/")}
        values |= {name: v for name, v in sums.items() if name.startswith("layers.")} | largest
        busy_P, exposed_P = told[len(flags) :].chunk(2)
        result = StepMetrics(values, _by_layer(sums), said, busy_P, exposed_P[: 0 if self.exchanges is None else None])
        return result if groups.pp.size == 1 else _merged(gather_objects(result, groups.pp.handle))


def _merged(stages: list[StepMetrics]) -> StepMetrics:
    """What the stages of a pipeline saw: losses add up, blocks stand side by side."""
    values: dict[str, Tensor] = {}
    for stage in stages:
        for name, value in stage.values.items():
            values[name] = values[name] + value if name in values and not name.startswith("layers.") else value
    observations = {index: seen for stage in stages for index, seen in stage.observations.items()}
    flags = {name: any(stage.flags[name] for stage in stages) for name in stages[0].flags}
    busy_P = torch.stack([stage.busy_P for stage in stages]).amax(0)
    exposed_P = torch.stack([stage.exposed_P for stage in stages]).amax(0)
    return StepMetrics(values, observations, flags, busy_P, exposed_P)


def _told(flags: Mapping[str, bool], busy: float, exposed: float, groups: Groups) -> Tensor:
    """The flags, and behind them both seconds at this rank's place among all: a maximum puts those side by side."""
    size = groups.topology.world_size
    told = torch.zeros(len(flags) + 2 * size)
    told[: len(flags)] = torch.tensor([float(value) for value in flags.values()])
    told[len(flags) + groups.rank], told[len(flags) + size + groups.rank] = busy, exposed
    return told


def _seconds(exchanges: Mapping[int, LayerSeconds], num_ranks: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's share of the mean over ranks. Not the maximum: the blocks' waits of different ranks add up to what
    nobody waited, while the means add up to the ranks' time that was lost."""
    names = ("exchange_seconds", "exposed_seconds", "exposed_backward_seconds")
    keys = [f"layers.{index}.{name}" for index in exchanges for name in names]
    flat = torch.tensor([value / num_ranks for seconds in exchanges.values() for value in seconds])
    return dict(zip(keys, flat.to(device, non_blocking=True), strict=True))


def on_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, in one transfer."""
    if not values or next(iter(values.values())).device.type == "cpu":
        return values
    pieces = (
        torch.cat([v.reshape(-1).double() for v in values.values()]).cpu().split([v.numel() for v in values.values()])
    )
    return {n: piece.view(v.shape).to(v.dtype) for (n, v), piece in zip(values.items(), pieces, strict=True)}


def _add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    # In fp64, where the order of micro-batches and ranks does not matter to what training goes on with.
    value = value.detach().double()
    into[name] = into[name] + value if name in into else value


def _by_layer(sums: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in sums.items():
        index, _, name = key.partition(".")
        if index.isdigit():
            layers.setdefault(int(index), {})[name] = value
    return layers
