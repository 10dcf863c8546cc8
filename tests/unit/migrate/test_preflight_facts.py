"""The facts' way to the target: what is written is read back, and nothing a hostile peer sends gets through."""

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import ProtocolViolation
from migrate.preflight.findings import Finding, named, printable, size, warning
from migrate.preflight.wireform import MAX_FILE_TEXT, needs_of, read_facts, write_facts
from migrate.wire import read_facts as bounded
from runtime.facts import MAX_FILES
from tests.unit.migrate.preflight_values import CONTAINER, FACTS, LIBC


def travelled(message: dict[str, Any]) -> Any:
    return msgpack.unpackb(msgpack.packb(message))


def test_what_is_written_is_read_back() -> None:
    assert read_facts(travelled(write_facts(FACTS))) == FACTS


def test_the_control_messages_own_bounds_hold_the_longest_facts() -> None:
    files = tuple(replace(LIBC, path=f"/{number:0200}") for number in range(MAX_FILES + 1))
    written = write_facts(replace(FACTS, files=files))
    assert written["files_complete"] is False
    assert len(msgpack.packb(written)) < 2 * MAX_FILE_TEXT
    assert bounded(travelled(written)) == travelled(written)
    assert read_facts(travelled(written)).files == files[: len(written["files"])]


def test_names_that_are_no_text_are_left_out_and_that_is_told() -> None:
    written = write_facts(replace(FACTS, files=(replace(LIBC, path="/\udcff"), replace(LIBC, path="/a\n"), LIBC)))
    assert [file[0] for file in written["files"]] == [LIBC.path]
    assert written["files_complete"] is False


@pytest.mark.parametrize("name", sorted(set(write_facts(FACTS))))
def test_no_field_may_be_missing_or_of_another_type(name: str) -> None:
    message = travelled(write_facts(FACTS))
    with pytest.raises(ProtocolViolation):
        read_facts({key: value for key, value in message.items() if key != name})
    wrong: tuple[Any, ...] = (None, -1, 1.5, "\0", [[]], {"a": 1})
    for nonsense in wrong:
        if nonsense == "\0" and name in ("arch", "kernel"):
            continue
        with pytest.raises(ProtocolViolation):
            read_facts(message | {name: nonsense})


@pytest.mark.parametrize("path", ["", "/", "relative", "/a/../b", "/a\0b", "/" + "x" * 5000, 7])
def test_a_path_that_may_lead_elsewhere_is_refused(path: object) -> None:
    message = travelled(write_facts(FACTS))
    with pytest.raises(ProtocolViolation):
        read_facts(message | {"files": [[path, 1, 0o100644, ""]]})


def test_too_many_of_anything_are_refused() -> None:
    message = travelled(write_facts(FACTS))
    for name, value in {
        "files": [["/a", 1, 1, ""]] * (MAX_FILES + 1),
        "cpu_flags": ["x"] * 5000,
        "needs": ["x"] * 65,
        "cpuinfo": "00" * 5000,
        "memory_bytes": 2**63,
    }.items():
        with pytest.raises(ProtocolViolation):
            read_facts(message | {name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"ports": [{"host_port": "80", "container_port": 80, "protocol": "tcp", "host_address": "0.0.0.0"}]},
        {"volumes": [{"source": "relative", "destination": "/d", "read_only": False}]},
        {"network": {"address": 1, "mac": "", "gateway": ""}},
        {"rootfs": "/a\0b"},
        {"name": "../../etc"},
    ],
)
def test_a_spec_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    message = travelled(write_facts(FACTS))
    with pytest.raises(ProtocolViolation):
        read_facts(message | {"spec": message["spec"] | change})


def test_an_unknown_field_is_ignored_and_another_version_is_not() -> None:
    message = travelled(write_facts(FACTS))
    assert read_facts(message | {"later": 1}) == FACTS
    with pytest.raises(ProtocolViolation, match="another version"):
        read_facts(message | {"schema": 2})


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(name=st.sampled_from(sorted(set(write_facts(FACTS)))), value=_PLAIN)
@settings(max_examples=300, deadline=None)
def test_whatever_a_field_holds_it_is_read_or_refused(name: str, value: object) -> None:
    try:
        read_facts(write_facts(FACTS) | {name: value})
    except ProtocolViolation:
        return


def test_needs_are_named_as_the_target_knows_them() -> None:
    assert needs_of(CONTAINER) == ()
    assert needs_of(replace(CONTAINER, compat_tasks=("a",), uses_ipv6=True)) == ("compat_cr", "ipv6")


def test_a_finding_travels_as_plain_json() -> None:
    finding = warning("clock", "the clocks differ", "synchronise them")
    assert Finding.from_json(travelled(finding.to_json())) == finding


@pytest.mark.parametrize("change", [{"level": "fatal"}, {"what": 7}, {"check": None}])
def test_a_finding_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        Finding.from_json(warning("a", "b").to_json() | change)


def test_no_finding_can_write_to_a_terminal_or_fill_it() -> None:
    finding = warning("name", "\x1b[2Jevil\nname\udcff" + "x" * 5000, "\r")
    assert finding.what.startswith("?[2Jevil?name?x")
    assert len(finding.what) == 2000
    assert finding.remedy == "?"
    assert printable("Grüße, 世界") == "Grüße, 世界"


def test_names_and_sizes_for_people() -> None:
    assert named(["a", "b", "a"]) == "a, b"
    assert named([str(number) for number in range(8)], 3) == "0, 1, 2 and 5 more"
    assert [size(count) for count in (5, 2048, 3 << 30, 5 << 50)] == ["5 bytes", "2.0 KiB", "3.0 GiB", "5120.0 TiB"]
