"""Looking at what waits in a UDP socket: this kernel's, over loopback."""

import dataclasses
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from runtime.linux.udp_queue import SO_PEEK_OFF, UDP_GRO, UdpTable, peek
from runtime.udp_queues import copies, waiting_in

UDP_SEGMENT = 103  # linux/udp.h
SENT = [b"one", b"", b"two" * 20000, b"", b"", b"three"]


def inode_of(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino


@pytest.fixture(params=[("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")])
def sockets(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """One that is bound, one that sends to it, and the address it sends to."""
    bound, to = request.param
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    sender_family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as receiver,
        socket.socket(sender_family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((bound, 0))
        receiver.setblocking(False)
        sender.connect((to, receiver.getsockname()[1]))
        yield receiver, sender, to


def test_what_waits_is_seen_in_order_and_stays(sockets: tuple[socket.socket, socket.socket, str]) -> None:
    receiver, sender, to = sockets
    for data in SENT:
        sender.send(data)
    with socket.socket(fileno=os.dup(receiver.fileno())) as copy:
        seen = list(peek(copy))
    assert [data for *_who, data in seen] == SENT
    own = sender.getsockname()
    assert {(str(source), port, str(destination)) for source, port, destination, _data in seen} == {
        (own[0], own[1], to)
    }
    assert [receiver.recv(65536) for _number in SENT] == SENT
    with pytest.raises(BlockingIOError):
        receiver.recv(1)


def test_the_sockets_options_are_as_they_were_also_where_looking_ended_early(
    sockets: tuple[socket.socket, socket.socket, str],
) -> None:
    receiver, sender, _to = sockets
    six = receiver.family == socket.AF_INET6
    level, option = (socket.IPPROTO_IPV6, 49) if six else (socket.IPPROTO_IP, 8)
    for told in (0, 1):
        receiver.setsockopt(level, option, told)
        sender.send(b"x")
        sender.send(b"y")
        looking = peek(receiver)
        next(looking)
        looking.close()
        assert receiver.getsockopt(level, option) == told
        assert receiver.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == -1
        assert receiver.recv(1, socket.MSG_PEEK) == b"x"


def test_a_socket_that_holds_something_is_in_the_table_with_its_inode_and_an_empty_one_holds_nothing(
    sockets: tuple[socket.socket, socket.socket, str],
) -> None:
    receiver, sender, _to = sockets
    with UdpTable() as table:

        def mine() -> tuple[int, int]:
            (found,) = [one for one in table.all() if one.inode == inode_of(receiver)]
            return found.local_port, found.waiting

        port = receiver.getsockname()[1]
        assert mine() == (port, 0)
        sender.send(b"x")
        assert mine()[1] > 0
        receiver.recv(1)
        assert mine() == (port, 0)


def test_datagrams_that_the_kernel_has_joined_are_told_apart() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        receiver.bind(("127.0.0.1", 0))
        sender.sendmsg(
            [b"a" * 100 + b"b" * 100 + b"c" * 30],
            [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 100))],
            0,
            receiver.getsockname(),
        )
        assert [data for *_who, data in peek(receiver)] == [b"a" * 100, b"b" * 100, b"c" * 30]


def test_an_error_that_came_before_does_not_hide_what_waits() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        one.connect(two.getsockname())
        two.sendto(b"before it closed", one.getsockname())
        two.close()
        one.send(b"nobody is there any more: the kernel answers with an error")
        assert [data for *_who, data in peek(one)] == [b"before it closed"]


def test_a_process_socket_is_copied_once_and_others_are_left_alone() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
        one.bind(("127.0.0.1", 0))
        again = os.dup(one.fileno())
        gone = os.fork()
        if not gone:
            os._exit(0)
        os.waitpid(gone, 0)
        try:
            found = list(copies([gone, os.getpid()], {inode_of(one): None}))
            assert [inode for inode, _copy in found] == [inode_of(one)]
            assert found[0][1].getsockname() == one.getsockname()
            found[0][1].close()
        finally:
            os.close(again)


def test_what_is_more_than_may_be_carried_is_cut_and_what_can_not_come_again_is_counted() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        one.bind(("127.0.0.1", 0))
        for number in range(5):
            two.sendto(b"%d" % number, one.getsockname())
        with UdpTable() as table:
            (known,) = [found for found in table.all() if found.inode == inode_of(one)]
        pids, own = [os.getpid()], frozenset({known.local})

        def seen(**limits: int) -> tuple[list[bytes], int, bool]:
            found = waiting_in(pids, [known], own, **limits)
            return [datagram.data for datagram in found.datagrams], found.lost, found.cut

        assert seen() == ([b"0", b"1", b"2", b"3", b"4"], 0, False)
        assert seen(most=5, most_bytes=5) == seen()
        assert seen(most=3) == ([b"0", b"1", b"2"], 0, True)
        assert seen(most_bytes=4) == ([b"0", b"1", b"2", b"3"], 0, True)
        stranger = dataclasses.replace(known, remote=known.local, remote_port=9)
        assert waiting_in(pids, [stranger], own).lost == 5
        assert waiting_in(pids, [], own).datagrams == ()
