"""From micro-batches on ranks to the numbers of a step, against plain arithmetic on the same numbers."""

import pytest
import torch
from torch import Tensor

from megamoe.model.decoder import ModelOutput
from megamoe.moe.types import LayerAux
from megamoe.parallel.groups import build_groups
from megamoe.parallel.topology import Topology
from megamoe.testing import assert_close, run_ranks
from megamoe.training.metrics import Accumulator, StepMetrics

MICRO_STEPS = 3


def values(rank: int, micro_step: int) -> dict[str, Tensor]:
    """What one micro-batch of one rank reports: any numbers, all different."""
    generator = torch.Generator().manual_seed(100 * rank + micro_step)
    return {
        "loss": torch.randn((), generator=generator),
        "cross_entropy": torch.randn((), generator=generator),
        "balance": torch.randn(2, generator=generator),  # of two layers
        "z": torch.randn((), generator=generator),
        "drop": torch.randn((), generator=generator),
        "max_load": torch.randn(2, generator=generator),
        "load": torch.randn(4, generator=generator),
        "events": torch.randn((), generator=generator),
        "token_sum": torch.randn(5, generator=generator),
        "token_count": torch.randint(1, 9, (1,), generator=generator).float(),
    }


def output(rank: int, micro_step: int) -> ModelOutput:
    v = values(rank, micro_step)
    first = LayerAux(
        losses={"balance_loss": v["balance"][0], "z_loss": v["z"]},
        observations={"token_sum": v["token_sum"], "token_count": v["token_count"]},
        metrics={
            "drop_share": (v["drop"], "mean"),
            "max_load": (v["max_load"][0], "max"),
            "load": (v["load"], "mean"),
            "events": (v["events"], "sum"),
        },
    )
    second = LayerAux({"balance_loss": v["balance"][1]}, {}, {"max_load": (v["max_load"][1], "max")})
    loss = v["loss"].clone().requires_grad_() * 1.0
    return ModelOutput(loss, v["cross_entropy"], (LayerAux({}, {}, {}), first, second))


def reduced(says_so: int) -> StepMetrics:
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    groups = build_groups(Topology(world_size))
    accumulator = Accumulator()
    for micro_step in range(MICRO_STEPS):
        accumulator.add(output(rank, micro_step))
    return accumulator.reduce(groups, {"asked": rank == says_so, "other": False}, busy=1.5 + rank)


@pytest.mark.parametrize("world_size", [1, 2])
def test_against_plain_arithmetic(world_size: int) -> None:
    every = [values(rank, micro_step) for rank in range(world_size) for micro_step in range(MICRO_STEPS)]
    stacked = {name: torch.stack([v[name] for v in every]) for name in every[0]}
    mean = {name: value.mean(0) for name, value in stacked.items()}
    expected = {
        "loss": mean["loss"],
        "cross_entropy": mean["cross_entropy"],
        "balance_loss": mean["balance"].sum(),
        "z_loss": mean["z"],
        "layers.1.drop_share": mean["drop"],
        "layers.1.max_load": stacked["max_load"][:, 0].max(),
        "layers.2.max_load": stacked["max_load"][:, 1].max(),
        "layers.1.load": mean["load"],
        "layers.1.events": stacked["events"].sum(),
    }
    for result in run_ranks(reduced, world_size, -1):
        assert result.values.keys() == expected.keys()
        for name, value in expected.items():
            assert not result.values[name].requires_grad
            assert_close(result.values[name], value, rel=1e-5, abs=1e-6, name=name)
        assert list(result.observations) == [1]
        for name in ("token_sum", "token_count"):
            assert_close(result.observations[1][name], stacked[name].sum(0), rel=1e-5, name=name)
        assert result.flags == {"asked": False, "other": False}
        assert result.busy_P.tolist() == [1.5 + rank for rank in range(world_size)]


def test_every_rank_learns_what_one_says() -> None:
    assert [result.flags for result in run_ranks(reduced, 2, 1)] == [{"asked": True, "other": False}] * 2


def reduced_over_stages() -> StepMetrics:
    rank = torch.distributed.get_rank()
    accumulator = Accumulator()
    accumulator.add(output(rank, 0))
    return accumulator.reduce(build_groups(Topology(2, pp=2)), {"asked": rank == 1}, busy=1.5 + rank)


def test_every_stage_learns_what_the_other_says() -> None:
    for result in run_ranks(reduced_over_stages, 2):
        assert result.flags == {"asked": True}
        assert result.busy_P.tolist() == [1.5, 2.5]


def test_scalars_and_summaries_over_layers() -> None:
    metrics = StepMetrics(
        {
            "loss": torch.tensor(2.0),
            "layers.0.drop_share": torch.tensor(0.25),
            "layers.3.drop_share": torch.tensor(0.75),
            "layers.3.load": torch.ones(4),
        },
        {},
    )
    assert metrics.scalars() == {"loss": 2.0, "layers.0.drop_share": 0.25, "layers.3.drop_share": 0.75}
    assert (metrics.mean("drop_share"), metrics.worst("drop_share")) == (0.5, 0.75)
    assert (metrics.mean("nothing"), metrics.worst("nothing")) == (0.0, 0.0)
