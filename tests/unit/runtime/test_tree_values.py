"""Changes as a peer may send them: strict types, bounded, nothing that leads out of the tree."""

import os
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import CorruptData
from runtime.tree import Change, Kind, Op
from runtime.tree_values import is_carried
from tests.support.trees import over_the_wire

GOOD: dict[str, Any] = {"op": "put", "path": b"etc/hosts", "kind": "file", "mode": 0o644, "size": 5, "mtime_ns": 7}


def test_a_change_comes_back_from_its_message_as_it_was() -> None:
    change = Change(
        op=Op.PUT,
        path="d\udcff/e f",
        kind=Kind.FILE,
        mode=0o4755,
        uid=1000,
        gid=4_000_000_000,
        size=1 << 40,
        mtime_ns=-5,
        xattrs=(("user.a\udcfe", b"\0\xff"), ("security.capability", b"x")),
    )
    assert over_the_wire(change) == change


@pytest.mark.parametrize("op", [Op.LINK, Op.REMOVE])
def test_a_name_only_change_carries_no_attributes(op: Op) -> None:
    change = Change(op=op, path="a", target="b" if op is Op.LINK else "")
    assert over_the_wire(change) == change
    assert set(change.to_message()) <= {"op", "path", "target"}


def test_the_inode_does_not_travel() -> None:
    assert over_the_wire(Change(op=Op.META, path="a", inode=5)).inode == 0


def test_an_unknown_field_is_ignored() -> None:
    assert Change.from_message(GOOD | {"from-the-future": 1}) == Change.from_message(GOOD)


@pytest.mark.parametrize(
    "path",
    [
        b"/etc/passwd",
        b"..",
        b"a/../b",
        b"a//b",
        b"a/",
        b"./a",
        b"a/.",
        b"a\0b",
        b"x" * 256,
        b"a/" * 2047 + b"abc",
        "a",
        7,
        None,
    ],
)
def test_a_path_that_leads_elsewhere_or_nowhere_is_refused(path: object) -> None:
    with pytest.raises(CorruptData, match="path of a change"):
        Change.from_message(GOOD | {"path": path})
    with pytest.raises(CorruptData, match="path of a change"):
        Change.from_message({"op": "link", "path": b"a", "target": path})


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "burn"},
        {"op": None},
        {"op": b"put"},
        {"kind": "door"},
        {"kind": ["file"]},
        {"mode": 0o10000},
        {"mode": "644"},
        {"mode": True},
        {"mode": 1.0},
        {"uid": -1},
        {"uid": 2**32 - 1},
        {"gid": 2**40},
        {"size": -1},
        {"size": 1 << 63},
        {"kind": "directory"},  # which has no size
        {"kind": "fifo", "size": 0, "rdev": 259},
        {"mtime_ns": 1 << 63},
        {"op": "patch", "kind": "symlink", "size": 0, "target": b"x"},
        {"kind": "symlink", "size": 0},
        {"kind": "symlink", "size": 0, "target": b"a\0"},
        {"kind": "symlink", "size": 0, "target": b"a" * 4096},
        {"path": b""},
        {"op": "remove", "path": b""},
        {"op": "link", "path": b"", "target": b"a"},
        {"op": "link", "target": b""},
        {"xattrs": {"user.a": b""}},
        {"xattrs": [[b"user.a"]]},
        {"xattrs": [["user.a", b""]]},
        {"xattrs": [[b"user.a", "text"]]},
        {"xattrs": [[b"user.a", b"x" * 65537]]},
        {"xattrs": [[b"user.%d" % number, b""] for number in range(65)]},
        {"xattrs": [[b"user.a", b""], [b"user.a", b""]]},
        {"xattrs": [[b"security.selinux", b""]]},
        {"xattrs": [[b"trusted.overlay.origin", b""]]},
        {"xattrs": [[b"user.a\0b", b""]]},
    ],
    ids=str,
)
def test_a_field_that_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CorruptData):
        Change.from_message(GOOD | wrong)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional={key: json_like | st.just(value) for key, value in GOOD.items()}) | json_like)
def test_whatever_a_peer_sends_is_a_change_or_corrupt_data(message: object) -> None:
    try:
        change = Change.from_message(message)
    except CorruptData:
        return
    assert over_the_wire(change) == change


@given(
    st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=60),
    st.lists(st.binary(max_size=300), max_size=5),
)
def test_a_message_never_weighs_more_than_the_change_says(name: str, values: list[bytes]) -> None:
    path = name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    xattrs = tuple((f"user.{number}", value) for number, value in enumerate(values))
    change = Change(op=Op.PUT, path=path, size=1 << 60, mtime_ns=-(2**60), rdev=1 << 60, target=path, xattrs=xattrs)
    assert len(msgpack.packb(change.to_message())) <= change.weight_bytes


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("user.anything", True),
        ("security.capability", True),
        ("system.posix_acl_access", True),
        ("trusted.overlay.opaque", True),
        ("trusted.overlay.overlay.opaque", True),
        ("trusted.mine", True),
        ("trusted.overlay.origin", False),
        ("trusted.overlay.impure", False),
        ("trusted.overlay.uuid", False),
        ("security.selinux", False),
        ("security.ima", False),
        ("system.nfs4_acl", False),
    ],
)
def test_attributes_that_mean_something_else_on_another_host_stay_behind(name: str, carried: bool) -> None:
    assert is_carried(name) is carried


def test_only_a_file_with_bytes_to_come_has_content() -> None:
    assert Change(op=Op.PUT, path="a", size=1).has_content
    assert Change(op=Op.PATCH, path="a", size=1).has_content
    assert not Change(op=Op.PUT, path="a", size=0).has_content
    assert not Change(op=Op.META, path="a", size=1).has_content


def test_names_that_are_no_text_survive() -> None:
    name = os.fsdecode(b"\xff\xfe")
    assert over_the_wire(Change(op=Op.REMOVE, path=name)).path == name
