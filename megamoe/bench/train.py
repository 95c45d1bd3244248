"""`bench train`: tokens per second of a recipe, against the same model with deepspeed.moe.MoE layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.bench import allocator
from megamoe.bench.conditions import conditions
from megamoe.bench.contestants import OURS, LayerShape, deepspeed_moe
from megamoe.bench.quiet import wait_for_quiet
from megamoe.bench.report import as_table, closing, in_words, target
from megamoe.bench.rounds import in_turns, ratios, spread
from megamoe.common.log import setup_logging
from megamoe.config import derive
from megamoe.config.load import dump_config
from megamoe.config.routers import AuxiliaryLosses
from megamoe.config.run import RunConfig
from megamoe.data.batch import Batch
from megamoe.model.decoder import Decoder
from megamoe.model.initialise import initialise
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel, Placement
from megamoe.moe.types import LayerAux
from megamoe.parallel.collectives import barrier
from megamoe.testing.ranks import run_ranks
from megamoe.training.engine import Engine
from megamoe.training.setup import Runtime, distributed
from megamoe.training.step import train_step

PEERS = {"deepspeed no drop": False, "deepspeed capacity 1.25": True}
"""Variants of DeepSpeed's layer: whether it drops tokens over the capacity."""
TIMEOUT_SECONDS = 7200.0

Measured = tuple[str, dict[str, float], dict[str, float], dict[str, list[float]]]


@dataclass(frozen=True)
class TrainSettings:
    """One run of the benchmark: each contestant trains `steps` optimizer steps per turn."""

    ranks: int = 2
    steps: int = 4
    rounds: int = 10
    warmup: int = 1
    keep_freed_memory: bool = False
    patience: float = 0.0


def bench_train(config: RunConfig, settings: TrainSettings, note: str = "") -> dict[str, Any]:
    """Train on random tokens, in one group of processes, the contestants in turns.

    Returns:
        A JSON-able report: settings, conditions, tokens per second, and the ratios of ours to each of the others in
        the same round.
    """
    where = conditions(note)
    state, others, losses, seconds = run_ranks(
        _measure, settings.ranks, config, settings, timeout=TIMEOUT_SECONDS, init=False
    )[0]
    tokens = settings.steps * config.training.global_batch_size * config.data.seq_length
    speed = {name: [tokens / second for second in own] for name, own in seconds.items()}
    results: list[dict[str, Any]] = [
        {
            "contestant": name,
            "tokens_per_second": spread(own)._asdict(),
            "megamoe_over_this": ratios(speed[OURS], own)._asdict(),
            "last_loss": losses[name],
        }
        for name, own in speed.items()
    ]
    return {
        "benchmark": "train",
        "settings": asdict(settings),
        "config": dump_config(config),
        "conditions": where | {"allocator": state, "others_before_rounds": others},
        "results": results,
        "targets": [
            target(f"tokens/s of megamoe over {r['contestant']}", 1.0, r["megamoe_over_this"]["median"], at_least=True)
            for r in results
            if r["contestant"] != OURS
        ],
    }


def _measure(config: RunConfig, settings: TrainSettings) -> Measured:
    """On every rank: the allocator's state, others' use of the CPUs, last losses, and seconds per round."""
    warnings.simplefilter("ignore")
    setup_logging()
    state = allocator.prepare(settings.keep_freed_memory)
    with distributed(config.parallel, config.training.timeout_minutes) as runtime:
        trainees = {OURS: Trainee(config, runtime, None)}
        trainees |= {name: Trainee(config, runtime, drop) for name, drop in PEERS.items()}

        def turn(trainee: Trainee) -> Callable[[], None]:
            return lambda: trainee.train(settings.steps)

        others: list[float] = []

        def wait() -> None:
            if runtime.rank == 0:
                others.append(wait_for_quiet(settings.patience))
            barrier()

        turns = {name: turn(trainee) for name, trainee in trainees.items()}
        seconds = in_turns(turns, settings.rounds, settings.warmup, wait, title="train")
    losses = {name: trainee.loss for name, trainee in trainees.items()}
    return state, spread(others or [0.0])._asdict(), losses, seconds


class Trainee:
    """One contestant: a model in its engine, and the random tokens it is fed.

    Args:
        drop_tokens: None for our layers; else DeepSpeed's take their place, with or without a bound on capacity.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, drop_tokens: bool | None) -> None:
        self.config, self.runtime, self.loss = config, runtime, float("nan")
        self.vocab_size = derive.vocab_size(config)
        self.generator = torch.Generator().manual_seed(runtime.rank)
        ep = runtime.groups.ep
        model = Decoder(config, self.vocab_size, Placement(ExpertParallel(ep.size, ep.place, ep.handle)))
        if drop_tokens is not None:
            replace_layers(model, config, drop_tokens)
        initialise(model, config.model, config.training.seed)
        self.engine = Engine(config, model, runtime.groups)

    def train(self, steps: int) -> None:
        """Optimizer steps as the training loop makes them, metrics included, until all ranks are done."""
        micro_steps = derive.accumulation_steps(self.config, self.runtime.world_size)
        for _ in range(steps):
            result, _ = train_step(self.engine, [self._batch() for _ in range(micro_steps)], 1.0)
            self.loss = float(result.values["cross_entropy"])
        barrier()

    def _batch(self) -> Batch:
        size = (self.config.training.micro_batch_size, self.config.data.seq_length + 1)
        tokens = torch.randint(self.vocab_size, size, generator=self.generator)
        return Batch(tokens[:, :-1], tokens[:, 1:].contiguous())


class DeepSpeedBlockFFN(nn.Module):
    """DeepSpeed's layer in the place of ours inside a block."""

    def __init__(self, config: RunConfig, drop_tokens: bool) -> None:
        super().__init__()
        moe = config.moe
        shape = LayerShape(config.model.hidden_size, moe.expert_ffn_size, moe.num_experts, moe.top_k)
        self.layer = deepspeed_moe(shape, config.parallel.ep, drop_tokens)
        self.balance_loss = moe.router.balance_loss if isinstance(moe.router, AuxiliaryLosses) else 0.0

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor, documents_BS: Tensor | None) -> tuple[Tensor, LayerAux]:
        out_BSD, balance_loss, _ = self.layer(x_BSD)
        return out_BSD, LayerAux({"balance_loss": self.balance_loss * balance_loss}, {}, {})


def replace_layers(model: Decoder, config: RunConfig, drop_tokens: bool) -> None:
    """Put DeepSpeed's layers in the place of ours; attention, norms, embedding and loss stay."""
    for block in model.blocks:
        if isinstance(block.ffn, MoELayer):
            block.ffn = DeepSpeedBlockFFN(config, drop_tokens)


def markdown(report: dict[str, Any]) -> str:
    """The report as small tables."""
    settings, training = report["settings"], report["config"]["training"]
    heading = (
        f"Training steps on random tokens: {settings['ranks']} ranks, {training['global_batch_size']} sequences of "
        f"{report['config']['data']['seq_length']} tokens per step, {settings['rounds']} rounds of {settings['steps']} "
        "steps in turns. Ratios are of the same round: median (smallest to largest)."
    )
    rows = [
        (r["contestant"], f"{r['tokens_per_second']['median']:,.0f}", in_words(r["megamoe_over_this"]))
        for r in report["results"]
    ]
    table = as_table(("MoE layers", "tokens/s", "megamoe is faster by the factor"), rows)
    return "\n\n".join([heading, table, *closing(report)]) + "\n"
