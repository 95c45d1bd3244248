"""The whole layer on one rank against a loop over tokens: output, losses and every gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.moe import CapacityConfig, MoEConfig
from megamoe.config.routers import ResonanceRouterConfig, TopKRouterConfig
from megamoe.moe.layer import MoELayer
from megamoe.moe.marker import is_expert
from megamoe.moe.placement import ExpertParallel
from megamoe.moe.types import RoutingPlan
from megamoe.testing import assert_close, assert_equal_bits

BATCH, SEQUENCE, WIDTH, FFN, EXPERTS = 4, 12, 20, 6, 5
TOKENS = BATCH * SEQUENCE
EMPTY = EXPERTS - 1
"""An expert that no token chooses; expert 0 is chosen by more than it may keep in the static cases."""

ROUTERS = {
    "softmax": TopKRouterConfig(balance_loss=0.1, z_loss=0.05),
    "sigmoid": TopKRouterConfig(score="sigmoid", balance_loss=0.1, bias_update_rate=0.01),
    "grap": ResonanceRouterConfig(affinity="grap", balance_loss=0.1),
    "grap_learned": ResonanceRouterConfig(affinity="grap_learned", balance_loss=0.1, z_loss=0.05),
    "cosine": ResonanceRouterConfig(affinity="cosine", balance_loss=0.1, orthogonality_loss=0.2),
}
CAPACITIES = {
    "dropless": CapacityConfig(),
    "static": CapacityConfig(mode="static", factor=0.6),
    "position": CapacityConfig(mode="static", factor=0.6, drop="position"),
}


def build(router: str, capacity: str = "dropless", top_k: int = 2, shared: int = 0) -> MoELayer:
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=top_k,
        expert_ffn_size=FFN,
        num_shared_experts=shared,
        router=ROUTERS[router],
        capacity=CAPACITIES[capacity],
    )
    layer = MoELayer(config, WIDTH, ExpertParallel())
    generator = torch.Generator().manual_seed(11)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    shape_router(layer)
    return layer


@torch.no_grad()
def shape_router(layer: MoELayer) -> None:
    """Experts whose vectors are the slices of features, roughly, so that `inputs` can choose among them."""
    router = layer.router
    slices_ED = torch.zeros(EXPERTS, WIDTH)
    for expert in range(EXPERTS):
        slices_ED[expert, 4 * expert : 4 * expert + 4] = 1.0
    if hasattr(router, "weight"):
        router.weight.mul_(0.1).add_(slices_ED)
    if hasattr(router, "slice_values"):
        router.slice_values.mul_(0.3).add_(1.0)
    if hasattr(router, "log_scale"):
        router.log_scale.fill_(2.0)


def inputs() -> Tensor:
    """Tokens that like the first expert's features and dislike the last one's."""
    x = torch.randn(BATCH, SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(12))
    x[..., :4] += 1.0
    x[..., -4:] -= 4.0
    return x.requires_grad_()


def gate_logits(layer: MoELayer, token: Tensor) -> Tensor:
    """[E], from the definition of each router."""
    router = layer.router
    if isinstance(router.config, TopKRouterConfig):
        return torch.stack([torch.dot(token, vector) for vector in router.weight])
    if router.config.affinity == "cosine":
        vectors = list(router.weight)
    else:
        values = router.slice_values if router.config.affinity == "grap_learned" else torch.ones(WIDTH)
        pieces = values.split(WIDTH // EXPERTS)
        vectors = [F.pad(piece, (4 * e, WIDTH - 4 * e - 4)) for e, piece in enumerate(pieces)]
    kappa = router.log_scale.exp().squeeze()
    return torch.stack([kappa * torch.dot(token, v) / (token.norm() * v.norm()) for v in vectors])


def expert_output(layer: MoELayer, expert: int, token: Tensor) -> Tensor:
    w1, w2, w3 = (getattr(layer.experts, name)[expert] for name in ("w1", "w2", "w3"))
    return w2 @ (F.silu(w1 @ token) * (w3 @ token))


def kept_pairs(affinities: list[Tensor], choices: list[list[int]], layer: MoELayer) -> set[tuple[int, int]]:
    """(token, expert) that every expert keeps of those that chose it."""
    kept = set()
    capacity = layer.router.capacity
    for expert in range(EXPERTS):
        takers = [t for t in range(TOKENS) if expert in choices[t]]
        if capacity.drop == "affinity":
            takers.sort(key=lambda t: -affinities[t][expert].item())
        if capacity.mode == "static":
            takers = takers[: layer.router.bound.capacities(TOKENS)[expert]]
        kept |= {(t, expert) for t in takers}
    return kept


def literal(layer: MoELayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor], set[tuple[int, int]]]:
    """Output, losses and kept pairs, one token at a time."""
    config, top_k = layer.router.config, layer.router.top_k
    tokens = list(x.reshape(TOKENS, WIDTH))
    logits = [gate_logits(layer, token) for token in tokens]
    sigmoid = getattr(config, "score", "softmax") == "sigmoid"
    scores = [v.sigmoid() if sigmoid else v.softmax(0) for v in logits]
    choices = [sorted(range(EXPERTS), key=lambda e, s=s: -s[e].item())[:top_k] for s in scores]
    # Experts choose by affinity: top-k's is the gate score, resonance's the cosine before any softmax.
    affinities = scores if isinstance(config, TopKRouterConfig) else logits
    kept, out = kept_pairs(affinities, choices, layer), []
    for t, token in enumerate(tokens):
        mass = sum(scores[t][e] for e in choices[t]) if top_k > 1 or sigmoid else 1.0
        parts = [scores[t][e] / mass * expert_output(layer, e, token) for e in choices[t] if (t, e) in kept]
        out.append(sum(parts, torch.zeros(WIDTH)))
        if layer.shared_experts is not None:
            shared = layer.shared_experts
            out[-1] = out[-1] + shared.w2.weight @ (F.silu(shared.w1.weight @ token) * (shared.w3.weight @ token))
    terms = {"balance_loss": config.balance_loss * literal_balance(scores, choices)}
    if config.z_loss:
        terms["z_loss"] = config.z_loss * sum(v.exp().sum().log() ** 2 for v in logits) / TOKENS
    if getattr(config, "affinity", "") == "cosine":
        pairs = [(i, j) for i in range(EXPERTS) for j in range(EXPERTS) if i != j]
        cosines = [F.cosine_similarity(layer.router.weight[i], layer.router.weight[j], dim=0) for i, j in pairs]
        terms["orthogonality_loss"] = config.orthogonality_loss * sum(c**2 for c in cosines) / len(pairs)
    return torch.stack(out).view(x.shape), terms, kept


def literal_balance(scores: list[Tensor], choices: list[list[int]]) -> Tensor:
    chosen = [sum(e in c for c in choices) / sum(map(len, choices)) for e in range(EXPERTS)]
    mean = [sum(s[e] / s.sum() for s in scores) / TOKENS for e in range(EXPERTS)]
    return EXPERTS * sum(f * p for f, p in zip(chosen, mean, strict=True))


def gradients(layer: MoELayer, x: Tensor, out: Tensor, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(13))
    targets = {"x": x, **dict(layer.named_parameters())}
    loss = sum(terms.values(), (out * probe).sum())
    return dict(zip(targets, torch.autograd.grad(loss, list(targets.values())), strict=True))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("router", ROUTERS)
def test_forward_and_gradients_against_a_loop(router: str, capacity: str) -> None:
    layer, x = build(router, capacity, shared=1 if router == "softmax" else 0), inputs()
    out, aux = layer(x)
    expected_out, expected_terms, kept = literal(layer, x)
    assert_close(out, expected_out, rel=1e-5, name="output")
    assert sorted(aux.losses) == sorted(expected_terms)
    for name, term in expected_terms.items():
        assert_close(aux.losses[name], term, rel=1e-5, name=name)
    expected = gradients(layer, x, expected_out, expected_terms)
    for name, gradient in gradients(layer, x, out, aux.losses).items():
        assert_close(gradient, expected[name], rel=3e-5, name=f"gradient of {name}")
    # The data reaches the hard branch: an expert without rows, and drops wherever there is a bound.
    assert all(expert != EMPTY for _, expert in kept)
    assert (len(kept) < 2 * TOKENS) == (capacity != "dropless")
    assert aux.metrics["drop_share"][0].item() == pytest.approx(1 - len(kept) / (2 * TOKENS))


@pytest.mark.parametrize("router", ["softmax", "grap_learned"])
def test_one_expert_per_token(router: str) -> None:
    layer, x = build(router, top_k=1), inputs()
    out, aux = layer(x)
    expected_out, expected_terms, _ = literal(layer, x)
    assert_close(out, expected_out, rel=1e-5)
    expected = gradients(layer, x, expected_out, expected_terms)
    for name, gradient in gradients(layer, x, out, aux.losses).items():
        assert_close(gradient, expected[name], rel=3e-5, name=name)


def test_a_token_that_nobody_keeps_gets_zero() -> None:
    layer = build("softmax", "static", top_k=1)
    x = inputs()
    out, aux = layer(x)
    _, _, kept = literal(layer, x)
    served = {token for token, _ in kept}
    assert 0 < len(served) < TOKENS
    for token, row in enumerate(out.reshape(TOKENS, WIDTH)):
        assert bool(row.any()) == (token in served)
    assert aux.metrics["unserved_share"][0].item() == pytest.approx(1 - len(served) / TOKENS)


def test_every_parameter_gets_a_gradient_even_of_an_expert_without_rows() -> None:
    layer, x = build("softmax", "static"), inputs()
    out, aux = layer(x)
    sum(aux.losses.values(), out.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("experts."):
            assert not bool(parameter.grad[EMPTY].any())
            assert bool(parameter.grad[0].any())


def test_implementations_of_the_experts_agree() -> None:
    layer, x = build("grap_learned", "static"), inputs()
    out, _ = layer(x)
    for name in ("reference", "blocked"):
        other = copy.deepcopy(layer)
        other.experts.implementation = name
        assert_close(other(x)[0], out, rel=1e-5, name=name)


def test_rows_may_have_any_leading_dims() -> None:
    layer, x = build("softmax").eval(), inputs()
    out, _ = layer(x)
    assert out.shape == x.shape
    assert_equal_bits(layer(x.reshape(-1, WIDTH))[0], out.reshape(-1, WIDTH))


def test_the_engine_sees_experts_and_nothing_else_as_experts() -> None:
    layer = build("cosine", shared=1)
    marked = {name for name, parameter in layer.named_parameters() if is_expert(parameter)}
    assert marked == {"experts.w1", "experts.w2", "experts.w3"}
    assert {p.group_name for p in layer.experts.parameters()} == {"ep_size_1"}


PADDED_BS = torch.tensor([[0] * 12, [0] * 5 + [1] * 4 + [-1] * 3, [-1] * 12, [0] * 11 + [-1]])


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_goes_to_no_expert(router: str) -> None:
    """Its output is that of the shared experts, and everything else is as if it were not there: dropless, so that it
    shows bit for bit."""
    layer, x, real_BS = build(router, shared=1), inputs(), PADDED_BS >= 0
    out, aux = layer(x, documents=PADDED_BS)
    alone, expected = layer(x[real_BS])
    assert_equal_bits(out[real_BS], alone)
    assert_equal_bits(out[~real_BS], layer.shared_experts(x)[~real_BS])
    for name, term in expected.losses.items():
        assert_equal_bits(aux.losses[name], term, name=name)
    for name, value in expected.observations.items():
        assert_equal_bits(aux.observations[name], value, name=name)
    gradient, other = (torch.autograd.grad(result.square().sum(), x)[0] for result in (out[real_BS], alone))
    assert_equal_bits(gradient, other)


@pytest.mark.parametrize("capacity", ["static", "position"])
def test_a_capacity_is_a_share_of_the_rows_with_padding(capacity: str) -> None:
    """The same on every rank, however much of it is padding."""
    layer, x = build("softmax", capacity), inputs()
    whole = layer.router(x.flatten(0, 1)).capacity
    plans: list[RoutingPlan] = []
    layer.router.register_forward_hook(lambda module, args, plan: plans.append(plan))
    for documents_BS in (PADDED_BS, torch.full_like(PADDED_BS, -1), torch.zeros_like(PADDED_BS)):
        layer(x, documents=documents_BS)
    assert [plan.capacity for plan in plans] == [whole] * 3


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_nothing_but_padding(router: str, capacity: str) -> None:
    layer, x = build(router, capacity), inputs()
    out, aux = layer(x, documents=torch.full_like(PADDED_BS, -1))
    assert not out.any()
    loss = sum(aux.losses.values(), out.sum())
    assert loss.isfinite()
    for gradient in torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()
