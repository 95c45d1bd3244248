"""What a run will be, as text: `--dry-run` and `python -m megamoe check` print it."""

from __future__ import annotations

import json

from megamoe.config.deepspeed import deepspeed_config
from megamoe.config.derive import accumulation_steps, data_parallel_size, flops_per_token, parameter_counts
from megamoe.config.load import dump_config
from megamoe.config.memory import memory_per_rank
from megamoe.config.run import RunConfig


def describe(config: RunConfig, world_size: int, topology: str) -> str:
    """Everything that follows from `config` on `world_size` ranks, section by section.

    Args:
        config: a checked configuration that fits the world size (`rules.check_world_size`).
        topology: the rank map (`parallel.topology.Topology.describe`), handed in as config lies below it.
    """
    sections = {
        "Configuration": _json(dump_config(config)),
        f"Topology of {world_size} ranks" if world_size > 1 else "Topology of 1 rank": topology,
        "Batch": _batch(config, world_size),
        "Parameters": _parameters(config),
        "Memory per rank (estimate)": _memory(config, world_size),
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
        f"{tokens:,} tokens per step, {whole}"
    )


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
    notes = {"activations": "  (rough; without buffers and caches)"}
    lines = (f"{name:<12}{size / 2**20:>14,.1f} MiB{notes.get(name, '')}" for name, size in rows.items())
    return "\n".join(lines)
