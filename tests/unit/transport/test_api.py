"""Control messages, deadlines and errors."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.api import ConnectFailed, Deadline, Frame, FrameKind, ProtocolError

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_a_control_message_comes_out_as_it_went_in(message: dict[str, object]) -> None:
    assert Frame.control(message).message() == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(body: bytes) -> None:
    try:
        message = Frame(FrameKind.CONTROL, 0, body).message()
    except ProtocolError:
        return
    assert all(isinstance(key, str) for key in message)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb("text"),
        msgpack.packb({1: 2}),
        msgpack.packb({b"bytes": 2}),
        msgpack.packb({"nested": [{1: 2}]}),
        b"\x82\xa1a\x01\xa1a\x02",  # {"a": 1, "a": 2}
        msgpack.packb({"a": 1}) + b"\x00",
        msgpack.packb({"a": 1})[:-1],
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\x81\xa1a" + b"\x91" * 100_000,  # lists in lists in lists
        b"\x81\xa1a\xa2\xff\xfe",  # a string that is not UTF-8
    ],
)
def test_what_is_not_one_map_with_string_keys_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        Frame(FrameKind.CONTROL, 0, body).message()


def test_a_data_frame_has_no_message() -> None:
    with pytest.raises(ProtocolError, match="DATA frame"):
        Frame.data(0, msgpack.packb({})).message()


def test_a_deadline_counts_down_and_never_does_not() -> None:
    deadline = Deadline.after(60)
    remaining = deadline.remaining()
    assert remaining is not None
    assert 59 < remaining <= 60
    assert not deadline.expired()
    assert Deadline.never().remaining() is None
    assert not Deadline.never().expired()


def test_a_passed_deadline_has_nothing_left() -> None:
    assert Deadline.after(-5).remaining() == 0.0
    assert Deadline.after(-5).expired()


def test_within_takes_the_sooner_of_two_ends() -> None:
    soon = Deadline.after(1)
    assert soon.within(60) == soon
    shorter = Deadline.after(60).within(1).remaining()
    assert shorter is not None
    assert shorter <= 1
    assert Deadline.never().within(1).at_s is not None


def test_an_error_shows_what_and_hint() -> None:
    error = ConnectFailed("nobody there", hint="start it")
    assert (error.what, error.hint, str(error)) == ("nobody there", "start it", "nobody there (start it)")
    assert str(ConnectFailed("nobody there")) == "nobody there"
