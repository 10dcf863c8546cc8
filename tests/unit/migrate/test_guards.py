"""Signals during a move."""

import contextlib
import os
import signal
import threading
import time

import pytest

from migrate.errors import BlackoutTooLong
from migrate.guards import CallOff, signals_ignored
from runtime.errors import BadInput


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_call_off_is_known_whatever_became_of_its_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    call_off = CallOff()

    def spoil_the_interrupt() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt:
            threading.Lock().release()

    with pytest.raises(RuntimeError, match="unlocked"), call_off.noticed():
        spoil_the_interrupt()
    assert call_off.asked
    assert signal.getsignal(number) == before


def test_what_must_go_to_its_end_does_though_signals_come() -> None:
    call_off = CallOff()
    with call_off.noticed(), signals_ignored():
        os.kill(os.getpid(), signal.SIGINT)
    assert not call_off.asked


def test_another_thread_has_no_handlers_and_needs_none() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with CallOff().noticed(), signals_ignored():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def wait_for_signals() -> None:
    while True:
        signal.pause()


def test_a_blackout_that_passes_its_limit_is_interrupted_and_known_as_the_cause() -> None:
    before = signal.getsignal(signal.SIGALRM)
    call_off = CallOff(max_blackout_ms=20.0)
    with pytest.raises(KeyboardInterrupt) as caught, call_off.noticed(), call_off.limited():
        wait_for_signals()
    cause = call_off.cause(caught.value)
    assert isinstance(cause, BlackoutTooLong)
    assert "20 ms" in str(cause)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before


def test_an_interrupt_that_got_lost_comes_again() -> None:
    call_off = CallOff(max_blackout_ms=20.0)

    def lose_the_first() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            wait_for_signals()
        wait_for_signals()

    with pytest.raises(KeyboardInterrupt), call_off.noticed(), call_off.limited():
        lose_the_first()


def test_no_limit_counts_once_what_must_go_to_its_end_has_begun() -> None:
    call_off = CallOff(max_blackout_ms=1.0)
    error = OSError("another")
    with call_off.noticed(), signals_ignored(), call_off.limited():
        # Longer than the limit, and than the time after which the alarm comes again.
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            time.sleep(0.05)
    assert call_off.cause(error) is error


def test_a_call_off_outweighs_a_limit_that_has_passed_as_well() -> None:
    call_off = CallOff(max_blackout_ms=1.0)
    call_off.asked = call_off.too_late = True
    assert isinstance(call_off.cause(OSError()), KeyboardInterrupt)


def test_a_limit_is_refused_where_no_signal_can_come() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            CallOff(max_blackout_ms=100.0)
        except BadInput as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "main thread" in str(errors)
