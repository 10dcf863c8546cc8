"""Dumps into stores and lazy restores out of them, for tests of the pager."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import find_criu
from runtime.criu.page_protocol import PE_LAZY
from runtime.criu.pages import PageServer, PageTotals, RunReader, SpaceId, page_socketpair
from runtime.criu.rpc import CriuSession
from runtime.memory.lazy import lazy_restore_allowed
from runtime.memory.ranges import PageRanges
from runtime.memory.store import Store
from tests.support.tasks import PATIENCE_S, dump_session, wait_for

CRIU = find_criu()
CHURN = Path(__file__).resolve().parents[1] / "workloads" / "churn.py"
PAGE = 4096
MIB = 1 << 20


class ToStores:
    """Consumer that keeps the pages in a store for each space."""

    def __init__(self) -> None:
        self.stores: dict[SpaceId, Store] = {}
        self.eager: dict[SpaceId, list[tuple[int, int]]] = {}

    def open(self, space: SpaceId) -> None:
        if space not in self.stores:
            self.stores[space] = Store(str(space))

    def run(self, space: SpaceId, address: int, pages: int, flags: int, source: RunReader) -> None:
        with self.stores[space].reserve(address, pages * PAGE) as view:
            source.read_into(view)
        if not flags & PE_LAZY:
            self.eager.setdefault(space, []).append((address, address + pages * PAGE))

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


def present(stores: dict[SpaceId, Store]) -> dict[SpaceId, PageRanges]:
    """The pages that are in them."""
    return {
        space: PageRanges.from_spans((address, address + size) for address, size in store.runs())
        for space, store in stores.items()
    }


class StoreServer:
    """A page server in a thread that fills stores, for one dump. ``theirs`` is CRIU's end."""

    def __init__(self, consumer: ToStores) -> None:
        self._ours, self.theirs = page_socketpair()
        self._server = PageServer(self._ours, CRIU.version, consumer)
        self._outcome: list[PageTotals | BaseException] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            self._outcome.append(self._server.serve(idle_timeout_s=PATIENCE_S))
        except BaseException as error:
            self._outcome.append(error)

    def start(self) -> None:
        """Once CRIU has its end."""
        self.theirs.close()
        self._thread.start()

    def close(self) -> PageTotals:
        self._thread.join(PATIENCE_S)
        self._ours.close()
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def dump_to_stores(pid: int, directory: Path, consumer: ToStores) -> PageTotals:
    """Images without pages in ``directory``, the pages in the consumer's stores; the tasks are dead."""
    server = StoreServer(consumer)
    with dump_session(CRIU, pid, directory, page_fd=server.theirs.fileno()) as (session, request):
        server.start()
        answer = session.run(request, {}, PATIENCE_S)
    totals = server.close()
    assert answer.success, (directory / "dump.log").read_text()
    return totals


def restore_lazily(images: Path, at_end: Callable[[int], None] = lambda _pid: None, *, lazy: bool = True) -> float:
    """As a child of this process, which must reap it; ``at_end`` is called when it is complete but does not run yet.

    The seconds from the request to the answer, without those in ``at_end``.
    """
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with CriuSession.spawn(CRIU) as session:
            request = rpc.criu_req(type=rpc.RESTORE)
            options = request.opts
            options.rst_sibling = True
            options.lazy_pages = lazy
            options.images_dir_fd = fd
            options.log_level = 2
            options.log_file = "restore.log"
            options.notify_scripts = True
            options.manage_cgroups = True
            options.manage_cgroups_mode = rpc.IGNORE
            with lazy_restore_allowed(images):
                begin = time.monotonic()
                answer = session.run(request, {"post-restore": at_end}, PATIENCE_S)
                took_s = time.monotonic() - begin
            assert answer.success, (images / "restore.log").read_text()[-4000:]
            return took_s
    finally:
        os.close(fd)


class Churn:
    """The processes of workloads/churn.py in ``directory``; every one of them says whether its memory is right."""

    def __init__(self, directory: Path, mib: int, workers: int = 3) -> None:
        self.directory = directory
        self.workers = workers
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHURN), str(directory), str(mib), str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        wait_for((directory / "ready").exists, "the workload to be ready")
        self.pids: list[int] = json.loads((directory / "ready").read_text())

    def reap(self) -> None:
        self._process.wait(PATIENCE_S)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.pids), "the processes to be gone")

    def kill(self) -> None:
        for pid in reversed(self.pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pids[0], 0)


def churn_steps(directory: Path, workers: int) -> list[int]:
    """What each worker says last; 0 when it is just about to."""
    files = [directory / str(number) for number in range(workers)]
    return [int(file.read_text() or 0) if file.exists() else 0 for file in files]


def churn_goes_on_and_is_right(directory: Path, workers: int) -> None:
    """Every worker makes further steps and then finds every page as it must be."""
    wrong, checked = directory / "wrong", directory / "checked"
    before = churn_steps(directory, workers)
    word = secrets.token_hex(4)
    (directory / "check.new").write_text(word)
    os.rename(directory / "check.new", directory / "check")

    def all_did() -> bool:
        assert not wrong.exists(), wrong.read_text()
        if not checked.exists() or checked.read_text().count(word) < workers:
            return False
        return all(now > then for now, then in zip(churn_steps(directory, workers), before, strict=True))

    try:
        wait_for(all_did, "every worker to look at all of its memory")
    except AssertionError as error:
        error.add_note(f"steps: {before}, then {churn_steps(directory, workers)}\n{_where_they_are()}")
        raise


def _where_they_are() -> str:
    """What each thread of the workload does in the kernel."""
    found = []
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(OSError):
            if CHURN.name in (task / "cmdline").read_text():
                stack = (task / "stack").read_text().splitlines()[:6]
                found.append(f"{task}: {(task / 'stat').read_text().split()[2:4]}\n  " + "\n  ".join(stack))
    return "\n".join(found)
