"""What is wrong with a node beside the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megamoe.testing.nodes import Facts, complaints, facts, gpu_problems

GOOD = Facts("", {"torch": "2.13.0", "python": "3.11.2"}, ("H100", "H100"), free_bytes=10**12)


def cluster(**changes: Facts) -> list[Facts]:
    """Four nodes, a to d."""
    return [replace(changes.get(host, GOOD), host=host) for host in "abcd"]


def test_nodes_that_are_alike_are_good() -> None:
    assert complaints(cluster(), dict.fromkeys("abcd", 0.0), 1e9) == {}


def test_what_most_have_is_right() -> None:
    """Also where the first node is the odd one."""
    odd = replace(GOOD, versions={"torch": "2.12.1"}, gpus=("H100",))
    assert complaints(cluster(a=odd), {}, 0) == {
        "a": [
            "torch 2.12.1, others 2.13.0",
            "python missing, others 3.11.2",
            "GPUs 1 x H100, others 2 x H100",
        ]
    }


def test_full_disks_and_what_a_node_found_itself() -> None:
    found = complaints(cluster(b=replace(GOOD, free_bytes=5 * 10**8), c=replace(GOOD, problems=("broken",))), {}, 1e9)
    assert found == {"b": ["0.5 GB free, at least 1 wanted"], "c": ["broken"]}


def test_the_clock_that_is_off_is_not_the_first_ones_measure() -> None:
    assert complaints(cluster(), {"a": 0.0, "b": 7.0, "c": 7.1, "d": 7.0}, 0) == {"a": ["clock -7.0 s off the others'"]}
    assert complaints(cluster(), {"a": 0.0, "b": -1.5, "c": 0.2, "d": 0.0}, 0) == {}


def test_gpus_that_are_in_use_or_have_errors() -> None:
    table = "0, 512, 81559, 0\n1, 40000, 81559, 3\n2, 0, 81559, [N/A]\n"
    assert gpu_problems(table) == ["GPU 1 is in use: 40000 of 81559 MiB", "GPU 1 has 3 uncorrected memory errors"]


def test_looking_around_leaves_nothing(tmp_path: Path) -> None:
    found = facts({"torch": "2.13.0"}, [], tmp_path)
    assert found.free_bytes > 0
    assert [problem for problem in found.problems if "write" in problem] == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (problem,) = (p for p in facts({}, [], tmp_path / "none").problems if "write" in p)
    assert "No such file" in problem
