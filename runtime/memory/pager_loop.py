"""The pager's loop: who waits for a page first, then one piece of what is left, over and over. Stdlib only."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
from dataclasses import asdict
from typing import Any

from runtime.errors import CorruptData, RuntimeFault
from runtime.linux.seqpacket import receive
from runtime.memory.filling import (
    FILL_BYTES,
    FILL_BYTES_AMID_FAULTS,
    Buffer,
    Counters,
    Filling,
    ProcessGone,
    StoreFile,
)
from runtime.memory.segments import Segments

SOCKET_NAME = "lazy-pages.socket"
MAX_MESSAGE_BYTES = 1 << 16
# criu/include/uffd.h: what CRIU sends instead of a pid when every task is restored.
RESTORE_FINISHED = 0x52535446
CRIU_TIMEOUT_S = 10.0
_PID = struct.Struct("=i")
_SPAN = struct.Struct("=QQ")
# Memory is changing, or a fault could not be answered: look again after this long, if no event says so earlier.
RETRY_MS = 1


class _Plan:
    """What is known of a task before it exists."""

    def __init__(
        self,
        store: StoreFile,
        spans: list[tuple[int, int]],
        *,
        hot: list[tuple[int, int]],
        remote: list[tuple[int, int]],
    ) -> None:
        self.store = store
        self.segments = Segments(spans)
        self.remote = self.segments.part(remote)
        self.hot = hot

    def arrived(self, start: int, end: int) -> None:
        for segment in self.remote.take_stored(start, end):
            self.segments.add(segment)


class PagerLoop:
    """``control`` is the caller's, ``guard`` the guard's end of a socketpair."""

    def __init__(self, control: socket.socket, guard: socket.socket) -> None:
        self._control = control
        self._guard = guard
        self._plans: dict[int, _Plan] = {}
        self._stores: dict[int, StoreFile] = {}
        self._fillings: dict[int, Filling] = {}
        self._held: dict[int, int] = {}
        self._serial = 0
        self._buffer = Buffer()
        self._counters = Counters()
        self._listener: socket.socket | None = None
        self._criu: socket.socket | None = None
        self._may_fill = False
        self.resumed = False
        """CRIU has said that the restore is finished; before that, no task runs."""
        self._ended = False
        self._since = time.monotonic()
        self._complete_ms = 0.0
        self._epoll = select.epoll()
        self._epoll.register(control, select.EPOLLIN)

    def run(self) -> None:
        """Until all memory is filled or the restore is abandoned. An exception is the container's end."""
        self._tell("ready", pid=os.getpid())
        stuck = False
        while not self._ended:
            work = self._may_fill and any(filling.has_work for filling in self._fillings.values())
            again = stuck or any(filling.waiting for filling in self._fillings.values())
            # Nothing to do but wait, or changing memory to wait for, or a look in passing.
            events = self._epoll.poll(RETRY_MS / 1000 if again else 0 if work else None)
            waited = self._hear_all([fd for fd, _event in events])
            self._ask_for_wanted()
            stuck = False
            if work and not self._ended:
                stuck = not self._fill_one(FILL_BYTES_AMID_FAULTS if waited else FILL_BYTES)
            self._end_if_complete()

    # Hearing

    def _hear_all(self, descriptors: list[int]) -> bool:
        """Whether somebody waited for a page."""
        before = self._counters.faults
        for fd in descriptors:
            if fd == self._control.fileno():
                self._hear_caller()
            elif self._listener is not None and fd == self._listener.fileno():
                self._accept()
            elif self._criu is not None and fd == self._criu.fileno():
                self._hear_criu()
        for filling in [self._fillings[fd] for fd in descriptors if fd in self._fillings]:
            self._listen_to(filling)
        for filling in [filling for filling in self._fillings.values() if filling.waiting]:
            self._listen_to(filling)
        return self._counters.faults != before

    def _listen_to(self, filling: Filling) -> None:
        born: list[Filling] = []
        try:
            filling.listen(born)
        except ProcessGone:
            self._remove(filling)
        for child in born:
            self._add(child)

    def _hear_caller(self) -> None:
        try:
            data, descriptors = receive(self._control, MAX_MESSAGE_BYTES, 253)
        except OSError:
            data, descriptors = b"", []
        if not data:
            # Whoever started us has gone. A restore that has begun is not his any more.
            self._epoll.unregister(self._control)
            self._may_fill = True
            if self._criu is None and not self.resumed:
                self._end()
            else:
                self._lose("the agent that had to bring it has ended")
            return
        message = json.loads(data)
        self._obey(message, descriptors)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        op = message["op"]
        if op == "guard":
            self._tell_guard({"cgroups": message["cgroups"], "record": message["record"]})
        elif op == "space":
            self._learn_space(message, *descriptors)
        elif op == "listen":
            self._listen_for_criu(*descriptors)
        elif op == "fill":
            self._may_fill = True
        elif op == "arrived":
            self._let_in(message["vpid"], message["runs"])
        elif op == "lose":
            self._lose(message["why"])
        elif op == "count":
            self._tell("counters", **self._numbers())
        elif op == "abandon":
            self._end()

    def _learn_space(self, message: dict[str, Any], store: int, plan: int) -> None:
        with open(plan, "rb") as file:
            spans = list(_SPAN.iter_unpack(file.read()))
        vpid, count, hot = message["vpid"], message["spans"], message["hot"]
        self._stores[vpid] = StoreFile(store, vpid)
        self._plans[vpid] = _Plan(
            self._stores[vpid], spans[:count], hot=spans[count : count + hot], remote=spans[count + hot :]
        )

    # What has not come yet

    def _let_in(self, vpid: int, runs: list[int]) -> None:
        """(offset, size in bytes) of what the caller has put into the store."""
        store = self._stores[vpid]
        users = [filling for filling in self._fillings.values() if filling.store is store]
        for start, size in zip(runs[::2], runs[1::2], strict=True):
            if vpid in self._plans:
                self._plans[vpid].arrived(start, start + size)
            for filling in users:
                filling.arrived(start, start + size)

    def _ask_for_wanted(self) -> None:
        for store in self._stores.values():
            for offset in store.wanted:
                # A request that gets lost only delays: everything comes in its turn.
                self._tell("want", vpid=store.vpid, offset=offset)
            store.wanted.clear()

    def _lose(self, why: str) -> None:
        """Nothing will come any more. Without it the container can not live."""
        missing = sum(filling.remote_bytes for filling in self._fillings.values())
        missing += sum(plan.remote.bytes for plan in self._plans.values())
        if missing:
            raise RuntimeFault(f"{missing} bytes of memory were still missing: {why}")

    def _listen_for_criu(self, directory: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A path of a socket is at most 108 bytes, a path of a directory can be longer.
        self._listener.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        self._listener.listen(1)
        os.close(directory)
        self._epoll.register(self._listener, select.EPOLLIN)
        self._tell("listening")

    def _accept(self) -> None:
        assert self._listener is not None
        self._criu, _address = self._listener.accept()
        self._epoll.unregister(self._listener)
        self._listener.close()
        self._listener = None
        self._criu.settimeout(CRIU_TIMEOUT_S)
        self._epoll.register(self._criu, select.EPOLLIN)
        self._tell("connected")

    def _hear_criu(self) -> None:
        """A task's pid and its userfaultfd, or the word that all are restored."""
        assert self._criu is not None
        data = self._criu.recv(_PID.size, socket.MSG_WAITALL)
        if len(data) < _PID.size:
            raise RuntimeFault("CRIU ended before the restore was finished")
        (pid,) = _PID.unpack(data)
        if pid == RESTORE_FINISHED:
            self._epoll.unregister(self._criu)
            self._criu.close()
            self._criu = None
            # Filling waits for the caller's word: CRIU still has to let go, and needs the processor.
            self.resumed = True
            self._since = time.monotonic()
            self._tell("resumed", tasks=len(self._fillings))
        elif pid > 0:  # a zombie has no memory
            _data, descriptors, _flags, _address = socket.recv_fds(self._criu, 1, 1)
            if pid not in self._plans or not descriptors:
                raise CorruptData(f"CRIU restores task {pid}, whose memory is not known here")
            plan = self._plans.pop(pid)
            self._add(
                Filling(descriptors[0], plan.store, plan.segments, plan.remote, plan.hot, self._buffer, self._counters)
            )

    # Filling

    def _add(self, filling: Filling) -> None:
        # The guard first: from then on the pager may die.
        self._serial += 1
        self._tell_guard({"hold": self._serial}, filling.descriptor)
        self._held[filling.descriptor] = self._serial
        self._fillings[filling.descriptor] = filling
        self._epoll.register(filling.descriptor, select.EPOLLIN)

    def _remove(self, filling: Filling) -> None:
        del self._fillings[filling.descriptor]
        self._epoll.unregister(filling.descriptor)
        self._tell_guard({"let_go": self._held.pop(filling.descriptor)})
        filling.close()

    def _fill_one(self, limit_bytes: int) -> bool:
        """One piece of the first task that can take one; False when memory is changing in all that are left."""
        moved = False
        for filling in list(self._fillings.values()):
            try:
                moved = filling.fill(limit_bytes)
            except ProcessGone:
                self._remove(filling)
                return True
            if filling.complete and self.resumed:
                self._remove(filling)
                return True
            if moved:
                break
        return moved

    def _end_if_complete(self) -> None:
        if self.resumed and not self._fillings and not self._ended:
            self._complete_ms = (time.monotonic() - self._since) * 1000
            self._tell("filled", **self._numbers())
            self._end()

    def _numbers(self) -> dict[str, Any]:
        left = len(self._fillings)
        return {**asdict(self._counters), "tasks_left": left, "complete_ms": self._complete_ms}

    def _end(self) -> None:
        self._ended = True
        self._tell_guard({"over": True})

    # Telling

    def _tell(self, event: str, **details: Any) -> None:
        # Nobody may be there to listen, or not be reading.
        with contextlib.suppress(OSError):
            self._control.send(json.dumps({"event": event, **details}).encode(), socket.MSG_DONTWAIT)

    def _tell_guard(self, message: dict[str, Any], *descriptors: int) -> None:
        # Without a guard the work goes on: it is the one who would be missed when this process dies, not before.
        with contextlib.suppress(OSError):
            socket.send_fds(self._guard, [json.dumps(message).encode()], list(descriptors))
