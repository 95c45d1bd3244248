"""The op `plan`: its specification against a loop that does what a person would, and cases that are easy to check."""

import math
import random

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import KernelUnavailable
from megamoe.ops.plan import PLAN, Plan, plan_rows, reference

INF, NAN = math.inf, math.nan


def by_hand(
    experts_TK: Tensor,
    num_experts: int,
    keys_TK: Tensor | None = None,
    capacity_E: Tensor | None = None,
    slots: int = 0,
    max_rows: int = 0,
) -> Plan:
    experts = experts_TK.flatten().tolist()
    keys = [0] * len(experts) if keys_TK is None else keys_TK.flatten().tolist()
    place, row = [-1] * len(experts), 0
    source = [-1] * (num_experts * slots if slots else max_rows or len(experts))
    counts = [0] * num_experts
    for expert in range(num_experts):
        choices = [choice for choice, chosen in enumerate(experts) if chosen == expert]
        choices.sort(key=lambda choice: (0, 0.0) if math.isnan(keys[choice]) else (1, -keys[choice]))  # stable
        limit = len(choices) if capacity_E is None else max(0, int(capacity_E[expert]))
        if slots:
            limit, row = min(limit, slots), expert * slots
        for choice in sorted(choices[:limit]):
            if row < len(source):
                place[choice], source[row] = row, choice
                counts[expert] += 1
            row += 1
    int32 = torch.int32
    return Plan(torch.tensor(place, dtype=int32).view_as(experts_TK), torch.tensor(source, dtype=int32), _long(counts))


def _long(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def assert_same(plan: Plan, expected: Plan) -> None:
    for name, one, other in zip(Plan._fields, plan, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), f"{name}: {one.tolist()} instead of {other.tolist()}"


def draw_keys(draw: random.Random, choices: int) -> Tensor | None:
    kind = draw.randrange(5)
    if kind == 0:
        return None
    if kind <= 2:
        odd = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, -NAN]
        return torch.tensor([draw.choice(odd) if kind == 1 else draw.gauss(0, 1) for _ in range(choices)])
    low = -2 if kind == 3 else -(2**31)
    return torch.tensor([draw.randint(low, -low - 1) for _ in range(choices)], dtype=torch.int32)


@pytest.mark.parametrize("seed", range(60))
def test_reference_against_a_loop(seed: int) -> None:
    draw = random.Random(seed)
    tokens, top_k, experts = draw.choice([0, 1, 5, 33]), draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 8, 64, 300])
    choices = tokens * top_k
    everyone = draw.choice([-1, 0, experts - 1, experts]) if draw.random() < 0.15 else None
    chosen = [draw.randint(-1, experts) if everyone is None else everyone for _ in range(choices)]
    experts_TK = torch.tensor(chosen, dtype=draw.choice([torch.int32, torch.int64])).view(tokens, top_k)
    keys = draw_keys(draw, choices)
    keys_TK = None if keys is None else keys.view(tokens, top_k)
    capacity_E = _long([draw.randint(-1, 2 * choices // experts + 2) for _ in range(experts)])
    slots = draw.choice([0, 0, 1, 2, 7])
    max_rows = 0 if slots else draw.choice([0, 0, 1, choices // 2, choices + 5])
    for capacity in (None, capacity_E):
        given = (experts_TK, experts, keys_TK, capacity, slots, max_rows)
        assert_same(reference(*given), by_hand(*given))


def test_rows_are_by_expert_and_then_by_choice_not_by_key() -> None:
    experts_TK, keys_TK = torch.tensor([[1, 0], [0, 1], [1, 0]]), torch.tensor([[1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])
    plan = reference(experts_TK, 2, keys_TK, _long([3, 2]))
    assert plan.source_R.tolist() == [1, 2, 5, 3, 4, -1]
    assert plan.place_TK.tolist() == [[-1, 0], [1, 3], [4, 2]]
    assert plan.rows_per_expert_E.tolist() == [3, 2]


@pytest.mark.parametrize(
    "keys, kept",
    [
        ([1.0, 2.0, 2.0, 2.0], [1, 2]),  # ties: the lower choice
        ([0.0, -0.0, 0.0, -1.0], [0, 1]),
        ([-0.0, 0.0, 0.0, -1.0], [0, 1]),
        ([INF, NAN, 1.0, -NAN], [1, 3]),  # NaN is the highest, whatever its sign
        ([-INF, -INF, -1.0, -2.0], [2, 3]),
    ],
)
def test_what_an_expert_prefers(keys: list[float], kept: list[int]) -> None:
    plan = reference(torch.zeros(4, 1, dtype=torch.int64), 1, torch.tensor(keys)[:, None], _long([2]))
    assert plan.source_R.tolist() == [*kept, -1, -1]


def test_slots_leave_holes_where_an_expert_has_fewer() -> None:
    plan = reference(torch.tensor([[2], [0], [2], [2], [5]]), 3, slots=2)
    assert plan.source_R.tolist() == [1, -1, -1, -1, 0, 2]
    assert plan.place_TK.flatten().tolist() == [4, 0, 5, -1, -1]
    assert plan.rows_per_expert_E.tolist() == [1, 0, 2]


def test_what_lies_beyond_the_last_row_is_not_counted() -> None:
    plan = reference(torch.tensor([[2, 0], [1, 2]]), 3, max_rows=3)
    assert plan.source_R.tolist() == [1, 2, 0]
    assert plan.place_TK.tolist() == [[2, 0], [1, -1]]
    assert plan.rows_per_expert_E.tolist() == [1, 1, 1]


def test_slots_and_max_rows_contradict_each_other() -> None:
    with pytest.raises(AssertionError, match="slots"):
        reference(torch.zeros(2, 1, dtype=torch.int64), 2, slots=1, max_rows=2)


def test_keys_need_no_gradient_and_get_none() -> None:
    keys = torch.randn(6, 2, requires_grad=True)
    plan = reference(torch.zeros(6, 2, dtype=torch.int64), 1, keys, _long([5]))
    assert not any(part.requires_grad for part in plan)


def test_plan_rows_runs_what_is_asked_for() -> None:
    experts_TK = torch.tensor([[1, 0], [0, 1]])
    assert_same(plan_rows(experts_TK, 2, implementation="reference"), reference(experts_TK, 2))
    assert_same(plan_rows(experts_TK, 2), reference(experts_TK, 2))
    assert [one.name for one in PLAN.implementations] == ["kernels", "reference"]
    with pytest.raises(KernelUnavailable, match="no implementation of op plan"):
        plan_rows(experts_TK, 2, implementation="other")
