"""What `training.rank_invariant` needs; see :mod:`megamoe.config.rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megamoe.config.problems import Problem
from megamoe.config.routers import ResonanceRouterConfig
from megamoe.config.run import RunConfig

SWITCH = "training.rank_invariant"


def rank_invariance_is_possible(config: RunConfig) -> Iterator[Problem]:
    if not config.training.rank_invariant:
        return
    for path, got, wanted, reason in _obstacles(config):
        yield Problem(path, f"{got} and {SWITCH} true exclude each other: {reason}; use {wanted}", (SWITCH,))


def _obstacles(config: RunConfig) -> Iterator[tuple[str, object, str, str]]:
    """Path, value, what to use and why."""
    training, parallel, moe = config.training, config.parallel, config.moe
    if training.precision != "fp32":
        yield "training.precision", training.precision, "fp32", "sums of gradients in fp64 are exact for fp32"
    if training.optimizer.type != "adamw":
        yield "training.optimizer.type", training.optimizer.type, "adamw", "it must work element by element"
    if parallel.zero_stage:
        what = "DeepSpeed adds gradients up in an order of its own"
        yield "parallel.zero_stage", parallel.zero_stage, "0", what
    for axis in ("tp", "cp", "pp", "etp"):
        if getattr(parallel, axis) > 1:
            yield f"parallel.{axis}", getattr(parallel, axis), "1", "sums over its ranks round differently"
    if config.ops.expert_ffn != "by_source":
        what = "products of more rows round differently"
        yield "ops.expert_ffn", config.ops.expert_ffn, "by_source (configs/parallel/rank_invariant.yaml)", what
    if moe.dispatcher not in ("auto", "local", "all_to_all"):
        yield "moe.dispatcher", moe.dispatcher, "auto", "it does not keep the sources' rows apart"
    if moe.broadcast is not None:
        yield "moe.broadcast", "broadcasting", "null", "broadcast rows of all sources are worked on together"
    if isinstance(moe.router, ResonanceRouterConfig) and moe.router.scope == "ep_group":
        yield "moe.router.scope", "ep_group", "micro_batch", "experts would choose among the tokens of more ranks"
    if training.frozen or training.trainable != ("*",):
        path = "training.frozen" if training.frozen else "training.trainable"
        yield path, "a part of the weights", "all of them", "it is made for training from the beginning"
    if config.finetune is not None:
        yield "finetune", "fine-tuning", "pretraining", "its loss is a mean over the labels of all ranks"
    micro_batches = training.global_batch_size // training.micro_batch_size
    if micro_batches & (micro_batches - 1):
        what = f"{micro_batches} micro-batches are no power of two, and their mean rounds"
        yield "training.global_batch_size", training.global_batch_size, _powers(config), what


def _powers(config: RunConfig) -> str:
    size = config.training.micro_batch_size
    below = 1 << ((config.training.global_batch_size // size).bit_length() - 1)
    return f"{below * size} or {2 * below * size}"


def by_source_is_for_rank_invariance(config: RunConfig) -> Iterator[Problem]:
    if config.ops.expert_ffn == "by_source" and not config.training.rank_invariant:
        yield Problem("ops.expert_ffn", f"by_source needs {SWITCH} true; use auto", (SWITCH,))


RANK_RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    rank_invariance_is_possible,
    by_source_is_for_rank_invariance,
)
