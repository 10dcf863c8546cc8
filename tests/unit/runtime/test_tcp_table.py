"""The kernel's tables of TCP sockets, read as text."""

import os
import socket

from runtime.linux.tcp_table import Listener, listeners, parse_listeners

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
REST = "00:00000000 00000000     0        0 1 1"


def test_listeners_are_told_from_connections_and_loopback_from_the_rest() -> None:
    text = HEAD + (
        f"   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 {REST}\n"
        f"   1: 00000000:18EB 00000000:0000 0A 00000000:00000003 {REST}\n"
        f"   2: 0201580A:18EC 0101580A:9C40 01 00000000:00000007 {REST}\n"
    )
    assert list(parse_listeners(text.splitlines())) == [
        Listener(port=80, loopback=True, waiting=0),
        Listener(port=6379, loopback=False, waiting=3),
    ]
    one, every = "0" * 24 + "01000000", "0" * 32
    text = HEAD + "".join(
        f"   0: {address}:0051 {every}:0000 0A 00000000:00000000 {REST}\n" for address in (one, every)
    )
    assert [listener.loopback for listener in parse_listeners(text.splitlines())] == [True, False]


def test_connections_that_nobody_accepts_are_counted_and_a_process_that_is_gone_has_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            assert [listener.waiting for listener in listeners(os.getpid()) if listener.port == port] == [2]
    assert listeners(2**22) == []
