"""run_ranks: results in order, failures that name the rank, never a hang, nothing left behind."""

import importlib.util
import os
import signal
import sys
import threading
import types

import pytest
import torch
import torch.distributed as dist

from megamoe.common.errors import TopologyError
from megamoe.testing import RankError, RankTimeout, run_ranks


class Shape:
    """A class of the test file itself, to see that it travels both ways."""

    def __init__(self, sides: int) -> None:
        self.sides = sides

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shape) and self.sides == other.sides

    __hash__ = None


def summed(offset: float) -> tuple[int, torch.Tensor]:
    value = torch.full((3,), dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), value


def grown(shape: Shape) -> Shape:
    return Shape(shape.sides + dist.get_rank())


def pair_sum() -> float:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=pairs[dist.get_rank() // 2])
    return value.item()


def surroundings() -> dict[str, object]:
    return {
        "rank": os.environ["RANK"],
        "threads": torch.get_num_threads(),
        "initialised": dist.is_initialized(),
        "engine": "deepspeed" in sys.modules,
    }


def forms_own_group() -> int:
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    return int(value.item())


def leaves_mark() -> bool:
    before = hasattr(torch, "mark_of_this_test")
    torch.mark_of_this_test = True
    return before


def rank_1_raises() -> None:
    if dist.get_rank() == 1:
        raise TopologyError("no place", got="2 ranks", expected="3", todo="add one")
    dist.barrier()


def rank_1_raises_what_cannot_travel() -> None:
    if dist.get_rank() == 1:
        error = RuntimeError("holds a lock")
        error.lock = threading.Lock()
        raise error


def rank_0_is_killed() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_1_leaves_quietly() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def rank_0_hangs_here() -> None:
    if dist.get_rank() == 0:
        threading.Event().wait()


def test_results_come_in_rank_order_and_tensors_by_value() -> None:
    results = run_ranks(summed, 2, 10.0)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(value, torch.full((3,), 21.0)) for _, value in results)


def test_classes_of_the_test_file_travel_both_ways() -> None:
    assert run_ranks(grown, 2, Shape(3)) == [Shape(3), Shape(4)]


def test_a_file_outside_every_package_can_be_used(tmp_path, monkeypatch) -> None:
    path = tmp_path / "single.py"
    path.write_text("import os\ndef rank(): return os.environ['RANK']\n")
    spec = importlib.util.spec_from_file_location("nowhere.below.single", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "nowhere", types.ModuleType("nowhere"))
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert run_ranks(module.rank, 2) == ["0", "1"]


def test_functions_make_their_own_groups() -> None:
    assert run_ranks(pair_sum, 4) == [1.0, 1.0, 5.0, 5.0]


def test_a_rank_has_one_thread_its_variables_and_the_engine_at_hand() -> None:
    before = dict(os.environ)
    expected = {"threads": 1, "initialised": True, "engine": True}
    assert run_ranks(surroundings, 2) == [{"rank": "0", **expected}, {"rank": "1", **expected}]
    assert dict(os.environ) == before


def test_without_init_the_function_forms_the_group_from_the_environment() -> None:
    assert run_ranks(forms_own_group, 2, init=False) == [2, 2]


def test_calls_do_not_see_each_other() -> None:
    assert run_ranks(leaves_mark, 1) == run_ranks(leaves_mark, 1) == [False]


def test_an_exception_names_its_rank_and_keeps_its_type() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed \(TopologyError\)") as failure:
        run_ranks(rank_1_raises, 2)
    assert failure.value.rank == 1
    assert isinstance(failure.value.error, TopologyError)
    assert failure.value.error.got == "2 ranks"
    assert "in rank_1_raises" in str(failure.value)


def test_an_exception_that_cannot_be_pickled_still_shows_its_traceback() -> None:
    with pytest.raises(RankError, match="holds a lock") as failure:
        run_ranks(rank_1_raises_what_cannot_travel, 2)
    assert failure.value.error is None
    assert failure.value.kind == "RuntimeError"


@pytest.mark.parametrize(
    "fn, rank, how", [(rank_0_is_killed, 0, "ended by SIGKILL"), (rank_1_leaves_quietly, 1, "exit code 3")]
)
def test_a_rank_that_dies_is_named_rather_than_its_victims(fn, rank, how) -> None:
    with pytest.raises(RankError, match=how) as failure:
        run_ranks(fn, 2)
    assert (failure.value.rank, failure.value.kind) == (rank, "died")


def test_a_hang_ends_at_the_limit_and_shows_where_the_rank_stood() -> None:
    with pytest.raises(RankTimeout, match="rank_0_hangs_here"):
        run_ranks(rank_0_hangs_here, 2, timeout=3.0)
    assert run_ranks(summed, 1, 0.0)[0][0] == 0


def test_no_process_is_left(tmp_path) -> None:
    with pytest.raises(RankError):
        run_ranks(writes_pid_then_fails, 2, str(tmp_path))
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def writes_pid_then_fails(folder: str) -> None:
    open(f"{folder}/{os.getpid()}", "w").close()
    dist.barrier()
    raise ValueError("as planned")
