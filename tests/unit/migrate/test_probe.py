"""The probe tells a gap, a reset and a wrong number from a healthy service."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from migrate.probe import AskEcho, Asker, AskHttp, AskRedis, Probe, parse_address

Serve = Callable[[socket.socket], None]


@contextmanager
def service(serve: Serve) -> Iterator[tuple[str, int]]:
    """Accepts until the block is left, and lets ``serve`` talk on each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            with connection:
                serve(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def probe_for(seconds: float, address: tuple[str, int], asker: Asker) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    Probe(address, asker).run(seconds, lines.append)
    return lines[-1]


def test_a_healthy_service_has_no_failures_and_a_pause_is_measured_as_the_longest_gap() -> None:
    def echo_with_a_pause(connection: socket.socket) -> None:
        for line in connection.makefile("rb"):
            if line == b"20\n":
                time.sleep(0.15)
            connection.sendall(line)

    with service(echo_with_a_pause) as address:
        seen = probe_for(0.4, address, AskEcho())
    assert (seen["failed"], seen["resets"], seen["out_of_sequence"]) == (0, 0, 0)
    assert 150 <= seen["downtime_ms"] < 5000
    assert seen["requests"] == seen["last"] > 20


def test_a_number_that_is_skipped_or_comes_twice_is_out_of_sequence() -> None:
    def count_badly(connection: socket.socket) -> None:
        number = 100
        while connection.recv(1000):
            number += {5: 2, 9: 0}.get(number - 100, 1)
            if number == 109:
                number = 120
            connection.sendall(b":%d\r\n" % number)

    with service(count_badly) as address:
        seen = probe_for(0.2, address, AskRedis("k"))
    assert seen["out_of_sequence"] == 2
    assert seen["failed"] == 0


def test_a_broken_connection_is_a_reset_and_the_probe_goes_on_with_a_new_one() -> None:
    count = 0

    def hang_up_once(connection: socket.socket) -> None:
        nonlocal count
        while connection.recv(1000):
            count += 1
            if count == 30:
                return
            connection.sendall(b":%d\r\n" % count)

    with service(hang_up_once) as address:
        seen = probe_for(0.3, address, AskRedis("k"))
    assert (seen["failed"], seen["resets"], seen["reconnects"]) == (1, 1, 1)
    assert seen["out_of_sequence"] == 0


def test_an_http_answer_is_complete_when_its_length_has_come() -> None:
    ask = AskHttp("h", "/", sequence=True)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    assert ask.answer(head[:10]) is None
    assert ask.answer(head + b"41") is None
    assert ask.answer(head + b"417") == 417
    with pytest.raises(ValueError, match="not 200"):
        ask.answer(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")


def test_an_address_has_a_host_and_a_port() -> None:
    assert parse_address("10.0.0.1:80") == ("10.0.0.1", 80)
    with pytest.raises(Exception, match="HOST:PORT"):
        parse_address("10.0.0.1")
