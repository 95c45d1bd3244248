"""The launch scripts as a user starts them: under a real launcher, or the script alone inside `run_ranks`.

The second costs no import of torch and DeepSpeed (4 seconds per process), so it is for whatever does not depend on how
the processes were started.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from megamoe.common import env, main
from megamoe.common.errors import EXIT_CODE
from megamoe.testing.ranks import CPU_ONLY, run_ranks

Launcher = Literal["python", "deepspeed", "torchrun"]

# Nothing reaches a network.
QUIET_MACHINE = {**CPU_ONLY, "WANDB_MODE": "offline"}


@dataclass(frozen=True)
class Outcome:
    """How a process ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Both streams, one after the other."""
        return self.stdout + self.stderr


def command(
    launcher: Launcher, script: str | Path, words: Sequence[str], ranks: int = 1, port: int | None = None
) -> list[str]:
    """The command line; where a launcher needs a port, this one or a free one."""
    binaries, port = Path(sys.executable).parent, port or free_port()
    match launcher:
        case "deepspeed":
            start = [f"{binaries}/deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port)]
        case "torchrun":
            start = [f"{binaries}/torchrun", "--nproc-per-node", str(ranks), "--master-port", str(port)]
        case _:
            start = [sys.executable]
    return [*start, str(script), *words]


def free_port() -> int:
    """A port that nobody holds at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(words: Sequence[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running command in a process group of its own, which is gone afterwards.

    Args:
        words: the command.
        folder: takes its output, `stdout` and `stderr`; files, so that a full pipe never stops the command.
        environment: variables besides `QUIET_MACHINE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        variables = env.copy_with(QUIET_MACHINE | environment)
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=variables, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome(process: subprocess.Popen[bytes], folder: Path, timeout: float) -> Outcome:
    """Wait for a process of `started` and read what it wrote.

    Raises:
        subprocess.TimeoutExpired: it did not end in time; with what it wrote.
    """
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        written = (folder / "stdout").read_text(), (folder / "stderr").read_text()
        raise AssertionError(f"no end within {timeout:g} s:\n{written[0]}\n{written[1]}") from error
    return Outcome(process.returncode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def launch(
    launcher: Launcher,
    script: str | Path,
    words: Sequence[str],
    ranks: int = 1,
    *,
    timeout: float = 120.0,
    **environment: str,
) -> Outcome:
    """Run a script under a launcher to its end."""
    with tempfile.TemporaryDirectory(prefix="megamoe-launch-") as name:
        folder = Path(name)
        with started(command(launcher, script, words, ranks), folder, **environment) as process:
            return outcome(process, folder, timeout)


def one_error(*outcomes: Outcome) -> str:
    """The text of the one error that all processes of a run together gave; the exit code of each was 2.

    Raises:
        AssertionError: another exit code, a traceback, no error or several, or one without advice.
    """
    everything = "".join(outcome.output for outcome in outcomes)
    codes = [outcome.returncode for outcome in outcomes]
    assert codes == [EXIT_CODE] * len(codes), f"exit codes {codes}\n{everything}"
    assert "Traceback" not in everything, everything
    errors = list(re.finditer(r"^(?:\[rank \d+\] )?\w*Error: .*\n(?: +.*\n)*", everything, re.MULTILINE))
    assert len(errors) == 1, f"{len(errors)} errors\n{everything}"
    text = errors[0].group()
    assert "\n  to do: " in text, text
    return text


def run_script(script: str | Path, words: Sequence[str], ranks: int = 1, timeout: float = 60.0) -> list[Outcome]:
    """Run a script on ranks that have imported torch and DeepSpeed already; how each of them ended."""
    return run_ranks(script_on_this_rank, ranks, str(script), list(words), init=False, timeout=timeout)


def script_on_this_rank(path: str, words: list[str]) -> Outcome:
    """What `run_script` does on each rank, for functions of a test that prepare something before."""
    sys.argv = [path, *words]
    # Here no launcher ends the other ranks when one has failed.
    main.LINGER_SECONDS = 0.0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _redirected(out, err):
            code = _exit_code(path)
        return Outcome(code, _content(out), _content(err))


def script_in_this_process(path: str, words: Sequence[str], output: str) -> int:
    """As `script_on_this_rank`, for a process that ends with it: into `<output>.out` and `.err`; the exit code."""
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, main.LINGER_SECONDS = [path, *words], 0.0
    return _exit_code(path)


def _exit_code(path: str) -> int:
    """Run the script as the main program."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


@contextlib.contextmanager
def _redirected(out: IO[bytes], err: IO[bytes]) -> Iterator[None]:
    """Send what this process writes there, also what C libraries write."""
    kept = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
