"""Every op that is measured: its inputs, its call, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from kernels.bench import draw, plain
from kernels.bench.model import Shape

Inputs = dict[str, Any]
EXACT, BF16, SCORES = 0.0, 2e-2, 1e-4
"""Largest ||ours - plain|| / ||plain||. Plain torch rounds after every step in bf16; exact tests are elsewhere."""


@dataclass(frozen=True)
class Measurement:
    """One op on one kind of input.

    Attributes:
        name: key of `model.COSTS`.
        op: in namespace megamoe.
        build: inputs of a case from a random stream.
        ours, plain: the call on those inputs; tensors of the same meaning, in the same order.
        tolerance: of their difference.
    """

    name: str
    op: str
    build: Callable[[Shape, Generator], Inputs]
    ours: Callable[[Inputs], Any]
    plain: Callable[[Inputs], Any]
    tolerance: float


def _routing(s: Shape, stream: Generator) -> Inputs:
    experts = draw.choices(s, stream)
    found, weights = plain.plan(experts, s.experts), draw.weights(s, stream)
    return {
        "shape": s,
        "experts": experts,
        "plan": found,
        "weights": weights,
        "weights_R": weights.flatten()[found.source.long()],
    }


def _choices(s: Shape, stream: Generator) -> Inputs:
    device = stream.device
    keys = torch.rand(s.tokens, s.top_k, generator=stream, device=device)
    capacity = torch.full((s.experts,), max(1, s.rows // s.experts), dtype=torch.int64, device=device)
    return {"shape": s, "experts": draw.choices(s, stream), "keys": keys, "capacity": capacity}


def _tokens(s: Shape, stream: Generator) -> Inputs:
    return _routing(s, stream) | {"x": draw.rows(s.tokens, s.hidden, stream)}


def _rows(s: Shape, stream: Generator) -> Inputs:
    return _routing(s, stream) | {"y": draw.rows(s.rows, s.hidden, stream)}


def _both(s: Shape, stream: Generator) -> Inputs:
    return _rows(s, stream) | {"dout": draw.rows(s.tokens, s.hidden, stream)}


def _activations(s: Shape, stream: Generator) -> Inputs:
    names = ("h1", "h3", "dact")
    return _routing(s, stream) | {name: draw.rows(s.rows, s.ffn, stream) for name in names}


def _grap(s: Shape, stream: Generator) -> Inputs:
    device = stream.device
    ends = torch.tensor_split(torch.randn(s.hidden, generator=stream, device=device), s.experts)
    unit = torch.cat([part / torch.linalg.vector_norm(part) for part in ends])
    inputs = {"shape": s, "x": draw.rows(s.tokens, s.hidden, stream), "unit": unit, "mean": torch.zeros_like(unit)}
    return _with_scores(inputs, plain.dense_vectors(unit, s.experts), stream)


def _router(s: Shape, stream: Generator) -> Inputs:
    vectors = torch.randn(s.experts, s.hidden, generator=stream, device=stream.device)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return _with_scores({"shape": s, "x": draw.rows(s.tokens, s.hidden, stream)}, vectors, stream)


def _with_scores(inputs: Inputs, vectors: Tensor, stream: Generator) -> Inputs:
    scores, inverse, _ = plain.router_fwd(inputs["x"], vectors, inputs["shape"].top_k)
    grad = torch.randn(scores.shape, generator=stream, device=stream.device)
    return inputs | {"vectors": vectors, "scores": scores, "inverse": inverse, "grad": grad}


def _op(name: str) -> Any:
    return getattr(torch.ops.megamoe, name)


def _of_slices(dvectors_ED: Tensor, num_experts: int) -> Tensor:
    """Of gradients [E, D] those on each expert's own slice, [D]."""
    ones = plain.dense_vectors(torch.ones_like(dvectors_ED[0]), num_experts)
    return (dvectors_ED * ones).sum(0)


def _grap_bwd_plain(i: Inputs) -> tuple[Tensor, Tensor]:
    dx, dvectors = plain.router_bwd(i["grad"], i["x"], i["vectors"], i["scores"], i["inverse"])
    return dx, _of_slices(dvectors, i["shape"].experts)


