"""The same ops as one writes them with torch's own: what they are compared with, in time and in result."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """place int32 [T, K], source int32 [R], counts int64 [E], and for indexing the token of each row, int64 [R]."""

    place: Tensor
    source: Tensor
    counts: Tensor
    tokens: Tensor


def plan(experts_TK: Tensor, num_experts: int) -> Plan:
    """Choices in the order of experts, inside one in the order of tokens."""
    flat_A = experts_TK.flatten()
    return _plan_of(torch.argsort(flat_A, stable=True), experts_TK, torch.bincount(flat_A, minlength=num_experts))


def plan_capacity(experts_TK: Tensor, num_experts: int, keys_TK: Tensor, capacity_E: Tensor) -> Plan:
    """As `plan`, of each expert only the choices with the largest keys. Rows beyond those kept have source -1."""
    flat_A = experts_TK.flatten()
    by_key_A = torch.argsort(keys_TK.flatten(), descending=True, stable=True)
    order_A = by_key_A[torch.argsort(flat_A[by_key_A], stable=True)]
    offered_E = torch.bincount(flat_A, minlength=num_experts)
    first_E = offered_E.cumsum(0) - offered_E
    rank_A = torch.arange(len(flat_A), device=flat_A.device) - first_E[flat_A[order_A]]
    kept_A = torch.empty_like(flat_A, dtype=torch.bool)
    kept_A[order_A] = rank_A < capacity_E[flat_A[order_A]]
    group_A = torch.where(kept_A, flat_A, num_experts)
    counts_E = torch.minimum(offered_E, capacity_E)
    found = _plan_of(torch.argsort(group_A, stable=True), experts_TK, counts_E)
    beyond_A = torch.arange(len(flat_A), device=flat_A.device) >= counts_E.sum()
    place_TK = found.place.masked_fill(~kept_A.view_as(found.place), -1)
    return Plan(place_TK, found.source.masked_fill(beyond_A, -1), counts_E, found.tokens)


def _plan_of(order_A: Tensor, experts_TK: Tensor, counts_E: Tensor) -> Plan:
    place_A = torch.empty_like(order_A, dtype=torch.int32)
    place_A[order_A] = torch.arange(len(order_A), dtype=torch.int32, device=order_A.device)
    tokens_A = order_A // experts_TK.shape[1]
    return Plan(place_A.view_as(experts_TK), order_A.to(torch.int32), counts_E, tokens_A)


def permute(x_TD: Tensor, tokens_R: Tensor) -> Tensor:
    """One row per choice."""
    return x_TD.index_select(0, tokens_R)


def unpermute(y_RD: Tensor, tokens_R: Tensor, num_tokens: int) -> Tensor:
    """Rows added up per token, with atomics on a GPU: in the rows' precision and in no fixed order."""
    return y_RD.new_zeros(num_tokens, y_RD.shape[1]).index_add_(0, tokens_R, y_RD)


def unpermute_weighted(y_RD: Tensor, tokens_R: Tensor, weights_R: Tensor, num_tokens: int) -> Tensor:
    """As `unpermute`, each row multiplied by its weight first."""
    return unpermute(y_RD * weights_R[:, None].to(y_RD.dtype), tokens_R, num_tokens)


def gather_and_sum(y_RD: Tensor, place_TK: Tensor) -> Tensor:
    """The same sum without atomics: K rows for each token, then one reduction."""
    return y_RD.index_select(0, place_TK.flatten()).view(*place_TK.shape, -1).sum(1)


def unpermute_bwd(dout_TD: Tensor, y_RD: Tensor, tokens_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows [R, D] and, by row, of weights [R]."""
    dout_RD = dout_TD.index_select(0, tokens_R)
    return dout_RD * weights_R[:, None].to(y_RD.dtype), (dout_RD * y_RD).sum(-1, dtype=torch.float32)


def glu_fwd(h1_RF: Tensor, h3_RF: Tensor, weights_R: Tensor) -> Tensor:
    """SwiGLU with the gate weight."""
    return F.silu(h1_RF) * h3_RF * weights_R[:, None].to(h1_RF.dtype)


def glu_bwd(dact_RF: Tensor, h1_RF: Tensor, h3_RF: Tensor, weights_R: Tensor) -> tuple[Tensor, ...]:
    """Gradients of h1, h3 and the weight, and the forward's result."""
    gate_RF, weight_R1 = F.silu(h1_RF), weights_R[:, None].to(h1_RF.dtype)
    plain_RF = gate_RF * h3_RF
    scaled_RF = dact_RF * weight_R1
    dh1_RF = torch.ops.aten.silu_backward(scaled_RF * h3_RF, h1_RF)
    dweights_R = (dact_RF * plain_RF).sum(-1, dtype=torch.float32)
    return dh1_RF, scaled_RF * gate_RF, dweights_R, plain_RF * weight_R1


def router_fwd(x_TD: Tensor, vectors_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine with unit vectors, in fp32: scores [T, E], inverse norms [T], experts [T, K]."""
    x_TD = x_TD.float()
    inverse_T = torch.linalg.vector_norm(x_TD, dim=-1).reciprocal()
    scores_TE = F.linear(x_TD, vectors_ED) * inverse_T[:, None]
    return scores_TE, inverse_T, scores_TE.topk(top_k, dim=-1).indices


def router_bwd(
    grad_TE: Tensor, x_TD: Tensor, vectors_ED: Tensor, scores_TE: Tensor, inverse_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows, in their precision, and of vectors."""
    unit_TD = x_TD.float() * inverse_T[:, None]
    along_T1 = (grad_TE * scores_TE).sum(-1, keepdim=True)
    dx_TD = (grad_TE @ vectors_ED - along_T1 * unit_TD) * inverse_T[:, None]
    return dx_TD.to(x_TD.dtype), grad_TE.t() @ unit_TD


def dense_vectors(unit_D: Tensor, num_experts: int) -> Tensor:
    """[E, D]: one contiguous slice of `unit` per expert, the first D mod E one feature longer, zeros elsewhere."""
    slices = torch.tensor_split(torch.arange(len(unit_D), device=unit_D.device), num_experts)
    vectors_ED = unit_D.new_zeros(num_experts, len(unit_D))
    for expert, features in enumerate(slices):
        vectors_ED[expert, features] = unit_D[features]
    return vectors_ED
