"""Records of our own: what is sent comes out, and nothing else does."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.contract.pairs import CLIENT, SERVER
from transport.api import Deadline, ProtocolError
from transport.channel import StreamChannel
from transport.sealed import RECORD_BYTES, SealedStream, new_key
from transport.tls import TlsConnector, TlsListener, server_handshake

HEADER_BYTES, TAG_BYTES = 4, 16


def soon() -> Deadline:
    return Deadline.after(20)


@contextmanager
def one_way(
    records_per_key: int = 1 << 16,
) -> Iterator[tuple[SealedStream, socket.socket, SealedStream, socket.socket]]:
    """A writer, what it writes as raw bytes, a reader, and where raw bytes for the reader go."""
    there, back = new_key(), new_key()
    written, written_end = socket.socketpair()
    read, read_end = socket.socketpair()
    writer = SealedStream(written, send_key=there, receive_key=back, records_per_key=records_per_key)
    reader = SealedStream(read, send_key=back, receive_key=there, records_per_key=records_per_key)
    try:
        yield writer, written_end, reader, read_end
    finally:
        for stream in (writer, reader):
            stream.close()
        written_end.close()
        read_end.close()


def sealed_bytes(writer: SealedStream, raw: socket.socket, text: bytes) -> bytes:
    writer.write_all([memoryview(text)], soon())
    return raw.recv(HEADER_BYTES + len(text) + TAG_BYTES, socket.MSG_WAITALL)


def read_all(reader: SealedStream, length: int, *, piece: int) -> bytes:
    result = bytearray(length)
    view = memoryview(result)
    done = 0
    while done < length:
        done += reader.read_into(view[done : done + piece], soon())
    return bytes(result)


@pytest.mark.parametrize("piece", [1, 24, 5000, 1 << 30])
def test_what_was_sent_comes_out_however_it_is_read(piece: int) -> None:
    texts = [os.urandom(length) for length in (1, 24, 16384, 16385, 3000)]
    with one_way() as (writer, raw, reader, into):
        for text in texts:
            into.sendall(sealed_bytes(writer, raw, text))
        assert read_all(reader, sum(map(len, texts)), piece=piece) == b"".join(texts)


def test_more_than_a_record_goes_in_several_and_short_buffers_together() -> None:
    text = os.urandom(2 * RECORD_BYTES + 5)
    with one_way() as (writer, raw, reader, into):

        def carry() -> None:
            total = len(text) + 3 * (HEADER_BYTES + TAG_BYTES)
            into.sendall(raw.recv(total, socket.MSG_WAITALL))

        thread = threading.Thread(target=carry)
        thread.start()
        writer.write_all([memoryview(text)], soon())
        assert read_all(reader, len(text), piece=1 << 30) == text
        thread.join()
        writer.write_all([memoryview(b"ab"), memoryview(b"cd")], soon())
        assert len(raw.recv(100)) == HEADER_BYTES + 4 + TAG_BYTES


def test_the_text_does_not_show() -> None:
    with one_way() as (writer, raw, _reader, _into):
        assert b"secret" not in sealed_bytes(writer, raw, b"secret" * 100)


def test_equal_texts_look_different_each_time() -> None:
    with one_way() as (writer, raw, _reader, _into):
        assert sealed_bytes(writer, raw, b"same") != sealed_bytes(writer, raw, b"same")


@pytest.mark.parametrize("position", [3, HEADER_BYTES, HEADER_BYTES + 50, -1])
def test_a_record_that_was_changed_is_refused_for_good(position: int) -> None:
    with one_way() as (writer, raw, reader, into):
        record = bytearray(sealed_bytes(writer, raw, bytes(100)))
        record[position] ^= 1
        into.sendall(bytes(record) + bytes(1))  # a byte more, as a longer length would want it
        for _ in range(2):
            with pytest.raises(ProtocolError, match="not as the peer sent it"):
                reader.read_into(memoryview(bytearray(200)), soon())


@pytest.mark.parametrize("order", [(0, 0), (1,), (1, 0)])
def test_a_record_out_of_its_place_is_refused(order: tuple[int, ...]) -> None:
    """Repeated, after one was left out, swapped."""
    with one_way() as (writer, raw, reader, into):
        records = [sealed_bytes(writer, raw, text) for text in (b"first", b"other")]
        for index in order:
            into.sendall(records[index])
        with pytest.raises(ProtocolError):
            read_all(reader, 10, piece=5)


@pytest.mark.parametrize("length", [0, RECORD_BYTES + 1, 2**32 - 1])
def test_a_length_beyond_the_limits_is_refused_before_anything_is_read(length: int) -> None:
    with one_way() as (_writer, _raw, reader, into):
        into.sendall(length.to_bytes(4, "big"))
        with pytest.raises(ProtocolError, match=f"record of {length} bytes"):
            reader.read_into(memoryview(bytearray(10)), soon())


def test_what_one_side_sent_is_not_taken_back_from_it() -> None:
    with one_way() as (writer, raw, _reader, _into):
        raw.sendall(sealed_bytes(writer, raw, b"mirror"))
        with pytest.raises(ProtocolError):
            writer.read_into(memoryview(bytearray(10)), soon())


def test_both_sides_change_keys_at_the_same_record() -> None:
    with one_way(records_per_key=3) as (writer, raw, reader, into):
        first_cipher = writer._send_key.cipher
        for number in range(10):
            into.sendall(sealed_bytes(writer, raw, b"%d" % number))
            assert read_all(reader, 1, piece=1) == b"%d" % number
        assert writer._send_key.cipher is not first_cipher


def test_the_end_within_a_record_is_the_end() -> None:
    with one_way() as (writer, raw, reader, into):
        into.sendall(sealed_bytes(writer, raw, b"whole")[:-1])
        into.close()
        assert reader.read_into(memoryview(bytearray(10)), soon()) == 0


@pytest.mark.parametrize(("ours", "theirs", "used"), [(True, True, True), (True, False, False), (False, True, False)])
def test_an_older_side_is_spoken_to_in_tls(ours: bool, theirs: bool, used: bool) -> None:
    with TlsListener("127.0.0.1", 0, identity=SERVER, trusted=dict) as listener:
        accepted = []

        def accept() -> None:
            sock = listener.accept_socket(deadline=soon())
            accepted.append(server_handshake(sock, SERVER, {"client": CLIENT.cert_pem}, soon(), sealed=theirs))

        thread = threading.Thread(target=accept)
        thread.start()
        connector = TlsConnector(
            host="127.0.0.1",
            port=listener.port,
            identity=CLIENT,
            peer_cert_pem=SERVER.cert_pem,
            name="server",
            sealed=ours,
        )
        with connector.connect(deadline=soon()) as near:
            thread.join()
            with accepted[0] as far:
                for channel in (near, far):
                    assert isinstance(channel, StreamChannel)
                    assert isinstance(channel.stream, SealedStream) is used
                near.send_data(7, [b"there"], deadline=soon())
                assert bytes(far.receive(deadline=soon()).body) == b"there"
                far.send_data(8, [b"back"], deadline=soon())
                assert bytes(near.receive(deadline=soon()).body) == b"back"
