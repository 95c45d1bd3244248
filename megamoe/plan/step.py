"""One optimizer step of one rank: its micro-batches, the exchange of gradients, the optimizer.

Inside an MoE layer everything is as `plan/layer.py` says; between the parts of a step nothing overlaps, as in what
runs. The parts that are not experts are sums of products, bytes and messages, less exact than the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megamoe.config import derive
from megamoe.config.stages import stage_bounds
from megamoe.config.traffic import Sent, sent_by_stage
from megamoe.config.weights import rank_weights, trained
from megamoe.plan.events import Placed, Task, run
from megamoe.plan.layer import Layer
from megamoe.plan.limits import NOTHING, Verdict, judge
from megamoe.plan.program import Program
from megamoe.plan.rates import COMPUTE, INSIDE, LINKS
from megamoe.plan.sizes import Cluster

ACTIVATIONS = 12
"""Times that norms, rotations and residuals of a block read or write a row, forward; twice that backward."""


@dataclass(frozen=True)
class Part:
    """Of a step: what it is, its kind for colours, and what a step spends on it."""

    name: str
    kind: str
    verdict: Verdict


class Step:
    """The step of a rank of the slowest pipeline stage."""

    def __init__(self, cluster: Cluster, layer: Layer) -> None:
        self.cluster, self.layer, self.rates = cluster, layer, layer.rates
        self.config = cluster.config
        self.micro_batches = derive.accumulation_steps(self.config, cluster.world_size)
        self.bounds = list(pairwise(stage_bounds(self.config)))
        self.sent = sent_by_stage(self.config, cluster.world_size)
        works = [_Stage(self, first, end, sent) for (first, end), sent in zip(self.bounds, self.sent, strict=True)]
        self.stage = max(works, key=lambda work: work.micro_batch.total)

    @cached_property
    def parts(self) -> list[Part]:
        """What the step is made of, in order; their totals are its time."""
        number, stages = self.micro_batches, len(self.bounds)
        parts = [Part(part.name, part.kind, part.verdict.times(number)) for part in self.stage.parts]
        if stages > 1:  # at the beginning and at the end of a step not all stages have a micro-batch
            waiting = self.stage.micro_batch.total * (stages - 1)
            parts.append(Part("waiting for other stages", "wait", Verdict(waiting, 0, 0, 0, NOTHING.on_link, 0)))
        return [*parts, *self.stage.ends]

    @cached_property
    def verdict(self) -> Verdict:
        """Of the whole step."""
        return sum((part.verdict for part in self.parts), NOTHING)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        training = self.config.training
        return training.global_batch_size * self.config.data.seq_length / self.verdict.total


class _Stage:
    def __init__(self, step: Step, first: int, end: int, sent: Sent) -> None:
        self.step, self.config, self.rates, self.sent = step, step.config, step.rates, sent
        self.first, self.end = first, end
        self.tokens = step.cluster.tokens()

    @cached_property
    def micro_batch(self) -> Verdict:
        """Of one of them, forward and backward."""
        return sum((part.verdict for part in self.parts), NOTHING)

    @cached_property
    def parts(self) -> list[Part]:
        """Of one micro-batch."""
        blocks = range(self.first, self.end)
        moe = sum(derive.is_moe_layer(self.config, index) for index in blocks)
        again, layer = self.config.training.recompute, self.step.layer
        found = [Part("attention", "attention", self._timed(self._attention).times(len(blocks)))]
        if moe < len(blocks):
            found.append(Part("dense blocks", "dense", self._timed(self._dense).times(len(blocks) - moe)))
        if moe:
            found.append(Part("MoE layers, forward", "experts", judge(layer.forward).times(moe)))
            if again in ("moe", "full"):
                found.append(Part("MoE layers, again", "experts", judge(layer.again).times(moe)))
            found.append(Part("MoE layers, backward", "gradients of rows", judge(layer.backward).times(moe)))
        if self.end == self.config.model.num_layers:
            found.append(Part("head and loss", "head", self._timed(self._head)))
        if "pp" in self.sent:
            found.append(self._exchanged("between stages", {"pp": self.sent["pp"]}, 1 / self.step.micro_batches))
        return found

    @cached_property
    def ends(self) -> list[Part]:
        """Once a step."""
        replicas = {axis: kinds for axis, kinds in self.sent.items() if axis in ("dp", "edp")}
        found = [self._exchanged("gradients and weights of replicas", replicas, 1.0)] if replicas else []
        return [*found, Part("optimizer", "optimizer", self._timed(self._optimizer))]

    def _timed(self, write: Callable[[Program], None]) -> Verdict:
        program = Program(self.rates)
        write(program)
        return judge(run(program.tasks, self.rates.kept()))

    def _attention(self, program: Program) -> None:
        config, parallel = self.config, self.config.parallel
        block = derive.block_parameters(config, self.first)["attention"].active
        # Positions of the matrices: gathered over tp, which cut them.
        positions = self.tokens * parallel.tp
        scores = 2.0 * config.model.num_heads * derive.head_size(config) * config.data.seq_length
        forward = positions * (2.0 * block + scores) / parallel.tp
        times = 3 + (config.training.recompute in ("attention", "full"))
        self._block(program, "attention", positions, forward, times)
        per_block = {axis: self.sent[axis] for axis in ("tp", "cp", "micro_batch") if axis in self.sent}
        share = 1.0 / self.step.micro_batches / (self.end - self.first)
        for axis, kinds in per_block.items():
            program.transfer(axis, "parts", [self._moves(axis, sum(kinds.values()) * share)], ())

    def _dense(self, program: Program) -> None:
        config, positions = self.config, self.tokens * self.config.parallel.tp
        flops = positions * 6.0 * config.model.hidden_size * config.model.ffn_size / config.parallel.tp
        self._block(program, "dense", positions, flops, 3 + (config.training.recompute == "full"))

    def _head(self, program: Program) -> None:
        config, positions = self.config, self.tokens * self.config.parallel.tp
        vocabulary = derive.vocab_size(config) / config.parallel.tp
        seconds = self.rates.product(positions, 6.0 * positions * config.model.hidden_size * vocabulary)
        # Logits in fp32: written, read for the sum, read and written for the gradient.
        program.compute("head", "head", seconds + self.rates.moved(4 * 4 * positions * vocabulary), 30)

    def _block(self, program: Program, name: str, positions: float, flops: float, times: int) -> None:
        moved = ACTIVATIONS * self.tokens * self.config.model.hidden_size * self.step.layer.size.value_bytes
        seconds = times * (self.rates.product(positions, flops) + self.rates.moved(moved))
        program.compute(name, name, seconds, 15 * times)

    def _optimizer(self, program: Program) -> None:
        config, cluster = self.config, self.step.cluster
        sharded = config.parallel.zero_stage > 0
        dense = derive.data_parallel_size(config, cluster.world_size) * config.parallel.cp if sharded else 1
        routed = derive.expert_data_parallel_size(config, cluster.world_size) if sharded else 1
        weights = trained(config, rank_weights(config, self.first, self.end))
        elements = sum(w.size / (routed if w.kind == "experts" else dense) for w in weights)
        # fp32: gradient, master and two moments are read, the last three written, and the weight.
        program.compute("optimizer", "optimizer", self.rates.moved(elements * (28 + 4)), 20)

    def _exchanged(self, name: str, sent: Sent, share: float) -> Part:
        def write(program: Program) -> None:
            for axis, kinds in sent.items():
                for size in kinds.values():
                    program.transfer(name, "replicas", [self._moves(axis, size * share)], ())

        return Part(name, "replicas", self._timed(write))

    def _moves(self, axis: str, size: float) -> dict[str, float]:
        axes = {"dp": ("dp", "cp"), "micro_batch": ("cp", "tp")}.get(axis, (axis,))
        link = self.step.cluster.link_of(*axes)
        return {name: size if name == link else 0.0 for name in LINKS}


def coarse(step: Step) -> list[Placed]:
    """The parts of a step one after the other, for a picture: of each first what is computed, then what is exposed."""
    placed, now = list[Placed](), 0.0
    for part in step.parts:
        exposed = part.verdict.exposed
        for resource, seconds, kind in (
            (COMPUTE, part.verdict.total - exposed, part.kind),
            (INSIDE, exposed, "exposed"),
        ):
            if seconds > 0:
                placed.append(Placed(Task(part.name, resource, seconds, (), kind), now, now + seconds))
                now += seconds
    return placed
