"""Jobs on a real SLURM cluster of two nodes (network namespaces, tests/slurm/cluster.sh): what stops them, and that the
training which comes of it is the one that nothing stopped, to the bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megamoe.common import env
from megamoe.testing.launches import QUIET_MACHINE, run_script
from megamoe.testing.runs import Run

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launch" / "slurm" / "pretrain.sbatch"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
NEEDED = ("slurmctld", "slurmd", "srun", "munged", "ip", "nsenter", "unshare", "pgrep")
SECONDS = 120.0
# What does not depend on the clock, nor on which rank runs on which node.
EXACT = re.compile(
    r"step|consumed_.*|loss|cross_entropy|balance_loss|gradient_norm|learning_rate|validation_loss|.*\.load"
)


class Cluster:
    """Nodes node1, node2, … and jobs on them, submitted from a folder whose name has a space."""

    def __init__(self, folder: Path, nodes: int, patience: int) -> None:
        self._folder, self.submitted_from = folder / "cluster", folder / "sub mit"
        self.submitted_from.mkdir(parents=True)
        self.control("up", nodes, SLURMD_TIMEOUT=str(patience))

    def control(self, command: str, *words: object, **variables: str) -> str:
        """A command of tests/slurm/cluster.sh; its output."""
        line = ["bash", str(CLUSTER), command, str(self._folder), *map(str, words)]
        # Not through a pipe: what is started here would hold it open.
        with tempfile.TemporaryFile("w+") as out:
            done = subprocess.run(
                line,
                cwd=self.submitted_from,
                env=env.copy_with(variables),
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
            out.seek(0)
            output = out.read()
        assert done.returncode == 0, f"{line}\n{output}"
        return output

    def client(self, *words: object, **variables: str) -> str:
        """A command of SLURM, on the head."""
        return self.control("run", *words, **variables)

    def submit(self, run: Run, *options: str, words: tuple[str, ...] = (), **variables: str) -> str:
        """Pretrain on two nodes; the job's number."""
        machine = QUIET_MACHINE | {"GLOO_SOCKET_IFNAME": "eth0", "PYTHON": sys.executable, **variables}
        shape = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
        said = self.client("sbatch", "--parsable", *shape, *options, PRETRAIN, *run.words, *words, **machine)
        return said.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows about a job: JobState, Restarts, Reason, …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.client("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str) -> dict[str, str]:
        """Until the job is in one of the states."""
        until(lambda: self.job(number)["JobState"] in states, lambda: f"{self.job(number)}\n{self.log(number)}")
        return self.job(number)

    def log(self, number: str) -> str:
        """What the job wrote."""
        return "".join(path.read_text() for path in self.submitted_from.glob(f"*-{number}.out"))


def until(condition: Callable[[], bool], state: Callable[[], str], seconds: float = SECONDS) -> None:
    """Look again and again, at most for so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s:\n{state()}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for most tests, which leave its nodes up and idle."""
    yield from _cluster(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def patient_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It waits for a silent node for minutes, as clusters do that are not made for tests."""
    yield from _cluster(tmp_path_factory.mktemp("slurm"), patience=300)


@pytest.fixture
def three_nodes(tmp_path: Path) -> Iterator[Cluster]:
    """One more, of three nodes."""
    yield from _cluster(tmp_path, nodes=3)


def _cluster(folder: Path, nodes: int = 2, patience: int = 10) -> Iterator[Cluster]:
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        pytest.skip(f"no SLURM cluster without {', '.join(missing)}")
    if os.geteuid() or subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"]).returncode:
        pytest.skip("no SLURM cluster where namespaces cannot be made")
    try:
        yield Cluster(folder, nodes, patience)
    finally:
        subprocess.run(["bash", str(CLUSTER), "down", str(folder / "cluster")], check=True, timeout=SECONDS)


@pytest.fixture
def run(prepared: Run, tmp_path: Path) -> Run:
    """Saves every ten steps, so that a node's sudden end costs some of them."""
    more = ("training.steps=60", "training.validation.every=20", "training.checkpoint.every=10")
    return prepared.elsewhere(tmp_path / "run of the job", *more)


@pytest.fixture(scope="module")
def straight(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Run], list[dict[str, Any]]]:
    """The same training on as many ranks, with nothing in its way; computed once."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def numbers_of(run: Run) -> list[dict[str, Any]]:
        words = tuple(word for word in run.words if "output_dir" not in word)
        if words not in known:
            alone = Run(run.words, run.folder).elsewhere(folder / str(len(known)), "training.checkpoint.every=0")
            outcomes = run_script(ROOT / "launch/pretrain.py", alone.words, ranks=2, timeout=SECONDS)
            assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
            known[words] = numbers(alone)
        return known[words]

    return numbers_of


def numbers(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if EXACT.fullmatch(name)} for line in run.metrics()]


def reaches(run: Run, step: int, cluster: Cluster, job: str) -> None:
    until(
        lambda: any(line["step"] >= step for line in run.metrics()), lambda: f"{cluster.job(job)}\n{cluster.log(job)}"
    )


Straight = Callable[[Run], list[dict[str, Any]]]


def assert_finished(cluster: Cluster, job: str, run: Run, straight: Straight, restarts: int, steps: int = 60) -> None:
    ended = cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    log = cluster.log(job)
    assert ended["JobState"] == "COMPLETED", log
    assert ended["Restarts"] == str(restarts), log
    assert "finished" in log.splitlines()[-1]
    assert log.count("resumed from") == restarts, log
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, steps + 1))
    assert numbers(run) == straight(run)


def test_a_warned_job_saves_and_goes_on(cluster: Cluster, run: Run, straight: Straight) -> None:
    """The signal that --signal sends, sent at once; the real one takes minutes and is below."""
    words = ("training.steps=40", "training.validation.every=0", "training.checkpoint.every=0")
    run = Run((*run.words, *words), run.folder)
    job = cluster.submit(run)
    reaches(run, 3, cluster, job)
    cluster.client("scancel", "--signal=USR1", job)
    assert_finished(cluster, job, run, straight, restarts=1, steps=40)
    assert f"job {job}: asked to stop, and saved; queued again" in cluster.log(job)
    assert f"job {job}: start 2 of at most 101 on node[1-2]" in cluster.log(job)


@pytest.mark.thorough
def test_the_time_limit(cluster: Cluster, prepared: Run, tmp_path: Path, straight: Straight) -> None:
    """SLURM itself warns, some time within the minute before; and after MAX_RESTARTS the job stays ended."""
    words = ("training.steps=100000", "training.checkpoint.every=0", "training.validation.every=0")
    run = prepared.elsewhere(tmp_path / "run", *words, "training.schedule.type=constant")
    job = cluster.submit(run, "--time=2", "--signal=USR1@60", MAX_RESTARTS="1")
    until(lambda: cluster.job(job)["JobState"] == "FAILED", lambda: cluster.log(job), seconds=420)
    log = cluster.log(job)
    assert cluster.job(job)["ExitCode"] == "75:0"
    assert "asked to stop, and saved; queued again" in log
    assert "not queued again after 1 restarts (MAX_RESTARTS)" in log
    assert "DUE TO TIME LIMIT" not in log
    (resumed,) = re.findall(r"resumed from .*/step_0*(\d+)", log)
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > int(resumed) >= 10
    last = min(int(resumed) + 10, len(steps))
    unbroken = straight(run.elsewhere(tmp_path / "unbroken", f"training.stop_after_step={last}"))
    assert numbers(run)[:last] == unbroken[:last]


@pytest.mark.thorough
def test_a_preempted_job_saves_and_goes_on(cluster: Cluster, run: Run, straight: Straight) -> None:
    job = cluster.submit(run)
    reaches(run, 3, cluster, job)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent-%j.out", "--wrap", "srun hostname")
    other = cluster.client("sbatch", "--parsable", *urgent).strip()
    cluster.wait(other, "COMPLETED")
    assert_finished(cluster, job, run, straight, restarts=1)
    assert "asked to stop, and saved" in cluster.log(job)


@pytest.mark.thorough
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_slurm_notices_a_dead_node(cluster: Cluster, run: Run, straight: Straight, node: str) -> None:
    """It ends the job and queues it again; the batch script runs on node1 and can do no more than not be in the way."""
    job = cluster.submit(run)
    reaches(run, 14, cluster, job)
    cluster.control("kill", node)
    cluster.wait(job, "PENDING")
    cluster.control("start", node)
    assert_finished(cluster, job, run, straight, restarts=1)
    assert re.search("resumed from .*/step_000000[12]0", cluster.log(job))


@pytest.mark.thorough
@pytest.mark.parametrize("fault, repair", [("kill", "start"), ("cut", "mend")])
def test_the_ranks_notice_a_dead_node_first(
    patient_cluster: Cluster, run: Run, straight: Straight, fault: str, repair: str
) -> None:
    """Neither a dead node nor a cut cable closes a connection: the limit of a collective ends the ranks that are left.

    The batch script then finds out which node is silent.
    """
    job = patient_cluster.submit(run, words=("training.timeout_minutes=0.25",))
    reaches(run, 14, patient_cluster, job)
    patient_cluster.control(fault, "node2")
    message = f"job {job}: no answer from node2; queued again"
    until(lambda: message in patient_cluster.log(job), lambda: patient_cluster.log(job), seconds=240)
    patient_cluster.control(repair, "node2")
    assert_finished(patient_cluster, job, run, straight, restarts=1)
    assert re.search("resumed from .*/step_000000[12]0", patient_cluster.log(job))


@pytest.mark.thorough
def test_a_cancelled_job_stays_ended(cluster: Cluster, run: Run) -> None:
    """It saves as well, for SIGTERM comes first, but nobody wants it to be queued again."""
    job = cluster.submit(run)
    reaches(run, 3, cluster, job)
    cluster.client("scancel", job)
    cluster.wait(job, "CANCELLED", "PENDING", "COMPLETED")
    assert cluster.job(job)["JobState"] == "CANCELLED", cluster.log(job)
    assert cluster.job(job)["Restarts"] == "0"
    assert "SLURM had ended the job itself" in cluster.log(job)


@pytest.mark.thorough
def test_a_wrong_configuration_fails_with_its_reason(cluster: Cluster, run: Run) -> None:
    job = cluster.submit(run, words=("training.stepz=3",))
    assert cluster.wait(job, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert cluster.log(job).count("did you mean training.steps?") == 1, "said once, not by every rank"
    assert "failed with exit code 2; the reason is above" in cluster.log(job)


@pytest.mark.thorough
def test_an_array_trains_seeds(cluster: Cluster, prepared: Run, tmp_path: Path) -> None:
    """One task of it is warned, and goes on without the other being disturbed."""
    run = prepared.elsewhere(tmp_path / "seeds", "training.steps=60")
    job = cluster.submit(run, "--array=0,7", "--nodes=1", "--ntasks-per-node=2")
    seeds = {seed: Run(run.words, run.folder / f"seed_{seed}") for seed in (0, 7)}
    reaches(seeds[7], 3, cluster, f"{job}_7")
    cluster.client("scancel", "--signal=USR1", f"{job}_7")
    for seed, restarts in ((0, "0"), (7, "1")):
        ended = cluster.wait(f"{job}_{seed}", "COMPLETED", "FAILED")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts), cluster.log("*")
        assert json.loads((seeds[seed].folder / "config.json").read_text())["training"]["seed"] == seed
        assert [line["step"] for line in seeds[seed].metrics() if "loss" in line] == list(range(1, 61))


@pytest.mark.thorough
def test_preflight_names_the_slow_node(three_nodes: Cluster, tmp_path: Path) -> None:
    """As a user starts it; one of three cables is slow."""
    names = tmp_path / "bad nodes"
    machine = QUIET_MACHINE | {"GLOO_SOCKET_IFNAME": "eth0", "PYTHON": sys.executable}
    start = ["bash", ROOT / "launch" / "preflight.sh", "--nodes=3", "--ntasks-per-node=1", "--"]
    options = ["--megabytes", "1", "--folder", tmp_path, "--refused", names]
    three_nodes.control("slow", "node3", "40mbit")
    said = three_nodes.client("bash", "-c", '"$@"; echo "exit code $?"', "-", *start, *options, **machine)
    assert "exit code 3" in said
    assert names.read_text() == "node3\n"
    rows = {line.split()[0]: line for line in said.splitlines() if line.startswith("node")}
    assert re.search(r"refused: 0\.00\d+ GB/s with node[12]; at least", rows["node3"]), said
    assert rows["node1"].endswith("good")
    assert rows["node2"].endswith("good")


@pytest.mark.thorough
def test_a_job_looks_at_its_nodes_first(cluster: Cluster, run: Run, straight: Straight) -> None:
    """PREFLIGHT: links and two steps of parity on all ranks, then the training; and no training on refused nodes."""
    job = cluster.submit(run, PREFLIGHT="--megabytes 1 --min-disk 0.001")
    assert_finished(cluster, job, run, straight, restarts=0)
    assert "parity, ep2, zero 1, topk, dropless, fp32: equal" in cluster.log(job)
    assert "none of 2 nodes refused" in cluster.log(job)
    job = cluster.submit(run, PREFLIGHT="--megabytes 1 --min-bandwidth 1e6")
    assert cluster.wait(job, "FAILED", "COMPLETED")["ExitCode"] == "3:0"
    assert "refused: node1,node2" in cluster.log(job)
    assert "step 1/" not in cluster.log(job)


@pytest.mark.thorough
def test_a_hostfile_without_slurm(cluster: Cluster, run: Run, straight: Straight) -> None:
    """DeepSpeed's launcher, started on each host by hand; of the cluster, only the hosts are used."""
    (cluster.submitted_from / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    deepspeed = Path(sys.executable).parent / "deepspeed"
    start = [deepspeed, "--hostfile=hosts", "--no_ssh", "--master_addr=node1"]

    def on(rank: int) -> str:
        words = [*start, f"--node_rank={rank}", ROOT / "launch" / "pretrain.py", *run.words]
        return cluster.control("on", f"node{rank + 1}", *words, **QUIET_MACHINE | {"GLOO_SOCKET_IFNAME": "eth0"})

    with ThreadPoolExecutor() as pool:
        list(pool.map(on, (0, 1)))
    assert numbers(run) == straight(run)
