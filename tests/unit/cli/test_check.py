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
    assert "ep groups: [0 1] [2 3]" in done.stdout


@pytest.mark.parametrize(
    "words, hint",
    [
        (["check", TINY, "training.stepz=3"], "did you mean training.steps?"),
        (["check", TINY, "parallel.ep=3"], "8 experts do not divide over parallel.ep 3"),
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


def test_check_imports_no_torch() -> None:
    call = f"main(['check', {TINY!r}])"
    code = f"import sys; from megamoe.cli import main; {call}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0


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
