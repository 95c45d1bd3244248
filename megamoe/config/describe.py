"""What a run will be, as text: `--dry-run` and `python -m megamoe check` print it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

from megamoe.config.deepspeed import deepspeed_config
from megamoe.config.derive import (
    accumulation_steps,
    data_parallel_size,
    flops_per_token,
    is_moe_layer,
    parameter_counts,
)
from megamoe.config.load import dump_config
from megamoe.config.memory import memory_by_stage, memory_per_rank
from megamoe.config.run import RunConfig
from megamoe.config.stages import stage_bounds, stage_costs
from megamoe.config.traffic import axis_sizes, largest, sent_by_stage


def describe(config: RunConfig, world_size: int, topology: str) -> str:
    """Everything that follows from `config` on `world_size` ranks, section by section.

    Args:
        config: a checked configuration that fits the world size (`rules.check_world_size`).
        topology: the rank map (`parallel.topology.Topology.describe`), handed in as config lies below it.
    """
    sections = {
        "Configuration": _json(dump_config(config)),
        f"Topology of {world_size} ranks" if world_size > 1 else "Topology of 1 rank": topology,
        **({"Pipeline": _pipeline(config, world_size)} if config.parallel.pp > 1 else {}),
        "Batch": _batch(config, world_size),
        "Parameters": _parameters(config),
        "Memory per rank (estimate)": _memory(config, world_size),
        **({"Bytes sent per step and rank (estimate)": _traffic(config, world_size)} if world_size > 1 else {}),
        "DeepSpeed configuration": _json(deepspeed_config(config, world_size)),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in sections.items())


def _json(values: object) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _batch(config: RunConfig, world_size: int) -> str:
    training, steps = config.training, accumulation_steps(config, world_size)
    tokens = training.global_batch_size * config.data.seq_length
    epochs = config.finetune.epochs if config.finetune is not None else None
    whole = (
        f"{tokens * training.steps:,} in {training.steps:,} steps"
        if epochs is None
        else f"as many steps as {epochs} passes over the conversations take"
    )
    return (
        f"{training.global_batch_size} sequences = {training.micro_batch_size} per micro-batch "
        f"x {steps} accumulated x {data_parallel_size(config, world_size)} data-parallel\n"
        f"{tokens:,} tokens per step, {whole}{_spread(config)}"
    )


def _spread(config: RunConfig) -> str:
    """What one rank has of a sequence, on a line of its own."""
    parallel = config.parallel
    ranks = parallel.cp * parallel.tp
    if ranks == 1:
        return ""
    part = config.data.seq_length // ranks
    return f"\neach sequence over cp {parallel.cp} x tp {parallel.tp} = {ranks} ranks: {part:,} positions on each"


def _pipeline(config: RunConfig, world_size: int) -> str:
    """The stages: what each holds, its share of the FLOPs, memory of one of its ranks; and what time is lost."""
    pp, steps, costs = config.parallel.pp, accumulation_steps(config, world_size), stage_costs(config)
    mean, filling = sum(costs) / pp, (pp - 1) / (steps + pp - 1)
    return "\n".join(
        [
            f"{'stage':<6}{'ranks':>14}{'blocks':>10}{'MoE':>6}{'of the FLOPs':>14}{'memory':>15}   besides",
            *_stages(config, world_size),
            f"filling and emptying take ({pp} - 1) / ({steps} micro-batches + {pp} - 1) = {filling:.1%} of a step; "
            f"the costliest stage is {max(costs) / mean:.2f} times the mean",
        ]
    )


def _stages(config: RunConfig, world_size: int) -> Iterator[str]:
    """One line per stage."""
    costs, memory = stage_costs(config), memory_by_stage(config, world_size)
    pp, ranks = config.parallel.pp, world_size // config.parallel.pp
    for stage, (first, end) in enumerate(pairwise(stage_bounds(config))):
        own = _range(stage * ranks, (stage + 1) * ranks)
        with_experts = sum(is_moe_layer(config, index) for index in range(first, end))
        besides = "embedding" if stage == 0 else "last norm, head" if stage == pp - 1 else ""
        yield (
            f"{stage:<6}{own:>14}{_range(first, end):>10}{with_experts:>6}{costs[stage] / sum(costs):>14.1%}"
            f"{memory[stage].total / 2**20:>11,.1f} MiB   {besides}"
        ).rstrip()


def _range(first: int, end: int) -> str:
    return f"{first}-{end - 1}" if end - first > 1 else str(first)


def _parameters(config: RunConfig) -> str:
    counts = parameter_counts(config)
    lines = [f"{'':<16}{'total':>18}{'active per token':>18}"]
    lines += [f"{name:<16}{c.total:>18,}{c.active:>18,}" for name, c in counts.items() if c.total]
    lines.append(f"model FLOPs per token, forward and backward: {flops_per_token(config):.3e}")
    if config.model.vocab_size is None:
        lines.append("vocabulary as data.tokenizer.vocab_size; the tokenizer in use may differ")
    return "\n".join(lines)


def _memory(config: RunConfig, world_size: int) -> str:
    memory = memory_per_rank(config, world_size)
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "total": memory.total,
    }
    if memory.host:
        rows["CPU memory"] = memory.host
    notes = {
        "activations": "  (rough; without buffers and caches)",
        "total": "  (the stage that needs most)" if config.parallel.pp > 1 else "",
        "CPU memory": "  (offloaded, not in the total)",
    }
    lines = (f"{name:<12}{size / 2**20:>14,.1f} MiB{notes.get(name, '')}" for name, size in rows.items())
    return "\n".join(lines)


def _traffic(config: RunConfig, world_size: int) -> str:
    """One line per axis over which anything is sent, and what it is of."""
    sizes, cp = axis_sizes(config, world_size), config.parallel.cp
    names = {"micro_batch": "cp x tp", "dp": "dp x cp" if cp > 1 else "dp"}
    lines = [f"{'axis':<8}{'ranks':>6}{'MiB':>12}   of which"]
    for axis, kinds in largest(sent_by_stage(config, world_size)).items():
        parts = ", ".join(f"{what} {size / 2**20:,.1f}" for what, size in kinds.items())
        lines.append(f"{names.get(axis, axis):<8}{sizes[axis]:>6}{sum(kinds.values()) / 2**20:>12,.1f}   {parts}")
    return "\n".join([*lines, *_traffic_notes(config)])


def _traffic_notes(config: RunConfig) -> Iterator[str]:
    """What the numbers do not say."""
    if config.parallel.ep > 1:
        dropless = config.moe.capacity.mode == "dropless"
        yield "rows to experts: " + ("if every expert gets as many" if dropless else "at most, by the capacity")
    if config.parallel.pp > 1:
        yield "of every axis, the stage that sends most over it"
