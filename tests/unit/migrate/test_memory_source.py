import ctypes
import mmap
import os
import threading

from migrate.memory_source import DifferenceSender, LiveMemory
from migrate.messages import HELD_FLAG
from migrate.outgoing import Outgoing
from runtime.criu.page_protocol import PE_LAZY, PE_PRESENT
from runtime.criu.pages import SpaceId
from runtime.memory.ranges import PAGE_BYTES, PageRanges
from runtime.memory.tracker_still import StillTracker
from transport.api import Deadline, FrameKind
from transport.testing.memory import memory_pair

PAGES = 4
TASK = SpaceId("task", 7)


class Stream:
    """A run of CRIU's whose pages are all what a system call looks like that it makes in a task."""

    def __init__(self) -> None:
        self.discarded = 0

    def read_into(self, view: memoryview) -> None:
        view[:] = b"\x0f\x05" * (len(view) // 2)

    def discard(self, size_bytes: int) -> None:
        self.discarded += size_bytes


def test_code_is_not_taken_from_the_stream_but_read_when_criu_is_done() -> None:
    area = mmap.mmap(-1, PAGES * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area[:] = b"code" * (PAGES * PAGE_BYTES // 4)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ours, theirs = memory_pair()
    received = []

    def receive() -> None:
        while (frame := theirs.receive(deadline=Deadline.after(30))).kind is FrameKind.DATA or frame.message():
            received.append(frame.message() if frame.kind is FrameKind.CONTROL else bytes(frame.body))

    thread = threading.Thread(target=receive)
    thread.start()
    out = Outgoing(ours, lambda: Deadline.after(30))
    live = LiveMemory(list, out, StillTracker())
    live.pids[7] = os.getpid()
    live.code[7] = PageRanges.from_spans([(start + PAGE_BYTES, start + 3 * PAGE_BYTES)])
    sender = DifferenceSender(out, live)
    sender.open(TASK)
    stream = Stream()
    sender.run(TASK, start, PAGES, PE_PRESENT, stream)  # type: ignore[arg-type]
    sender.flush()
    live.send_late()
    out.control({})
    thread.join(30)
    for channel in (ours, theirs):
        channel.close()

    assert stream.discarded == 2 * PAGE_BYTES
    _space, pages, data, late, code = received
    assert isinstance(pages, dict)
    assert isinstance(late, dict)
    assert pages["runs"] == [
        *(start, 1, PE_PRESENT),
        *(start + PAGE_BYTES, 2, PE_PRESENT | HELD_FLAG),
        *(start + 3 * PAGE_BYTES, 1, PE_PRESENT),
    ]
    assert data == b"\x0f\x05" * PAGE_BYTES
    assert (late["id"], late["runs"], late["zeros"]) == (7, [start + PAGE_BYTES, 2], [])
    assert code == bytes(area[PAGE_BYTES : 3 * PAGE_BYTES])


def test_code_that_the_target_has_from_before_the_dump_is_not_read_again() -> None:
    ours, theirs = memory_pair()
    live = LiveMemory(list, Outgoing(ours, lambda: Deadline.after(30)), StillTracker())
    live.code[7] = live.fresh[7] = PageRanges.from_spans([(0x1000, 0x3000)])
    sender = DifferenceSender(Outgoing(ours, lambda: Deadline.after(30)), live)
    sender.open(TASK)
    stream = Stream()
    sender.run(TASK, 0x1000, 2, PE_PRESENT | PE_LAZY, stream)  # type: ignore[arg-type]
    assert stream.discarded == 2 * PAGE_BYTES
    assert not live.late
    for channel in (ours, theirs):
        channel.close()
