"""Ranks as torchrun, DeepSpeed's launcher, srun and a plain start give them."""

import os

import pytest

from megamoe.common import env
from megamoe.common.errors import TopologyError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
ADDRESS = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-09],login1",
}


@pytest.fixture
def environment(monkeypatch):
    """Starts from an environment without any launcher and returns a function that sets variables."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")):
            monkeypatch.delenv(name)

    def set_all(*variables: dict[str, str]) -> None:
        for name, value in {k: v for group in variables for k, v in group.items()}.items():
            monkeypatch.setenv(name, value)

    return set_all


def who() -> tuple[int, int, int, int]:
    return env.rank(), env.world_size(), env.local_rank(), env.local_world_size()


def where() -> tuple[str, int]:
    return env.master_address(), env.master_port()


def test_a_plain_start_is_one_process(environment) -> None:
    environment()
    assert who() == (0, 1, 0, 1)
    assert where() == ("127.0.0.1", 29500)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_launchers_that_set_rank(environment, variables) -> None:
    environment(variables, ADDRESS, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})
    assert who() == (3, 4, 1, 2)
    assert where() == ("10.0.0.7", 4321)


def test_srun(environment) -> None:
    environment(SRUN)
    assert env.launcher() == "srun"
    assert who() == (5, 7, 1, 3)
    assert where() == ("gpu07", 20000 + 31 * 77 + 2)


def test_srun_gives_every_rank_of_the_job_one_port_and_every_step_another(environment) -> None:
    environment(SRUN, {"SLURM_PROCID": "0"})
    first = env.master_port()
    environment({"SLURM_PROCID": "6"})
    assert env.master_port() == first
    environment({"SLURM_STEP_ID": "3"})
    assert env.master_port() != first


def test_a_batch_script_without_srun_is_one_process(environment) -> None:
    environment({name: value for name, value in SRUN.items() if "STEP" not in name}, {"SLURM_PROCID": "0"})
    assert who() == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "broken, part",
    [
        ({"RANK": "0"}, "RANK alone"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE alone"),
        ({**TORCHRUN, "RANK": "one"}, "'one'"),
        ({**TORCHRUN, "RANK": "-1"}, "'-1'"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "'0'"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, "many"),
        ({**SRUN, "SLURM_NODEID": "2"}, "node 2 of 4,3"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "nothing"),
    ],
)
def test_broken_variables_are_an_error_that_shows_them(environment, broken, part) -> None:
    environment(broken)
    with pytest.raises(TopologyError, match=part):
        who()


@pytest.mark.parametrize(
    "node_list, host",
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]n[04-08]", "rack1n04"),
        ("x[1-2]-ib,y", "x1-ib"),
    ],
)
def test_first_host(node_list, host) -> None:
    assert env.first_host(node_list) == host


@pytest.mark.parametrize(
    "node_list, expected",
    [
        ("node1", ["node1"]),
        ("gpu[07-09,12],login1", ["gpu07", "gpu08", "gpu09", "gpu12", "login1"]),
        ("rack[1-2]n[09-10]", ["rack1n09", "rack1n10", "rack2n09", "rack2n10"]),
        ("x[1-2]-ib,y", ["x1-ib", "x2-ib", "y"]),
    ],
)
def test_hosts_of_a_node_list(node_list, expected) -> None:
    assert env.hosts(node_list) == expected


def test_where_srun_started_a_rank(environment) -> None:
    environment(SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1,1"})
    assert [env.host_of(rank) for rank in range(7)] == [*["gpu07"] * 2, *["gpu08"] * 2, "gpu09", "login1", None]
    environment(TORCHRUN)
    assert env.host_of(0) is None, "the ranks of this launcher are not srun's"


def test_tasks_per_node_in_runs(environment) -> None:
    environment(SRUN, {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"})
    counts = []
    for node in range(3):
        environment({"SLURM_NODEID": str(node)})
        counts.append(env.local_world_size())
    assert counts == [2, 2, 1]


def test_export_rendezvous_writes_what_torch_reads(environment, monkeypatch) -> None:
    environment(SRUN)
    written: dict[str, str] = {}
    monkeypatch.setattr(env, "export", written.__setitem__)
    env.export_rendezvous()
    assert written == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "22389",
    }


def test_defaults_and_flags(environment) -> None:
    environment({"MEGAMOE_A": "mine", "MEGAMOE_EMPTY": "", "MEGAMOE_ON": "Yes", "MEGAMOE_OFF": "0"})
    env.set_default("MEGAMOE_A", "other")
    assert env.get("MEGAMOE_A") == "mine"
    assert env.get("MEGAMOE_EMPTY", "default") == "default"
    assert env.flag("MEGAMOE_ON")
    assert not env.flag("MEGAMOE_OFF")
    assert not env.flag("MEGAMOE_NOT_THERE")
