import contextlib
import dataclasses
import ipaddress
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import messages
from migrate.errors import MoveRefused, NoCommonProtocol, PeerFailed, ProtocolViolation, exit_code_for
from migrate.messages import MESSAGES, Message, negotiate, parse
from runtime.api import ContainerSpec, NetworkSpec, VolumeMount
from runtime.criu.options import ExternalMount
from runtime.errors import CriuFailed
from runtime.linux.tcp_table import TcpConnection
from transport.api import Frame

SPEC = ContainerSpec(
    id="0123456789ab",
    name="web1",
    rootfs="host",
    argv=("sleep", "inf"),
    created_at="2026-01-01T00:00:00.000Z",
    volumes=(VolumeMount(source="/a", destination="/b"),),
    network=NetworkSpec(address="10.88.0.7/16", mac="02:42:0a:58:00:07", gateway="10.88.0.1"),
    labels=(("a", "b"),),
)
FINDING = {"level": "blocker", "check": "name", "what": "taken", "remedy": "rename it"}

EXAMPLES: list[Message] = [
    messages.Hello(version="0.1.0", host="host1"),
    messages.Preflight(spec=SPEC, mode="diskless", memory_bytes=5, facts={"cpu": ["a", "b"], "n": 1.5, "x": None}),
    messages.Findings(findings=(FINDING,), versions={"criu": "4.2"}),
    messages.Offer(move_id="abc", epoch=1, mode="stopcopy", spec=SPEC, memory_bytes=1 << 40),
    messages.Prepared(move_id="abc", versions={"kernel": "6.12"}),
    messages.Frozen(move_id="abc"),
    messages.Complete(move_id="abc", fill_ms=12.5, filled_bytes=4096, faults=3, remote_faults=2, longest_wait_ms=1.5),
    messages.Want(id=7, address=0x7F0000001000),
    messages.Whole(move_id="abc"),
    messages.Resume(move_id="abc", epoch=1),
    messages.Resumed(move_id="abc", taken=7),
    messages.Reach(move_id="abc"),
    messages.Reached(move_id="abc"),
    messages.Holding(move_id="abc"),
    messages.FrozenState(
        mounts=(ExternalMount(key="mask/proc/kcore", point="/proc/kcore"),),
        pipes=(11, 2**63),
        started_at="2026-01-01T00:00:00.000Z",
        restarts=2,
        manifest={"core-1.img": "abcd"},
        unheard=(
            TcpConnection(
                local=ipaddress.ip_address("10.88.0.7"),
                local_port=80,
                remote=ipaddress.ip_address("fd00::1"),
                remote_port=4000,
                family_bits=128,
            ),
        ),
    ),
    messages.Verified(move_id="abc", pages=7, ms=1.5, later=3),
    messages.Ready(move_id="abc", epoch=1),
    messages.Commit(move_id="abc", epoch=2),
    messages.Running(move_id="abc", epoch=1, marks_ms={"restore": 12.5}),
    messages.Done(move_id="abc", epoch=1, report={"id": "abc", "phases": [{"name": "x", "ms": 1.0}]}),
    messages.Discard(move_id="abc", epoch=1, why="Ctrl-C"),
    messages.Refused(move_id="abc", epoch=1, why="no room", blockers=(FINDING,)),
    messages.Error(code="no-room", what="full", hint="tidy up", log_lines=("a", "b")),
    messages.Ask(move_id="abc", epoch=1),
    messages.Answer(move_id="abc", epoch=1, state="held"),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {example.TYPE for example in EXAMPLES} == set(MESSAGES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example.TYPE))
def test_a_message_comes_back_from_the_wire_as_it_was(example: Message) -> None:
    assert parse(Frame.control(example.to_message()).message()) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example.TYPE))
def test_a_field_that_nobody_knows_is_ignored(example: Message) -> None:
    assert parse({**example.to_message(), "newer": [1, 2]}) == example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example.TYPE))
def test_a_field_of_a_wrong_type_is_refused_by_name(example: Message) -> None:
    for name in example.to_message():
        if name != "type":
            with pytest.raises(ProtocolViolation, match=name):
                parse({**example.to_message(), name: object()})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example.TYPE))
def test_a_required_field_that_is_missing_is_refused_by_name(example: Message) -> None:
    for field in dataclasses.fields(example):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            message = example.to_message()
            del message[field.name]
            with pytest.raises(ProtocolViolation, match=f"{field.name} is missing"):
                parse(message)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(kind=st.sampled_from(sorted(MESSAGES)), fields=st.dictionaries(st.text(max_size=8), ANYTHING), data=st.data())
