"""`python -m megamoe preflight`: ranks that play several nodes, a silent one, and a launch as a user starts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamoe.cli import main
from megamoe.common import env
from megamoe.common.errors import ConfigError, TopologyError
from megamoe.testing.launches import launch
from megamoe.testing.nodes import Facts
from megamoe.testing.preflight import Options, Result, preflight
from megamoe.testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The command is called inside this process, and a process alone exports that it is rank 0 of 1."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def check_as_a_node_of_its_own(megabytes: float, minimum: float) -> tuple[int, Result | None]:
    """Each rank is a node, and the last one has another version of something."""
    results: list[Result] = []

    def publish(result: Result) -> int:
        results.append(result)
        return 42

    last = env.rank() == env.world_size() - 1
    facts = Facts(f"node{env.rank()}", {"torch": "2.12" if last else "2.13"}, free_bytes=10**10)
    code = preflight(Options(minimum, 1e9, megabytes, 30.0, None), facts, publish)
    return code, results[0] if results else None


def test_the_link_of_two_nodes() -> None:
    (code, result), (other_code, _) = run_ranks(check_as_a_node_of_its_own, 2, 1.0, 1000.0, init=False)
    assert (code, other_code) == (42, 42)
    assert result is not None
    assert result.ranks == {"node0": [0], "node1": [1]}
    assert result.rates is not None
    assert 0.001 < result.rates.between["node0", "node1"] < 1000
    version, link = result.refused["node1"]
    assert version == "torch 2.12, others 2.13"
    assert "GB/s with node0, and it may as well be that one; at least 1e+03 expected" in link
    assert len(result.refused["node0"]) == 1
    assert all(abs(seconds) < 10 for seconds in result.clocks.values())


def check_unless_last() -> Result | None:
    if env.rank() == env.world_size() - 1:
        return None  # it never says anything
    results: list[Result] = []

    def publish(result: Result) -> int:
        results.append(result)
        return 0

    preflight(Options(0.0, 0.0, None, 2.0, None), Facts(f"node{env.rank()}", {"torch": "2.13"}), publish)
    return results[0] if results else None


def test_a_node_that_does_not_answer_is_named_within_the_limit() -> None:
    result, *_ = run_ranks(check_unless_last, 3, init=False, timeout=60)
    assert result is not None
    assert result.refused == {"(host of rank 2)": ["does not answer"]}
    assert result.rates is None


@pytest.mark.thorough
def test_as_a_user_starts_it(tmp_path: Path) -> None:
    names = tmp_path / "bad nodes"
    words = ["megamoe", "preflight", "--megabytes", "1", "--folder", str(tmp_path), "--refused", str(names)]
    done = launch("torchrun", "-m", words, 2, timeout=300)
    assert done.returncode == 0, done.output
    header, node, parity, verdict = done.stdout.splitlines()
    assert header.split()[:3] == ["host", "ranks", "GPUs"]
    assert node.split()[1] == "0-1"
    assert node.endswith("good")
    assert parity.startswith("parity, ep2, zero 1, topk, dropless, fp32: equal")
    assert verdict == "none of 1 nodes refused"
    assert names.read_text() == ""


def test_alone_it_looks_at_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "refused"
    words = ["preflight", "--folder", str(tmp_path), "--min-disk", "1e9", "--refused", str(names)]
    assert main(words) == 3
    printed = capsys.readouterr().out
    assert "at least 1e+09 wanted" in printed
    assert printed.splitlines()[-1] == f"refused: {names.read_text().strip()}"


@pytest.mark.parametrize("words", [["--limit", "0"], ["--min-bandwidth", "-1"], ["--steps", "0"]])
def test_bad_input(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="makes no sense"):
        main(["preflight", *words])


def test_a_layout_of_other_ranks_is_refused_before_anyone_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError, match="tp2, which is 2 ranks"):
        main(["preflight", "--parity", "tp2"])
