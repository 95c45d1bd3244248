"""From the outputs of micro-batches to the numbers of one optimizer step, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megamoe.model.decoder import ModelOutput
from megamoe.parallel.collectives import gather_objects, reduce_dict
from megamoe.parallel.groups import Groups

INTERRUPTED = "interrupted"


@dataclass
class StepMetrics:
    """One optimizer step, or one validation, reduced."""

    values: dict[str, Tensor]
    """`loss`, `cross_entropy`, auxiliary losses summed over layers, and `layers.<i>.<name>`."""
    observations: dict[int, dict[str, Tensor]]
    """Per block, the sums over the global batch that update its router's statistics."""
    interrupted: bool = False
    """Whether any rank was asked to stop."""

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
    """Collects micro-batches on this rank. Nothing waits for the device until `reduce`."""

    count: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

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

    def reduce(self, groups: Groups, interrupted: bool = False) -> StepMetrics:
        """Combine micro-batches and ranks. Collective; two small all-reduces, and one exchange between stages if any.

        The results lie on the host: this is the one place of a step that waits for the device.
        """
        group = groups.stage.handle
        share = 1.0 / (max(1, self.count) * groups.stage.size)
        means = {f"mean/{name}": value * share for name, value in self.means.items()}
        added = reduce_dict(means | {f"sum/{name}": value for name, value in self.sums.items()}, group)
        flag = torch.tensor(float(interrupted), device=next(iter(self.means.values())).device)
        largest = reduce_dict(self.maxima | {INTERRUPTED: flag}, group, "max")
        added, largest = on_host(added), on_host(largest)
        stop = bool(largest.pop(INTERRUPTED) > 0)
        values = {name.removeprefix("mean/"): v for name, v in added.items() if name.startswith("mean/")}
        sums = {name.removeprefix("sum/"): v for name, v in added.items() if name.startswith("sum/")}
        values |= {name: v for name, v in sums.items() if name.startswith("layers.")} | largest
        result = StepMetrics(values, _by_layer(sums), stop)
        return result if groups.pp.size == 1 else _merged(gather_objects(result, groups.pp.handle))


def _merged(stages: list[StepMetrics]) -> StepMetrics:
    """What the stages of a pipeline saw: losses add up, blocks stand side by side."""
    values: dict[str, Tensor] = {}
    for stage in stages:
        for name, value in stage.values.items():
            values[name] = values[name] + value if name in values and not name.startswith("layers.") else value
    observations = {index: seen for stage in stages for index, seen in stage.observations.items()}
    return StepMetrics(values, observations, any(stage.interrupted for stage in stages))


def on_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, in one transfer."""
    if not values or next(iter(values.values())).device.type == "cpu":
        return values
    pieces = (
        torch.cat([v.reshape(-1).double() for v in values.values()]).cpu().split([v.numel() for v in values.values()])
    )
    return {n: piece.view(v.shape).to(v.dtype) for (n, v), piece in zip(values.items(), pieces, strict=True)}


def _add(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    into[name] = into[name] + value if name in into else value


def _by_layer(sums: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in sums.items():
        index, _, name = key.partition(".")
        if index.isdigit():
            layers.setdefault(int(index), {})[name] = value
    return layers