def test_garbage_is_a_protocol_violation_and_nothing_else(
    kind: str, fields: dict[str, Any], data: st.DataObject
) -> None:
    names = [field.name for field in dataclasses.fields(MESSAGES[kind])]
    known = {name: data.draw(ANYTHING) for name in names}
    with contextlib.suppress(ProtocolViolation):
        parse({**fields, **known, "type": kind})


@pytest.mark.parametrize("message", [{}, {"type": None}, {"type": ["offer"]}, {"type": "fly"}, {"type": "x" * 10_000}])
def test_an_unknown_type_is_refused_in_a_short_text(message: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        parse(message)
    assert len(caught.value.what) < 100


@pytest.mark.parametrize(
    "changes",
    [
        {"move_id": "../../etc"},
        {"move_id": ""},
        {"move_id": "a" * 65},
        {"move_id": "é"},
        {"epoch": 0},
        {"epoch": True},
        {"epoch": 2**63},
        {"epoch": 1.0},
    ],
)
def test_a_move_id_is_a_plain_word_and_an_epoch_a_number(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        messages.Commit.parse({"type": "commit", "move_id": "abc", "epoch": 1, **changes})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, True, "1"])
def test_a_duration_is_a_finite_number(value: object) -> None:
    with pytest.raises(ProtocolViolation):
        messages.Running.parse({"type": "running", "move_id": "a", "epoch": 1, "marks_ms": {"x": value}})


def test_facts_are_bounded_in_depth_and_size() -> None:
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    offer = EXAMPLES[3].to_message()
    for facts in ({"deep": deep}, {"wide": list(range(50_000))}):
        with pytest.raises(ProtocolViolation, match="too large or too deep"):
            parse({**offer, "facts": facts})


def test_a_spec_that_does_not_fit_is_refused_with_the_reason() -> None:
    offer = EXAMPLES[3].to_message()
    offer["spec"] = {**SPEC.to_json(), "name": "../x"}
    with pytest.raises(ProtocolViolation, match="no container name"):
        parse(offer)


def test_an_error_instead_of_the_answer_is_raised_as_the_peers() -> None:
    error = CriuFailed("CRIU could not restore", hint="h", log_lines=("Error (x): y",))
    with pytest.raises(PeerFailed) as caught:
        messages.Ready.parse(messages.Error.of(error).to_message())
    assert caught.value.what == error.what
    assert caught.value.hint == "h"
    assert caught.value.log_lines == error.log_lines
    assert exit_code_for(caught.value) == 12


def test_a_refusal_instead_of_the_answer_is_raised_with_all_blockers() -> None:
    refused = messages.Refused(move_id="a", epoch=1, why="preflight", blockers=(FINDING,))
    with pytest.raises(MoveRefused) as caught:
        messages.Prepared.parse(refused.to_message())
    assert caught.value.blockers == (FINDING,)


def test_another_message_than_the_one_that_is_due_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="'commit' where ready was due"):
        messages.Ready.parse(messages.Commit(move_id="a", epoch=1).to_message())


def test_an_endless_error_text_is_cut_before_it_is_sent() -> None:
    error = messages.Error.of(ValueError("x" * 100_000))
    assert parse(error.to_message()) == error


def hello(oldest: int, newest: int) -> messages.Hello:
    return messages.Hello(protocol=newest, oldest=oldest, version=f"{newest}.0", host="h")


def test_the_newest_protocol_that_both_speak_is_taken() -> None:
    assert negotiate(hello(1, 3), hello(2, 5)) == 3
    assert negotiate(hello(2, 5), hello(1, 3)) == 3


@pytest.mark.parametrize(("ours", "theirs"), [(hello(3, 4), hello(1, 2)), (hello(1, 2), hello(3, 4))])
def test_without_a_common_protocol_both_versions_are_named(ours: messages.Hello, theirs: messages.Hello) -> None:
    with pytest.raises(NoCommonProtocol, match=f"{ours.version}.*{theirs.version}"):
        negotiate(ours, theirs)


def test_a_hello_without_oldest_is_understood() -> None:
    assert messages.Hello.parse({"type": "hello", "protocol": 2, "version": "0", "host": "h"}).oldest == 2


def test_every_message_and_every_field_is_documented() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text()
    fields = {field.name for kind in MESSAGES.values() for field in dataclasses.fields(kind)}
    assert not [name for name in [*MESSAGES, *messages.BULK_TYPES, *fields] if f"`{name}`" not in text]
