"""A peer that is trusted and does wrong. Runs on a lab host with that host's own identity.

    python -m tests.support.fake_peer BEHAVIOUR     says its port, then "reached" at each connection it answers

silent   takes the connection and never says a word
mute     does the TLS handshake and never says a word
garbage  does the TLS handshake and sends random bytes
stuck    says hello and answers nothing more
leaves   says hello and closes at the first question
lies     says hello and answers every question with a map whose fields are of wrong types
long     says hello and answers with a frame that claims to be larger than any may be
holdless takes part in a move until the container is frozen, and says nothing more
newer    says hello in a protocol that is newer than any of ours
unready  takes part in a move until everything has come, and says nothing more
"""

import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping

from migrate.inventory import Inventory
from migrate.messages import PROTOCOL, Error, Findings, Hello, Holding, Message, Prepared
from migrate.session import exchange_hello
from runtime.host import load_host_config
from transport.api import Channel, Deadline, Frame, FrameKind, TransportError
from transport.channel import StreamChannel
from transport.tls import server_handshake

PATIENCE_S = 300.0
LIE = {"type": "findings", "findings": "none", "versions": 7, "move_id": ["x"] * 100, "epoch": -1}

HOST = load_host_config()


def handshake(connection: socket.socket) -> Channel:
    inventory = Inventory(HOST)
    return server_handshake(connection, inventory.identity(), inventory.trusted(), Deadline.after(PATIENCE_S))


def greet(connection: socket.socket) -> Channel:
    channel = handshake(connection)
    exchange_hello(channel, HOST.name, Deadline.after(PATIENCE_S))
    return channel


def silent(connection: socket.socket) -> None:
    time.sleep(PATIENCE_S)


def mute(connection: socket.socket) -> None:
    handshake(connection)
    time.sleep(PATIENCE_S)


def garbage(connection: socket.socket) -> None:
    # Any frame's header begins with its magic number; these bytes do not.
    write_raw(handshake(connection), os.urandom(100_000))
    time.sleep(PATIENCE_S)


def write_raw(channel: Channel, data: bytes) -> None:
    """Past the framing, which would not send this."""
    assert isinstance(channel, StreamChannel)
    channel.stream.write_all([memoryview(data)], Deadline.after(PATIENCE_S))


def stuck(connection: socket.socket) -> None:
    channel = greet(connection)
    while True:
        channel.receive(deadline=Deadline.after(PATIENCE_S))


def leaves(connection: socket.socket) -> None:
    channel = greet(connection)
    channel.receive(deadline=Deadline.after(PATIENCE_S))
    channel.close()


def lies(connection: socket.socket) -> None:
    channel = greet(connection)
    while True:
        channel.receive(deadline=Deadline.after(PATIENCE_S))
        channel.send(Frame.control(LIE), deadline=Deadline.after(PATIENCE_S))


def long(connection: socket.socket) -> None:
    channel = greet(connection)
    channel.receive(deadline=Deadline.after(PATIENCE_S))
    # A header that is right in every way but its length (transport/frames.py).
    fields = struct.pack(">4sBBHIQ", b"CMG1", 1, 0, 0, 1 << 31, 0)
    write_raw(channel, fields + struct.pack(">I", zlib.crc32(fields)) + os.urandom(1000))
    time.sleep(PATIENCE_S)


def newer(connection: socket.socket) -> None:
    channel = handshake(connection)
    hello = Hello(protocol=PROTOCOL + 2, oldest=PROTOCOL + 1, version="99.0", host=HOST.name)
    channel.send(Frame.control(hello.to_message()), deadline=Deadline.after(PATIENCE_S))
    channel.receive(deadline=Deadline.after(PATIENCE_S))
    time.sleep(PATIENCE_S)


def take_part(connection: socket.socket, answers: Mapping[str, Message]) -> None:
    """Answer what the source says in a move, by type, and take whatever else comes. What is asked before it is unknown
    here, as to an older version."""
    channel = greet(connection)
    in_move = False
    while True:
        frame = channel.receive(deadline=Deadline.after(PATIENCE_S))
        asked = frame.message() if frame.kind is FrameKind.CONTROL else {}
        if (message := answers.get(str(asked.get("type")))) is not None:
            answer = {**message.to_message(), "move_id": asked.get("move_id", "")}
            channel.send(Frame.control(answer), deadline=Deadline.after(PATIENCE_S))
            in_move = in_move or asked["type"] == "offer"
        elif not in_move:
            unknown = Error(code="unknown-message", what="what is that?", hint="").to_message()
            channel.send(Frame.control(unknown), deadline=Deadline.after(PATIENCE_S))


WILLING: dict[str, Message] = {"preflight": Findings(), "offer": Prepared(move_id="")}


def holdless(connection: socket.socket) -> None:
    take_part(connection, WILLING)


def unready(connection: socket.socket) -> None:
    take_part(connection, {**WILLING, "frozen": Holding(move_id="")})


BEHAVIOURS: dict[str, Callable[[socket.socket], None]] = {
    name: function
    for name, function in globals().items()
    if name in ("silent", "mute", "garbage", "stuck", "leaves", "lies", "long", "holdless", "unready", "newer")
}


def main() -> None:
    behave = BEHAVIOURS[sys.argv[1]]
    listener = socket.create_server(("0.0.0.0", 0))
    print(listener.getsockname()[1], flush=True)

    def serve(connection: socket.socket) -> None:
        try:
            behave(connection)
        except TransportError as error:
            print(f"fake peer: {error}", file=sys.stderr)

    while True:
        connection, _address = listener.accept()
        print("reached", flush=True)
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
