"""What makes two runs the same network: the settings that weights depend on."""

from __future__ import annotations

from typing import Any

from megamoe.config.run import RunConfig

_MODEL = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "ffn_size",
    "norm_eps",
    "rope_theta",
    "tie_embeddings",
)
_MOE = ("num_experts", "top_k", "expert_ffn_size", "every_n_layers", "first_k_dense", "num_shared_experts")
_ROUTER = (
    *("type", "score", "normalize_weights", "num_groups", "top_groups"),
    *("affinity", "centre", "learn_scale"),
    "seed",
)
_FOLLOWING = ("locmoe", "etr_bound", "etr_success")
"""Capacities that keep an estimate in the checkpoint."""


def architecture(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Flat dictionary of dotted names, equal for two runs whose checkpoints fit each other.

    Losses, capacity (but for what a bound remembers), implementations and everything about training are left out: they
    may change between the two.
    """
    values: dict[str, Any] = {"model.vocab_size": vocab_size}
    values |= {f"model.{name}": getattr(config.model, name) for name in _MODEL}
    values["moe.num_experts"] = config.moe.num_experts
    if config.moe.num_experts:
        values |= {f"moe.{name}": getattr(config.moe, name) for name in _MOE}
        router = config.moe.router
        values |= {f"moe.router.{name}": getattr(router, name) for name in _ROUTER if hasattr(router, name)}
        mode = config.moe.capacity.mode
        values["moe.capacity.mode"] = mode if mode in _FOLLOWING else "dropless or static"
        if config.moe.broadcast is not None:
            broadcast = config.moe.broadcast
            measured = broadcast.threshold == "quantile"  # and then in the checkpoint
            values["moe.broadcast"] = f"quantile {broadcast.quantile}" if measured else f"fixed {broadcast.entropy}"
    return values


def network(architecture: dict[str, Any]) -> dict[str, Any]:
    """Of an architecture, what decides whether weights fit: without what training remembers besides."""
    return {name: value for name, value in architecture.items() if name not in ("moe.capacity.mode", "moe.broadcast")}


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One readable part for each name whose value differs."""
    names = sorted(saved.keys() | wanted.keys())
    return [f"{n}: {saved.get(n)!r} -> {wanted.get(n)!r}" for n in names if saved.get(n) != wanted.get(n)]
