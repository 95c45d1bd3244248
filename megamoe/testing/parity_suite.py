"""The parity suite: every case of a plan against one process, on ranks of its own or on those of a launcher."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megamoe.common import env
from megamoe.common.errors import LostPeerError, MegamoeError
from megamoe.common.log import get_logger
from megamoe.config.run import RunConfig
from megamoe.testing.board import Board
from megamoe.testing.launches import free_port
from megamoe.testing.parity_cases import Case, Plan, Setting
from megamoe.testing.parity_judge import (
    Finding,
    Measurement,
    Outcome,
    ParityRun,
    compared_with,
    finding_of,
    flips_count,
    outcome_of,
)
from megamoe.testing.parity_ranks import (
    START_SECONDS,
    Failed,
    Request,
    ask_program,
    measure_on_this_rank,
    meeting_at,
    train_alone,
    without_launcher,
)
from megamoe.testing.ranks import RankError, run_ranks

Report = Callable[[Finding], None]
Measure = Callable[[Case, RunConfig], Measurement | Failed]

log = get_logger("megamoe.parity")


def run_alone(plan: Plan, report: Report) -> Outcome:
    """Start the ranks of every case on this machine, on the CPU, one case after the other.

    Args:
        report: called with each finding as soon as it is there.
    """
    references: dict[Setting, ParityRun] = {}
    for number, (setting, config) in enumerate(plan.references.items(), start=1):
        log.info("one process, %d of %d: %s", number, len(plan.references), ", ".join(setting))
        references[setting] = run_ranks(train_alone, 1, config, plan.steps, timeout=_seconds(config))[0]

    def measure(case: Case, config: RunConfig) -> Measurement | Failed:
        reference, counts = references[compared_with(case.setting)], flips_count(case.setting)
        words = (config, plan.steps, reference, counts)
        try:
            return run_ranks(measure_on_this_rank, case.layout.ranks, *words, timeout=_seconds(config))[0]
        except RankError as error:
            log.error("%s: %s", case, error)
            cause = error.__cause__
            return Failed(f"{type(cause).__name__}: {cause}" if cause is not None else str(error).splitlines()[0])

    return outcome_of(plan, _judged(plan, references, measure, report), references)


def run_launched(plan: Plan, report: Report, publish: Callable[[Outcome], None], board: Board | None = None) -> bool:
    """Use the ranks that a launcher started, for cases of just so many ranks; whether anything missed, on all ranks.

    Args:
        report: called on rank 0 with each finding as soon as it is there.
        publish: called on rank 0 with the outcome while the others wait: launchers end all when the first one leaves.
        board: where the ranks have met already.
    """
    board = board or Board("parity", START_SECONDS)
    return _lead(plan, board, report, publish) if env.rank() == 0 else _follow(plan, board)


def _lead(plan: Plan, board: Board, report: Report, publish: Callable[[Outcome], None]) -> bool:
    """Rank 0: train on one process, then take the others through the cases."""
    with tempfile.TemporaryDirectory(prefix="megamoe-parity-") as folder:
        files = {setting: Path(folder) / "-".join(setting) for setting in plan.references}
        references: dict[Setting, ParityRun] = {}
        for number, (setting, config) in enumerate(plan.references.items(), start=1):
            log.info("one process, %d of %d: %s", number, len(plan.references), ", ".join(setting))
            references[setting] = _one_process(config, plan.steps)
            files[setting].write_bytes(pickle.dumps(references[setting]))

        def measure(case: Case, config: RunConfig) -> Measurement | Failed:
            port = free_port()
            board.tell(f"{case}: port", str(port))
            request = Request(
                config, plan.steps, flips_count(case.setting), reference=files[compared_with(case.setting)]
            )
            answer = ask_program(request, meeting_at(port))
            limit = _seconds(config) + START_SECONDS
            whys = [board.ask(f"{case}: end of rank {rank}", limit) for rank in range(1, env.world_size())]
            failures = [f"rank {rank}: {why}" for rank, why in enumerate(whys, start=1) if why]
            if isinstance(answer, Measurement) and not failures:
                return answer
            failures = [f"rank 0: {answer.why}", *failures] if isinstance(answer, Failed) else failures
            # A rank that lost others is a victim.
            return Failed("; ".join(sorted(failures, key=lambda why: LostPeerError.__name__ in why)))

        findings = _judged(plan, references, measure, report)
    outcome = outcome_of(plan, findings, references)
    publish(outcome)
    board.tell("outcome", "failed" if outcome.failed() else "")
    for rank in range(1, env.world_size()):
        board.ask(f"rank {rank} knows", START_SECONDS)
    return outcome.failed()


def _follow(plan: Plan, board: Board) -> bool:
    """The other ranks: take part in every case."""
    patience = sum(_seconds(config) + START_SECONDS for config in plan.references.values())
    for case in plan.runnable():
        assert case.config is not None
        port = int(board.ask(f"{case}: port", patience + START_SECONDS))
        answer = ask_program(Request(case.config, plan.steps, flips_count(case.setting)), meeting_at(port))
        board.tell(f"{case}: end of rank {env.rank()}", answer.why if isinstance(answer, Failed) else "")
        # While the program of rank 0 may run, and that of yet another rank.
        patience = 2 * (_seconds(case.config) + START_SECONDS)
    failed = bool(board.ask("outcome", patience + START_SECONDS))
    board.tell(f"rank {env.rank()} knows", "")
    return failed


def _one_process(config: RunConfig, steps: int) -> ParityRun:
    answer = ask_program(Request(config, steps, alone=True), without_launcher())
    if isinstance(answer, ParityRun):
        return answer
    raise MegamoeError(
        "The training on one process, which layouts are compared with, failed.",
        got=answer.why if isinstance(answer, Failed) else "no answer",
        todo="look for its error above; training.timeout_minutes gives it more time",
    )


def _judged(plan: Plan, references: dict[Setting, ParityRun], measure: Measure, report: Report) -> list[Finding]:
    """A finding for every case. A failure is one, too: the next case may be well."""
    findings = []
    for case in plan.cases:
        finding, start = Finding(case, "refused", case.refusal), time.monotonic()
        if case.config is not None:
            result = measure(case, case.config)
            if isinstance(result, Failed):
                finding = Finding(case, "error", result.why)
            else:
                finding = finding_of(case, result, references)
        findings.append(replace(finding, seconds=round(time.monotonic() - start, 1)))
        report(findings[-1])
    return findings


def _seconds(config: RunConfig) -> float:
    """How long a whole training may take."""
    return 60.0 * config.training.timeout_minutes
