"""Signals become requests, and the handlers from before come back."""

import os
import signal
import subprocess
import sys

import pytest

from megamoe.common.main import REQUEUE as REQUEUE_CODE
from megamoe.training.interrupt import INTERRUPTED, REQUEUE, catch_signals

MEANING = [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE)]
NUMBERS = [number for number, _ in MEANING]


@pytest.mark.parametrize("number, meaning", MEANING)
def test_a_signal_is_a_request_and_nothing_else(number: signal.Signals, meaning: str) -> None:
    with catch_signals() as interrupt:
        assert interrupt.flags() == {INTERRUPTED: False, REQUEUE: False}
        os.kill(os.getpid(), number)
        asked = {INTERRUPTED: False, REQUEUE: False, meaning: True}
        assert interrupt.flags() == asked
        os.kill(os.getpid(), number)  # a second one does not end the process either
        assert interrupt.flags() == asked


def test_the_handlers_from_before_return_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]

    def fails() -> None:
        with catch_signals():
            assert all(signal.getsignal(number) not in before for number in NUMBERS)
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        fails()
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_a_request_does_not_outlive_its_run() -> None:
    with catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with catch_signals() as interrupt:
        assert not any(interrupt.flags().values())


def test_a_process_that_only_leaves_hears_nothing_more() -> None:
    """Not even once the handlers would have returned."""
    code = """if True:
        import os, signal, sys
        from megamoe.training.interrupt import catch_signals, ignore_signals
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        with catch_signals() as interrupt:
            ignore_signals()
            for number in numbers:
                os.kill(os.getpid(), number)
        for number in numbers:
            os.kill(os.getpid(), number)
        sys.exit(any(interrupt.flags().values()))
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("number", NUMBERS)
def test_during_the_setup_a_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    code = f"""if True:
        import os, signal
        from megamoe.training.interrupt import leave_at_once
        with leave_at_once():
            os.kill(os.getpid(), signal.{number.name})
            while True:
                pass
    """
    expected = REQUEUE_CODE if number == signal.SIGUSR1 else 128 + number
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == expected
