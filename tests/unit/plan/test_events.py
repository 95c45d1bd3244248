"""The engine: schedules that can be written down by hand."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from megamoe.plan.events import Placed, Task, length, makespan, run, union, without

TWO = [Task("a", "compute", 2.0), Task("b", "link", 3.0)]


def spans(placed: Sequence[Placed]) -> list[tuple[float, float]]:
    return [(each.start, each.end) for each in placed]


def test_tasks_on_different_resources_run_side_by_side() -> None:
    assert spans(run(TWO)) == [(0, 2), (0, 3)]


def test_a_task_waits_for_its_inputs_and_for_its_turn() -> None:
    program = [*TWO, Task("c", "compute", 1.0, after=(1,)), Task("d", "compute", 1.0)]
    assert spans(run(program)) == [(0, 2), (0, 3), (3, 4), (4, 5)]  # d could begin at 2, but c is before it


def test_tasks_of_no_length_end_where_they_begin() -> None:
    program = [Task("a", "compute", 1.0), Task("none", "host", 0.0, after=(0,)), Task("b", "link", 1.0, after=(1,))]
    assert spans(run(program)) == [(0, 1), (1, 1), (1, 2)]


def test_tasks_side_by_side_slow_each_other_down() -> None:
    """The link takes half of the processor: a has done 1 of 2 when b is over after 2, and needs 1 more."""
    kept = {("compute", "link"): 0.5}
    program = [Task("a", "compute", 2.0), Task("b", "link", 2.0)]
    assert spans(run(program, kept)) == [(0, 3), (0, 2)]
    both = {("compute", "link"): 0.5, ("link", "compute"): 0.25}
    assert spans(run(program, both)) == [(0, 4), (0, 5)]  # b has done 1 of 2 when a is over after 4


def test_a_task_that_waits_for_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match="not before it"):
        run([Task("a", "compute", 1.0, after=(1,)), Task("b", "link", 1.0)])
    with pytest.raises(ValueError, match="takes -1"):
        run([Task("a", "compute", -1.0)])
    with pytest.raises(ValueError, match="takes nan"):
        run([Task("a", "compute", float("nan"))])


@pytest.mark.parametrize("seed", range(20))
def test_any_program_keeps_order_inputs_and_resources(seed: int) -> None:
    draw = random.Random(seed)
    program = [
        Task(
            str(place),
            draw.choice(("compute", "inside", "between")),
            draw.choice((0.0, draw.random())),
            tuple(other for other in range(place) if draw.random() < 0.1),
        )
        for place in range(60)
    ]
    kept = {("compute", "inside"): 0.7, ("inside", "compute"): 0.9}
    placed = run(program, kept)
    assert run(program, kept) == placed
    for each in placed:
        assert each.end - each.start >= each.task.seconds - 1e-9
        assert all(placed[other].end <= each.start + 1e-12 for other in each.task.after)
    for resource in ("compute", "inside", "between"):
        mine = [each for each in placed if each.task.resource == resource]
        assert all(before.end <= after.start + 1e-12 for before, after in pairwise(mine))
        if resource == "between":  # nothing slows it
            assert length(union(spans(mine))) == pytest.approx(sum(each.task.seconds for each in mine))
    assert makespan(placed) >= max(each.task.seconds for each in placed)


def test_sums_of_intervals() -> None:
    assert union([(3, 4), (0, 1), (1, 2), (0.5, 1.5), (5, 5)]) == [(0, 2), (3, 4)]
    assert without([(0, 4)], [(1, 2), (3, 9)]) == [(0, 1), (2, 3)]
    assert without([(0, 1), (2, 3)], [(0, 3)]) == []
    assert without([(0, 1)], []) == [(0, 1)]
    assert length([(0, 2), (3, 4)]) == 3
