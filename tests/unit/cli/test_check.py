"""`python -m megamoe check` as a user meets it, and the frame around every entry point."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamoe.cli import check, main
from megamoe.common import main as frame
from megamoe.common.errors import ConfigError, MegamoeError, PeerError
from megamoe.config.schema import schema_text

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "configs" / "tiny.yaml")
LAUNCH = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_ID",
)


def megamoe(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    command = [sys.executable, "-m", "megamoe", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_a_good_configuration_is_described() -> None:
    done = megamoe("check", TINY, "--world-size", "4", "training.steps=50")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for title in (
        "Configuration",
        "Topology of 4 ranks",
        "Parameters",
        "Memory per rank",
        "DeepSpeed configuration",
    ):
        assert title in done.stdout
    assert '"steps": 50' in done.stdout
    assert "ep groups: 2 neighbours, inside a node: [0 1] [2 3]" in done.stdout


def test_a_large_world_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.num_layers=8", "parallel={tp: 4, ep: 8, pp: 2}", "training.global_batch_size=512"]
    assert main(["check", *words, "--world-size", "64"]) == 0
    text = capsys.readouterr().out
    for line in (
        "8 nodes of 8 ranks\n",
        "tp groups: 4 neighbours, inside a node: [0 1 2 3] [4 5 6 7]",
        "pp groups: 2 ranks, 32 apart, across 2 nodes: [0 32] [1 33]",
        "(2 - 1) / (16 micro-batches + 2 - 1) = 5.9% of a step",
        "each sequence over cp 1 x tp 4 = 4 ranks: 64 positions on each",
    ):
        assert line in text
    stages = text.split("Pipeline\n--------\n")[1].splitlines()[1:3]
    assert [line.split()[:4] for line in stages] == [["0", "0-31", "0-4", "5"], ["1", "32-63", "5-7", "3"]]
    assert [line.split("MiB")[1].strip() for line in stages] == ["embedding", "last norm, head"]


def test_the_map_knows_how_large_a_node_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TINY, "parallel.tp=4", "--world-size", "16", "--gpus-per-node", "2"]) == 0
    assert "tp groups: 4 neighbours, across 2 nodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, hint",
    [
        (["check", TINY, "training.stepz=3"], "did you mean training.steps?"),
        (["check", TINY, "parallel.ep=3"], "8 experts do not divide over parallel.ep 3: 8 % 3 = 2; use 9"),
        (["check", TINY, "parallel.tp=3"], "3 does not divide model.num_heads 4: 4 % 3 = 1; use 2"),
        (["check", TINY, "parallel.pp=2", "parallel.zero_stage=3"], "3 does not go with parallel.pp 2"),
        (["check", TINY, "--gpus-per-node", "0"], "A node holds at least one rank"),
        (["check", TINY, "--world-size", "3"], "3 % 2 = 1"),
        (["check", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["check", "--write-schema", "no/such/folder/schema.json"], "cannot be written"),
        (["check", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["chek"], "invalid choice: 'chek'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], hint: str) -> None:
    done = megamoe(*words)
    assert done.returncode == 2
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_least_world_size_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TINY]) == 0
    assert "Topology of 2 ranks" in capsys.readouterr().out


def test_the_schema_is_written(tmp_path: Path) -> None:
    assert main(["check", "--write-schema", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == schema_text()


def test_an_existing_file_is_a_file_even_with_an_equals_sign(tmp_path: Path) -> None:
    odd = tmp_path / "lr=3.yaml"
    odd.write_text("", encoding="utf-8")
    assert check.split([str(odd), "training.seed=1", "a.yaml"]) == ([str(odd), "a.yaml"], ["training.seed=1"])


def heavy_imports(*words: str) -> tuple[list[str], str]:
    """Which of the slow packages `check` has imported by the time it is through, and what it raised."""
    code = f"""import sys
from megamoe.cli import main
try:
    main({["check", *words]!r})
except Exception as error:
    print(error, file=sys.stderr)
print(*[name for name in ("torch", "deepspeed", "numpy") if name in sys.modules], "imported")"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()[-1].split()[:-1], done.stderr


@pytest.mark.parametrize(
    "words, refusal",
    [
        ([], ""),
        (["parallel={tp: 2, pp: 2, ep: 4}", "--world-size", "16", "training.global_batch_size=64"], ""),
        (["parallel={tp: 3, pp: 5, ep: 3, etp: 5, zero_stage: 3}", "moe.dispatcher=padded"], "problems"),
        (["parallel={pp: 2, zero_stage: 3}"], "3 does not go with parallel.pp 2"),
        (["parallel.ep=4", "--world-size", "6"], "6 % 4 = 2"),
    ],
)
def test_check_imports_nothing_slow_whether_it_refuses_or_not(words: list[str], refusal: str) -> None:
    """So it answers in well under a second: importing torch alone takes longer."""
    imported, said = heavy_imports(TINY, *words)
    assert imported == []
    assert refusal in said
    assert bool(said) == bool(refusal)


def failing(error: Exception) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setattr(frame, "LINGER_SECONDS", 0.0)
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)

    def become(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return become


@pytest.mark.parametrize(
    "rank, error, printed",
    [
        (0, ConfigError("It is wrong.", got="this"), "ConfigError: It is wrong.\n  got: this\n"),
        (1, ConfigError("It is wrong."), "[rank 1] ConfigError: It is wrong.\n"),
        (0, PeerError("rank 1 failed"), ""),
        (1, PeerError("rank 0 failed"), ""),
    ],
)
def test_errors_of_the_user_become_text_and_exit_code_2(
    as_rank: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    rank: int,
    error: MegamoeError,
    printed: str,
) -> None:
    as_rank(rank)
    with pytest.raises(SystemExit) as left:
        frame.run_main(failing(error))
    assert left.value.code == 2
    assert capsys.readouterr().err == printed


def test_an_incomplete_launch_still_prints(
    as_rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(1)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit):
        frame.run_main(failing(ConfigError("It is wrong.")))
    assert capsys.readouterr().err == "ConfigError: It is wrong.\n"


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        frame.run_main(failing(ZeroDivisionError()))


def test_the_exit_code_of_the_command_is_kept() -> None:
    with pytest.raises(SystemExit) as left:
        frame.run_main(lambda: 3)
    assert left.value.code == 3
