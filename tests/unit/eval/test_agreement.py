"""Gains of experts against steps of the loss, and agreement against sets built here."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.common.errors import ConfigError
from megamoe.data.batch import Batch
from megamoe.eval.agreement import Gains, agreement, expert_gains, measure_agreement
from megamoe.eval.routing import routed_layers
from megamoe.model.decoder import Decoder
from megamoe.moe.layer import MoELayer
from megamoe.moe.placement import ExpertParallel
from megamoe.testing import assert_equal_bits
from megamoe.training.setup import Runtime

Build = Callable[..., Decoder]
ONE_LAYER = ("model.num_layers=1", "moe.num_shared_experts=1")


@contextmanager
def pushed(layer: MoELayer, token: int, step_D: Tensor) -> Iterator[None]:
    """The layer's output of one token is larger by a step."""

    def push(_: MoELayer, __: object, output: tuple[Tensor, object]) -> tuple[Tensor, object]:
        out_BSD = output[0].clone()
        out_BSD.view(-1, out_BSD.shape[-1])[token] += step_D
        return out_BSD, output[1]

    hook = layer.register_forward_hook(push)
    yield
    hook.remove()


def output_of(layer: MoELayer, expert: int, row_D: Tensor) -> Tensor:
    w1, w2, w3 = (getattr(layer.experts, name)[expert] for name in ("w1", "w2", "w3"))
    return w2 @ (F.silu(w1 @ row_D) * (w3 @ row_D))


def summed_loss(model: Decoder, batch: Batch) -> float:
    return float(model(*batch, each=True).scores.losses_BS.sum())


@pytest.mark.parametrize("overrides", [ONE_LAYER, ("moe.router.type=resonance",)])
def test_a_gain_is_what_a_small_step_towards_the_expert_saves(
    build: Build, batches: list[Batch], overrides: tuple[str, ...]
) -> None:
    model, batch, eps = build(*overrides).double(), batches[0], 1e-6
    found = expert_gains(model, batch)
    assert sorted(found) == sorted(routed_layers(model))
    for block, layer in routed_layers(model).items():
        gains_TE, rows_TD = found[block].gains_TE, found[block].routed.rows_TD
        assert gains_TE.shape == (26, 8)
        scale = float(gains_TE.abs().max())
        for token, expert in ((0, 0), (4, 7), (13, 3), (25, 5), (24, 1)):
            losses = []
            for sign in (1, -1):
                with pushed(layer, token, sign * eps * output_of(layer, expert, rows_TD[token])):
                    losses.append(summed_loss(model, batch))
            saved = -(losses[0] - losses[1]) / (2 * eps)
            assert float(gains_TE[token, expert]) == pytest.approx(saved, abs=1e-6 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in routed_layers(model).values())


def test_the_gain_of_a_chosen_expert_is_the_derivative_by_its_weight(build: Build, batches: list[Batch]) -> None:
    """Minus it, from autograd through the layer itself."""
    model, batch = build(*ONE_LAYER).double(), batches[0]
    gains = expert_gains(model, batch)[0]
    weights_A: list[Tensor] = []

    def leaf(_: object, __: object, plan):
        weights_A.append(plan.weights_A.detach().requires_grad_())
        return plan._replace(weights_A=weights_A[0], choices=None)

    hook = routed_layers(model)[0].router.register_forward_hook(leaf)
    with torch.enable_grad():
        loss = model(*batch._replace(targets=1.0)).cross_entropy
    hook.remove()
    (grad_A,) = torch.autograd.grad(loss, weights_A)
    plan = gains.routed.plan
    found_A = gains.gains_TE[plan.token_ids_A, plan.expert_ids_A]
    assert found_A == pytest.approx(-grad_A, abs=1e-9 * float(grad_A.abs().max()))


def test_agreement_of_three_tokens_by_hand(build: Build, batches: list[Batch]) -> None:
    routed = expert_gains(build("model.num_layers=1"), batches[0])[0].routed
    gains_TE = torch.zeros(26, 8)
    chosen = [routed.chosen_TE[token].nonzero().flatten().tolist() for token in range(26)]
    assert all(len(of) == 2 for of in chosen)
    others = [[expert for expert in range(8) if expert not in of] for of in chosen]
    gains_TE[0, chosen[0]] = torch.tensor([3.0, 1.0])
    gains_TE[1, [chosen[1][1], others[1][0]]] = torch.tensor([0.5, 0.7])
    gains_TE[2, :] = -1.0
    gains_TE[2, others[2][3:5]] = -0.5
    found_T = agreement(Gains(routed, gains_TE, routed.real_T))
    assert found_T[:3].tolist() == [1.0, 0.5, 0.0]


def test_means_of_uncertain_and_other_tokens(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model = build()
    thresholds = {0: 0.6, 1: 0.7}
    expected: dict[tuple[int, bool], list[float]] = {(b, kind): [] for b in (0, 1) for kind in (False, True)}
    for batch in batches:
        for block, gains in expert_gains(model, batch).items():
            for token in range(26):  # without padding
                if block == 1 and token in (20, 21, 22):  # the last block's outputs that no label depends on
                    assert not gains.gains_TE[token].any()
                    continue
                best = sorted(range(8), key=lambda e, of=gains.gains_TE[token]: -float(of[e]))[:2]
                chosen = set(gains.routed.chosen_TE[token].nonzero().flatten().tolist())
                kind = float(gains.routed.entropy_T[token]) >= thresholds[block]
                expected[block, kind].append(len(chosen & set(best)) / 2)
    report = measure_agreement(model, batches, runtime, thresholds)
    assert report.chance == 0.25
    for block in report.blocks:
        for kind, found in ((True, block.uncertain), (False, block.certain)):
            values = expected[block.block, kind]
            assert values, "the thresholds leave tokens on both sides"
            assert (found.tokens, found.share) == (len(values), pytest.approx(sum(values) / len(values)))
    assert [b.uncertain.tokens + b.certain.tokens for b in report.blocks] == [3 * 26, 3 * 23]
    assert report.as_dict()["blocks"][0]["certain"]["share"] == report.blocks[0].certain.share
    nobody = measure_agreement(model, batches, runtime, {0: 1.1, 1: 1.1}).blocks[0].uncertain
    assert (nobody.tokens, nobody.share) == (0, None)


def test_the_model_is_as_before(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    measure_agreement(model, batches, runtime)
    for name, value in model.state_dict().items():
        assert_equal_bits(value, before[name], name=name)


def test_experts_on_several_ranks_are_refused(build: Build, batches: list[Batch], runtime: Runtime) -> None:
    model = build()
    routed_layers(model)[0].router.ep = ExpertParallel(2, 0)
    with pytest.raises(ConfigError, match=r"needs all experts on one rank(.|\n)*spread over 2 ranks"):
        measure_agreement(model, batches, runtime)
