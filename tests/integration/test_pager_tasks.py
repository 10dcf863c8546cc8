"""Bare processes restored with their memory still in the stores, and filled by the pager while they run."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import find_criu
from runtime.criu.lazy_images import write_lazy_images
from runtime.criu.page_protocol import PE_LAZY
from runtime.criu.pages import PageServer, PageTotals, RunReader, SpaceId, page_socketpair
from runtime.criu.rpc import CriuSession
from runtime.memory.lazy import lazy_restore_allowed
from runtime.memory.pager import Pager
from runtime.memory.store import Store
from tests.support.tasks import PATIENCE_S, Tasks, dump_session, running_tasks

CRIU = find_criu()
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


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def dump_to_stores(pid: int, directory: Path, consumer: ToStores) -> PageTotals:
    """Images without pages in ``directory``, the pages in the consumer's stores; the tasks are dead."""
    ours, theirs = page_socketpair()
    server = PageServer(ours, CRIU.version, consumer)
    outcome: list[PageTotals | BaseException] = []

    def serve() -> None:
        try:
            outcome.append(server.serve(idle_timeout_s=PATIENCE_S))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=serve)
    with ours:
        with dump_session(CRIU, pid, directory, page_fd=theirs.fileno()) as (session, request):
            theirs.close()
            thread.start()
            answer = session.run(request, {}, PATIENCE_S)
        thread.join(PATIENCE_S)
    assert answer.success, (directory / "dump.log").read_text()
    assert isinstance(outcome[0], PageTotals), outcome
    return outcome[0]


def restore_lazily(images: Path, *, at_post_restore: object = None) -> None:
    fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with CriuSession.spawn(CRIU) as session:
            request = rpc.criu_req(type=rpc.RESTORE)
            options = request.opts
            options.rst_sibling = True
            options.lazy_pages = True
            options.images_dir_fd = fd
            options.log_level = 4
            options.log_file = "restore.log"
            options.notify_scripts = True
            options.manage_cgroups = True
            options.manage_cgroups_mode = rpc.IGNORE
            with lazy_restore_allowed():
                answer = session.run(request, {}, PATIENCE_S)
            assert answer.success, (images / "restore.log").read_text()[-4000:]
    finally:
        os.close(fd)


@contextlib.contextmanager
def moved(tasks: Tasks, directory: Path) -> Iterator[Pager]:
    """Dumped into stores and restored lazily; the pager fills."""
    consumer = ToStores()
    try:
        dump_to_stores(tasks.pids[0], directory, consumer)
        tasks.reap()
        spaces = write_lazy_images(directory, CRIU.version, consumer.stores, eager=consumer.eager)
        with Pager([], record=directory / "pager.json") as pager:
            for space in spaces:
                pager.add_space(space.vpid, consumer.stores[SpaceId("task", space.vpid)], space.spans)
            consumer.close()
            pager.listen(directory)
            restore_lazily(directory)
            yield pager
    finally:
        consumer.close()


def test_memory_of_every_kind_is_what_it_was_after_a_lazy_restore(tmp_path: Path, memory: Path) -> None:
    with running_tasks(tmp_path, 64) as tasks:
        before = tasks.contents()
        with moved(tasks, memory) as pager:
            assert tasks.contents() == before
            report = pager.wait(PATIENCE_S)
            print(report)
            assert report.filled_bytes > 64 * MIB
            assert tasks.contents() == before
            tasks.count_up(1)
            assert tasks.contents()[2]["count"] == before[2]["count"] + 1
