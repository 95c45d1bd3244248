"""The runs of a study: each seed and arm one training process, several side by side, none repeated."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import megamoe
from megamoe.common import env
from megamoe.common.errors import ConfigError, MegamoeError
from megamoe.common.log import get_logger
from megamoe.config.load import load_config
from megamoe.config.run import RunConfig
from megamoe.study.plan import Study, load_arm, start_files
from megamoe.training.checkpoint import folder as folders

LOG = "study.log"
START = "start"
"""Folder of the models that the arms fine-tune; no arm may be called so."""
TAIL_LINES = 15
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""How long a run that was asked to stop may take to save; then it is killed."""

log = get_logger("megamoe.study")


@dataclass(frozen=True, eq=False)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    words: tuple[str, ...]
    """What follows the script."""
    config: RunConfig
    script: str = "pretrain.py"
    """Of the folder launch/."""

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    def checkpoint(self) -> Path | None:
        """The checkpoint of the last step, once it is complete."""
        last = folders.root(self.folder) / folders.final_name(self.config.training.steps)
        return last if (last / folders.MANIFEST).is_file() else None

    def same_configuration(self) -> bool:
        """Whether the folder holds this run, complete or not, rather than one with other settings."""
        try:
            found = load_config([self.folder / "config.json"])
        except MegamoeError:
            return False
        # However the way to its folder is written.
        return _elsewhere(found) == _elsewhere(self.config)

    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.checkpoint() is not None and self.same_configuration()


def _elsewhere(config: RunConfig) -> RunConfig:
    """The same configuration without folders that other words could name as well."""
    finetune = config.finetune.model_copy(update={"checkpoint": ""}) if config.finetune is not None else None
    training = config.training.model_copy(update={"output_dir": ""})
    return config.model_copy(update={"training": training, "finetune": finetune})


@dataclass(frozen=True)
class Failure:
    """A run that did not end well."""

    run: Run
    why: str
    tail: str
    """The last lines of its log."""

    def __str__(self) -> str:
        return f"{self.run.name}: {self.why}; the end of {self.run.folder / LOG}:\n{self.tail}"


@dataclass
class _Process:
    """A run under way."""

    run: Run
    popen: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)


def runs_of(study: Study, folder: Path) -> list[Run]:
    """Every run, all arms of a seed before the next seed: a study that was cut short is paired already."""
    return [_run(study, arm, seed, folder) for seed in study.seeds for arm in study.arms]


def starts_of(study: Study, folder: Path) -> list[Run]:
    """The runs whose models the arms fine-tune, one for each seed; none where the arms pretrain."""
    if study.plan.start is None:
        return []
    files = start_files(study.plan, study.path)
    return [_of(START, seed, _place(folder, START, seed), files, study.plan.start.set, None) for seed in study.seeds]


def _run(study: Study, arm: str, seed: int, folder: Path) -> Run:
    place, overrides = _place(folder, arm, seed), study.arms[arm].overrides
    if study.start is not None:
        overrides = (*overrides, f"finetune.checkpoint={_place(folder, START, seed)}")
    return _of(arm, seed, place, study.files, overrides, study.start)


def _place(folder: Path, arm: str, seed: int) -> Path:
    return folder / arm / f"seed_{seed}"


def _of(
    arm: str, seed: int, folder: Path, files: Sequence[Path], overrides: Sequence[str], start: RunConfig | None
) -> Run:
    overrides = (*overrides, f"training.seed={seed}", f"training.output_dir={folder}")
    words = ("--config", *map(str, files), *overrides)
    script = "pretrain.py" if start is None else "finetune.py"
    return Run(arm, seed, folder, words, load_arm(files, overrides, start), script)


