"""Probes that ask without waiting: connections and datagrams, their gaps and their losses."""

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from migrate.cli import main
from migrate.probe import AnyProbe, AskText, Question, make_probe, parse_address

PAUSE_S = 0.15
CMIGRATE = "import sys; from migrate.cli import main; sys.exit(main())"


@contextmanager
def datagrams(answer: Callable[[int], bool]) -> Iterator[tuple[str, int]]:
    """A UDP service that answers the n-th datagram when ``answer`` says so."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", 0))
        ended = threading.Event()

        def serve() -> None:
            for number in range(1 << 20):
                text, peer = service.recvfrom(2000)
                if ended.is_set():
                    return
                if answer(number):
                    service.sendto(text, peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield service.getsockname()
        finally:
            ended.set()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as us:
                us.sendto(b"", service.getsockname())
            thread.join(5)


def seen_by(probe: AnyProbe, seconds: float) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    probe.run(seconds, lines.append)
    return lines[-1]


def ask(kind: str, address: tuple[str, int], **named: Any) -> AnyProbe:
    return make_probe(Question(kind=kind, address=address, **named))


def test_a_pause_of_a_datagram_service_is_its_longest_gap_and_nothing_is_lost() -> None:
    def pause_once(number: int) -> bool:
        if number == 30:
            time.sleep(PAUSE_S)
        return True

    with datagrams(pause_once) as address:
        seen = seen_by(ask("udp", address), 0.4)
    assert (seen["failed"], seen["resets"]) == (0, 0)
    # Late by as much at either end of the gap, the probe sees it longer or shorter.
    assert abs(seen["downtime_ms"] - PAUSE_S * 1000) < 30 + seen["probe_late_ms"]
    assert sum(seen["gaps_ms"].values()) == seen["requests"] > 30


def test_datagrams_without_an_answer_are_lost() -> None:
    with datagrams(lambda number: not 20 <= number < 25) as address:
        seen = seen_by(ask("udp", address), 0.2)
    assert seen["failed"] == 5


def test_a_new_connection_each_time_counts_each_and_a_closed_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as service:
        address = service.getsockname()
        seen = seen_by(ask("tcp", address, interval_ms=2.0), 0.2)
        assert (seen["failed"], seen["resets"]) == (0, 0)
        # A hundred are due; a busy machine leaves some out.
        assert seen["requests"] > 5
    with pytest.raises(OSError, match="refused"):
        ask("tcp", address).run(0.1, print)


def test_a_text_on_a_kept_connection_takes_whatever_comes_back() -> None:
    asker = AskText(b"PING\r\n")
    assert asker.request(7) == b"PING\r\n"
    assert asker.answer(b"") is None
    assert asker.answer(b"+PONG\r\n") == 7


@pytest.mark.parametrize("text", ["10.0.0.1", "h:", ":80", "h:0", "h:65536", "h:x", "::1:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_address(text)


def test_addresses_of_both_kinds_are_understood() -> None:
    assert parse_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert parse_address("[fd00::1]:80") == ("fd00::1", 80)


def test_the_command_prints_one_json_line_and_ends_with_its_duration() -> None:
    with datagrams(lambda _number: True) as (host, port):
        command = [sys.executable, "-c", CMIGRATE, "probe", "udp", f"{host}:{port}", "--duration", "0.1", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["type"] == "total"


def test_nobody_there_is_a_connection_error_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        address = "{}:{}".format(*service.getsockname())
    assert main(["probe", "tcp", address, "--duration", "0.1"]) == 7
    assert "hint:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["tcp", "nowhere"], ["http", "h:80", "--send", "x"], ["smtp", "h:25"]])
def test_bad_words_are_usage_errors(words: list[str]) -> None:
    assert main(["probe", *words]) == 2
