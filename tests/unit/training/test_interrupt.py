"""Signals become a request, and the handlers from before come back."""

import os
import signal

import pytest

from megamoe.training.interrupt import catch_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_nothing_else(number: signal.Signals) -> None:
    with catch_signals() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        os.kill(os.getpid(), number)  # a second one does not end the process either
        assert interrupt.requested


def test_the_handlers_from_before_return_also_after_an_error() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def fails() -> None:
        with catch_signals():
            assert all(signal.getsignal(number) not in before for number in numbers)
            raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        fails()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_request_does_not_outlive_its_run() -> None:
    with catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with catch_signals() as interrupt:
        assert not interrupt.requested