MEASUREMENTS = (
    Measurement(
        "plan",
        "plan",
        _choices,
        lambda i: _op("plan")(i["experts"], i["shape"].experts),
        lambda i: plain.plan(i["experts"], i["shape"].experts)[:3],
        EXACT,
    ),
    Measurement(
        "plan_capacity",
        "plan",
        _choices,
        lambda i: _op("plan")(i["experts"], i["shape"].experts, i["keys"], i["capacity"]),
        lambda i: plain.plan_capacity(i["experts"], i["shape"].experts, i["keys"], i["capacity"])[:3],
        EXACT,
    ),
    Measurement(
        "permute",
        "permute_rows",
        _tokens,
        lambda i: _op("permute_rows")(i["x"], i["plan"].source, i["plan"].place),
        lambda i: plain.permute(i["x"], i["plan"].tokens),
        EXACT,
    ),
    Measurement(
        "unpermute",
        "unpermute_rows",
        _rows,
        lambda i: _op("unpermute_rows")(i["y"], i["plan"].place, i["plan"].source),
        lambda i: plain.unpermute(i["y"], i["plan"].tokens, i["shape"].tokens),
        BF16,
    ),
    Measurement(
        "unpermute_weighted",
        "unpermute_rows",
        _rows,
        lambda i: _op("unpermute_rows")(i["y"], i["plan"].place, i["plan"].source, i["weights"]),
        lambda i: plain.unpermute_weighted(i["y"], i["plan"].tokens, i["weights_R"], i["shape"].tokens),
        BF16,
    ),
    Measurement(
        "unpermute_bwd",
        "unpermute_bwd",
        _both,
        lambda i: _op("unpermute_bwd")(i["dout"], i["y"], i["plan"].place, i["plan"].source, i["weights"])[0],
        lambda i: plain.unpermute_bwd(i["dout"], i["y"], i["plan"].tokens, i["weights_R"])[0],
        BF16,
    ),
    Measurement(
        "glu_fwd",
        "glu_fwd",
        _activations,
        lambda i: _op("glu_fwd")(i["h1"], i["h3"], i["weights_R"], i["plan"].counts, "swiglu"),
        lambda i: plain.glu_fwd(i["h1"], i["h3"], i["weights_R"]),
        BF16,
    ),
    Measurement(
        "glu_bwd",
        "glu_bwd",
        _activations,
        lambda i: _op("glu_bwd")(i["dact"], i["h1"], i["h3"], i["weights_R"], i["plan"].counts, "swiglu"),
        lambda i: plain.glu_bwd(i["dact"], i["h1"], i["h3"], i["weights_R"]),
        BF16,
    ),
    Measurement(
        "grap_fwd",
        "grap_fwd",
        _grap,
        lambda i: _op("grap_fwd")(i["x"], i["unit"], i["mean"], i["shape"].experts, i["shape"].top_k)[:2],
        lambda i: plain.router_fwd(i["x"], i["vectors"], i["shape"].top_k)[:2],
        SCORES,
    ),
    Measurement(
        "grap_bwd",
        "grap_bwd",
        _grap,
        lambda i: _op("grap_bwd")(i["grad"], i["x"], i["unit"], i["mean"], i["scores"], i["inverse"]),
        _grap_bwd_plain,
        BF16,
    ),
    Measurement(
        "router_fwd",
        "router_fwd",
        _router,
        lambda i: _op("router_fwd")(i["x"], i["vectors"], None, True, i["shape"].top_k)[:2],
        lambda i: plain.router_fwd(i["x"], i["vectors"], i["shape"].top_k)[:2],
        SCORES,
    ),
    Measurement(
        "router_bwd",
        "router_bwd",
        _router,
        lambda i: _op("router_bwd")(i["grad"], i["x"], i["vectors"], None, True, i["scores"], i["inverse"]),
        lambda i: plain.router_bwd(i["grad"], i["x"], i["vectors"], i["scores"], i["inverse"]),
        BF16,
    ),
)
