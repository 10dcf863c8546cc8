"""Signals during a move."""

import os
import signal
import threading

import pytest

from migrate.guards import CallOff, signals_ignored


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