def unfinished(runs: Sequence[Run], fresh: bool, anew: Sequence[Run] = ()) -> list[Run]:
    """The runs that are left to do.

    Args:
        fresh: delete runs that were made with other settings; else they are refused.
        anew: starts that are still to be made: what was fine-tuned from earlier ones counts as made otherwise.

    Raises:
        ConfigError: a folder holds a run with other settings.
    """
    seeds = {start.seed for start in anew}
    there = [run for run in runs if (run.folder / "config.json").exists()]
    strangers = [run for run in there if run.seed in seeds or not run.same_configuration()]
    if strangers and not fresh:
        raise ConfigError(
            "The study's folder holds runs with other settings.",
            got=", ".join(str(run.folder) for run in strangers[:4]) + (" ..." if len(strangers) > 4 else ""),
            expected="an empty folder, or runs of this study, which are continued",
            todo="choose another folder with --runs, or --fresh to delete those runs and make them again",
        )
    for run in strangers:
        shutil.rmtree(run.folder)
    return [run for run in runs if not run.complete()]


def train(runs: Sequence[Run], jobs: int, limit_seconds: float) -> list[Failure]:
    """Train, `jobs` at a time; a failure does not keep the others from running.

    Args:
        limit_seconds: a run that takes longer is ended and counts as failed.

    Returns:
        The failures.
    """
    waiting, failures = list(runs), list[Failure]()
    threads = max(1, env.cpu_count() // jobs)
    with (
        _stop_on_sigterm(),
        tqdm(total=len(runs), desc="runs", unit="run", disable=None) as bar,
        logging_redirect_tqdm([get_logger()]),
        _processes() as running,
    ):
        began = time.monotonic()
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                try:
                    running.append(_start(run, threads))
                except OSError as error:
                    failures.append(Failure(run, f"could not be started: {error}", ""))
                    bar.update()
            time.sleep(POLL_SECONDS)
            for process in [p for p in running if _ended(p, limit_seconds)]:
                running.remove(process)
                failures += _judge(process, limit_seconds)
                bar.update()
                _report(process, len(waiting) + len(running), len(runs), time.monotonic() - began)
    return failures


def _script(name: str) -> Path:
    path = Path(megamoe.__file__).resolve().parents[1] / "launch" / name
    if not path.is_file():
        raise ConfigError(f"launch/{name} is missing.", expected=str(path), todo="start the study from a checkout")
    return path


def _start(run: Run, threads: int) -> _Process:
    run.folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(_script(run.script)), *run.words]
    variables = env.copy_with({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    # A session of its own: Ctrl-C on the terminal reaches us alone, and we decide what becomes of the runs.
    with (run.folder / LOG).open("ab") as output:
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        popen = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
        )
    return _Process(run, popen)


def _ended(process: _Process, limit_seconds: float) -> bool:
    if process.popen.poll() is None and time.monotonic() - process.began > limit_seconds:
        _end([process])
    return process.popen.poll() is not None


def _judge(process: _Process, limit_seconds: float) -> list[Failure]:
    run, code = process.run, process.popen.returncode
    if code == 0 and run.complete():
        return []
    if time.monotonic() - process.began > limit_seconds:
        why = f"not done within {limit_seconds / 60:g} minutes"
    else:
        why = f"exit code {code}" if code else "ended before its last step"
    lines = (run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return [Failure(run, why, "\n".join(lines[-TAIL_LINES:]))]


def _report(process: _Process, left: int, total: int, elapsed: float) -> None:
    done = total - left
    minutes = elapsed / done * left / 60
    seconds = time.monotonic() - process.began
    outcome = "done" if process.run.complete() else "FAILED"
    log.info(
        "%d of %d: %s %s after %.0f s; about %.0f min left", done, total, process.run.name, outcome, seconds, minutes
    )


@contextlib.contextmanager
def _processes() -> Iterator[list[_Process]]:
    """The processes under way; none is left behind, whatever happens."""
    running: list[_Process] = []
    try:
        yield running
    finally:
        if running:
            log.info("stopping %d runs; they save where they are", len(running))
        _end(running)


def _end(processes: Sequence[_Process]) -> None:
    """Ask to save and leave; kill what does not in time."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.popen.wait()


def _signal(process: _Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, number)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the study as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
