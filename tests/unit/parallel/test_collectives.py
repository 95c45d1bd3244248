"""Values and errors that ranks share: one process without a group, and several ranks."""

import threading

import pytest
import torch
from torch import Tensor

from megamoe.common.errors import CheckpointError, DataError, PeerError
from megamoe.parallel import collectives
from megamoe.testing import RankError, assert_close, assert_equal_bits, run_ranks

LIMIT = 20.0  # seconds; a hang ends here, as an error


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def outcome(failing: dict[int, Exception | str]) -> tuple[str, str]:
    """What `together` does on this rank: ("returned", value) or (type, message)."""

    def step() -> str:
        error = failing.get(collectives.rank())
        if error is not None:
            raise Unpicklable() if error == "unpicklable" else error
        return f"value of {collectives.rank()}"

    try:
        return "returned", collectives.together(step)
    except Exception as error:
        return type(error).__name__, str(error)


def test_without_an_error_each_rank_has_its_own_value() -> None:
    assert run_ranks(outcome, 2, {}, timeout=LIMIT) == [("returned", f"value of {rank}") for rank in range(2)]


def test_an_error_of_one_rank_is_raised_by_rank_0_and_ends_the_others() -> None:
    error = DataError("a shard is missing", got="nothing", todo="prepare it")
    first, second, third = run_ranks(outcome, 3, {1: error}, timeout=LIMIT)
    assert first == ("DataError", str(error))
    for kind, message in (second, third):
        assert kind == "PeerError"
        assert "a shard is missing" in message


def test_of_several_errors_the_lowest_rank_is_heard() -> None:
    errors = {1: DataError("one"), 2: CheckpointError("two")}
    kinds = run_ranks(outcome, 3, errors, timeout=LIMIT)
    assert kinds[0] == ("DataError", "one")
    assert [kind for kind, _ in kinds[1:]] == ["PeerError", "PeerError"]


def test_a_defect_keeps_its_type_where_it_happened_and_ends_the_others() -> None:
    first, second = run_ranks(outcome, 2, {1: KeyError("shape")}, timeout=LIMIT)
    assert second == ("KeyError", "'shape'")
    assert first[0] == "PeerError"
    assert "KeyError" in first[1]


def test_a_defect_need_not_pickle() -> None:
    first, second = run_ranks(outcome, 2, {0: "unpicklable"}, timeout=LIMIT)
    assert first == ("Unpicklable", "holds a lock")
    assert second[0] == "PeerError"


def fails_untold() -> None:
    collectives.together(lambda: 1 // collectives.rank())


def test_the_traceback_of_a_defect_shows_its_place() -> None:
    with pytest.raises(RankError, match=r"ZeroDivisionError") as failure:
        run_ranks(fails_untold, 2, timeout=LIMIT)
    assert "1 // collectives.rank()" in str(failure.value)


def test_alone_nothing_is_exchanged() -> None:
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    collectives.barrier()
    assert collectives.gather_objects({"a": 1}) == [{"a": 1}]
    assert collectives.together(lambda: 7) == 7
    with pytest.raises(DataError, match="alone"):
        collectives.together(lambda: (_ for _ in ()).throw(DataError("alone")))
    with pytest.raises(PeerError):
        collectives.together(lambda: (_ for _ in ()).throw(PeerError("gone")))
    values = {"x": torch.tensor([1, 2])}
    assert_equal_bits(collectives.reduce_dict(values, None)["x"], values["x"])
    assert_equal_bits(collectives.all_reduce_sum(torch.tensor([3.0])), torch.tensor([3.0]))
    assert_equal_bits(collectives.all_reduce_max(torch.tensor([3.0])), torch.tensor([3.0]))


def gathered() -> list[dict[str, int]]:
    return collectives.gather_objects({"rank": collectives.rank()})


def test_objects_arrive_in_the_order_of_ranks() -> None:
    assert run_ranks(gathered, 3) == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def values_of(rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "scalar": torch.randn((), generator=generator),
        "matrix": torch.randn(2, 3, generator=generator),
        "empty": torch.empty(0, 2),
        "count": torch.tensor([rank, 5]),
    }


def reduced() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    mine = values_of(collectives.rank())
    if collectives.rank() == 1:
        mine = dict(reversed(mine.items()))  # the order of names must not matter
    total = collectives.reduce_dict(mine, None)
    largest = collectives.reduce_dict(mine, None, "max")
    summed = collectives.all_reduce_sum(mine["matrix"].clone())
    highest = collectives.all_reduce_max(mine["matrix"].clone())
    return total, largest, collectives.reduce_dict({}, None), summed, highest


def test_reductions_of_dictionaries_and_tensors() -> None:
    parts = [values_of(rank) for rank in range(2)]
    for total, largest, nothing, summed, highest in run_ranks(reduced, 2):
        assert nothing == {}
        assert total.keys() == largest.keys() == parts[0].keys()
        for name in parts[0]:
            stacked = torch.stack([part[name] for part in parts])
            assert total[name].dtype == stacked.dtype
            assert_close(total[name].float(), stacked.sum(0).float(), rel=1e-6, name=name)
            assert_equal_bits(largest[name], stacked.amax(0), name=name)
        assert_equal_bits(summed, total["matrix"])
        assert_equal_bits(highest, largest["matrix"])


def reduced_exactly() -> tuple[Tensor, Tensor]:
    """A sum that fp32 cannot hold, and an fp32 value beside it."""
    mine = {"loss": torch.tensor(1.0 + 2.0**-40, dtype=torch.float64), "load": torch.tensor([1.0, 3.0])}
    total = collectives.reduce_dict(mine, None)
    return total["loss"], total["load"]


def test_fp64_keeps_its_digits() -> None:
    for loss, load in run_ranks(reduced_exactly, 2):
        assert_equal_bits(loss, torch.tensor(2.0 + 2.0**-39, dtype=torch.float64))
        assert_close(load, torch.tensor([2.0, 6.0]))
