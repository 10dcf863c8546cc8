"""Image files on their way: many in one message, large ones in pieces, and a peer that lies about them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import ProtocolViolation
from migrate.incoming import Incoming
from migrate.memory_target import NoPages
from migrate.outgoing import IMAGE_CHUNK_BYTES, Outgoing
from runtime.errors import CorruptData
from transport.api import Deadline
from transport.testing.memory import memory_pair

END = {"type": "the-end"}


def soon() -> Deadline:
    return Deadline.after(10)


@dataclass
class Ends:
    here: Path
    there: Path
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        near, self._far = memory_pair(capacity_bytes=64 << 20)
        self.out = Outgoing(near, soon)
        self.incoming = Incoming(
            self._far,
            trees=[],
            images=self.there,
            log=self.there / "log",
            pages=NoPages(),
            shared=None,
            expected=None,
            deadline=soon,
            on_frozen=lambda: None,
            on_trees=lambda: self.told.append("trees"),
        )

    def receive(self, *messages: dict[str, Any], data: tuple[bytes, ...] = ()) -> None:
        for message in messages:
            self.out.control(message)
            for piece in data:
                self.out.data("images", 0, [piece])
        self.out.control(END)
        assert self.incoming.until_control() == END


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    ends = Ends(tmp_path / "here", tmp_path / "there")
    yield ends
    ends.incoming.close()


def test_files_of_every_size_arrive_as_they_were(ends: Ends) -> None:
    sizes = (0, 1, 4096, IMAGE_CHUNK_BYTES - 4097, 10, IMAGE_CHUNK_BYTES, 3 * IMAGE_CHUNK_BYTES + 7, 0)
    content = {f"a{number}.img": os.urandom(size) for number, size in enumerate(sizes)}
    content |= {"pages-1.img": os.urandom(IMAGE_CHUNK_BYTES + 1), "pstree.img": b"tree"}
    for name, data in (content | {"dump.log": b"not an image"}).items():
        (ends.here / name).write_bytes(data)
    ends.out.images(ends.here)
    ends.receive()
    assert {path.name: path.read_bytes() for path in ends.there.iterdir()} == content
    assert ends.out.sent_bytes["pages"] >= IMAGE_CHUNK_BYTES + 1


def test_the_first_image_says_that_the_trees_are_complete(ends: Ends) -> None:
    ends.receive({"type": "images", "names": [], "sizes": []}, {"type": "images", "names": [], "sizes": []})
    ends.incoming.finish()
    assert ends.told == ["trees"]
    with pytest.raises(ProtocolViolation, match="files came after images"):
        ends.receive({"type": "tree-changes", "tree": 0, "changes": []})


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        ("a.img", [1]),
        (["a.img"], None),
        (["a.img"], []),
        ([1], [1]),
        (["a.img"], [-1]),
        (["a.img"], ["1"]),
        (["a.img"], [1 << 60]),
        (["a.img"] * 5000, [0] * 5000),
    ],
)
def test_what_does_not_fit_is_refused(ends: Ends, names: object, sizes: object) -> None:
    with pytest.raises(ProtocolViolation, match="fit"):
        ends.receive({"type": "images", "names": names, "sizes": sizes})


@pytest.mark.parametrize("name", ["../a.img", "/a.img", "a", "a\0.img", ".img", ""])
def test_a_name_that_is_no_image_is_refused(ends: Ends, name: str) -> None:
    with pytest.raises(CorruptData, match="not the name of an image"):
        ends.receive({"type": "images", "names": [name], "sizes": [1]}, data=(b"x",))
    assert not list(ends.there.iterdir())


def test_an_image_that_comes_twice_is_refused(ends: Ends) -> None:
    with pytest.raises(CorruptData, match="came twice"):
        ends.receive({"type": "images", "names": ["a.img", "a.img"], "sizes": [1, 1]}, data=(b"xy",))


@pytest.mark.parametrize(("sizes", "pieces"), [([2, 2], (b"abc", b"")), ([2], (b"abc",)), ([1, 1], (b"abc",))])
def test_more_or_less_than_was_announced_is_refused(ends: Ends, sizes: list[int], pieces: tuple[bytes, ...]) -> None:
    names = [f"{number}.img" for number in range(len(sizes))]
    with pytest.raises(ProtocolViolation):
        ends.receive({"type": "images", "names": names, "sizes": sizes}, data=pieces)
