"""Containers restored with their memory still in the stores: user namespace, threads, forks, and the pager's death."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.api import Container, Status
from runtime.container import Containers
from runtime.criu.dump import HeldDump
from runtime.criu.lazy_images import write_lazy_images
from runtime.criu.pages import SpaceId
from runtime.criu.restore import HeldRestore
from runtime.errors import CriuFailed
from runtime.memory.lazy import SYSCTL
from runtime.memory.pager import Pager, PagerDied
from runtime.specify import new_spec
from tests.support.containers import one_host
from tests.support.lazy import CHURN, CRIU, StoreServer, ToStores, churn_goes_on_and_is_right, present
from tests.support.tasks import PATIENCE_S, wait_for

WORKERS = 3


@pytest.fixture
def containers() -> Iterator[Containers]:
    with one_host("cmpg0") as found:
        yield found


@pytest.fixture
def images() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cmigrate-test-", dir="/dev/shm") as directory:
        yield Path(directory)


class Moved:
    """A churning container that was dumped into stores and is restored from them on the same host."""

    def __init__(self, containers: Containers, mib: int) -> None:
        self.containers = containers
        # As text: the checkout may lie where a container does not see the host.
        program = ["-I", "-S", "-B", "-c", CHURN.read_text()]
        argv = [os.path.realpath("/usr/bin/python3"), *program, "/churn", str(mib), str(WORKERS)]
        spec = new_spec(containers, argv=argv, name="web1", rootfs="host", network=False)
        self.container: Container = containers.run(spec)
        self.directory = containers.store.directory(spec.id)
        log = containers.log_path("web1")
        try:
            wait_for((self.directory / "upper/churn/ready").exists, "the workload to be ready")
        except AssertionError as error:
            error.add_note(log.read_text() if log.exists() else "no log")
            raise
        self.stores = ToStores()

    @property
    def root(self) -> Path:
        """As its processes see it; what is written beside them into the upper layer they need not see."""
        return Path(f"/proc/{self.containers.get('web1').state.init_pid}/root/churn")

    def dump(self, images: Path) -> HeldDump:
        dump = HeldDump(self.containers, self.containers.get("web1"), CRIU, images)
        server = StoreServer(self.stores)
        try:
            dump.prepare(page_socket=server.theirs)
            server.start()
            dump.freeze()
            dump.dump()
            server.close()
            dump.finish()
        except BaseException:
            dump.rollback()
            raise
        self.containers.clean_up(self.container.id)
        return dump

    def restore(self, dump: HeldDump, images: Path, at_end: Callable[[Pager], None] | None = None) -> Pager:
        """``at_end`` is called when nothing is missing but the release; what it raises discards the restore."""
        held = HeldRestore(self.containers, self.container.spec, CRIU, images, self.directory)
        cgroup = self.containers.cgroup(self.container.id)
        held.prepare()
        pager = Pager(cgroup.paths(), record=self.directory / "pager.json")
        try:
            stores, eager = self.stores.stores, self.stores.eager
            for space in write_lazy_images(images, CRIU.version, stores, present=present(stores), eager=eager):
                pager.add_space(space.vpid, self.stores.stores[SpaceId("task", space.vpid)], space.spans)
            self.stores.close()
            pager.listen(images)
            held.restore(dump.mounts, dump.pipes, lazy=True)
            pager.begin_filling()
            if at_end is not None:
                at_end(pager)
            state = held.release()
            self.containers.store.write_state(self.container.id, state)
            held.settle()
        except BaseException:
            pager.abandon()
            held.discard()
            raise
        return pager


def test_a_container_with_its_own_user_namespace_is_filled_while_it_runs(containers: Containers, images: Path) -> None:
    moved = Moved(containers, 96)
    churn_goes_on_and_is_right(moved.root, WORKERS)
    dump = moved.dump(images)
    with moved.restore(dump, images) as pager:
        report = pager.wait(PATIENCE_S)
        churn_goes_on_and_is_right(moved.root, WORKERS)
        assert report.filled_bytes > 96 << 20
    assert SYSCTL.read_text() == "0\n"


def test_when_the_pager_is_killed_the_container_is_killed_and_it_is_said(containers: Containers, images: Path) -> None:
    moved = Moved(containers, 192)
    dump = moved.dump(images)
    with moved.restore(dump, images) as pager:
        os.kill(pager.pid, signal.SIGKILL)
        with pytest.raises(PagerDied, match="signal 9"):
            pager.wait(PATIENCE_S)
    assert "signal 9" in (moved.directory / "pager.json").read_text()
    wait_for(lambda: containers.get("web1").state.status == Status.EXITED, "the container to be recorded as exited")
    # Nobody has seen a page of zeros that was none.
    assert not (moved.directory / "upper/churn/wrong").exists()


def test_a_pager_killed_before_the_release_lets_no_instruction_run(containers: Containers, images: Path) -> None:
    moved = Moved(containers, 64)
    churn_goes_on_and_is_right(moved.root, WORKERS)
    dump = moved.dump(images)
    steps = [(moved.directory / "upper/churn" / str(number)).read_text() for number in range(WORKERS)]

    def kill(pager: Pager) -> None:
        os.kill(pager.pid, signal.SIGKILL)
        with pytest.raises(PagerDied):
            pager.wait(PATIENCE_S)

    with pytest.raises(CriuFailed):
        moved.restore(dump, images, kill)
    assert [(moved.directory / "upper/churn" / str(number)).read_text() for number in range(WORKERS)] == steps


def test_a_discarded_restore_leaves_no_pager(containers: Containers, images: Path) -> None:
    moved = Moved(containers, 16)
    dump = moved.dump(images)
    seen: list[int] = []

    def give_up(pager: Pager) -> None:
        seen.append(pager.pid)
        raise ConnectionError("the source is gone")

    with pytest.raises(ConnectionError):
        moved.restore(dump, images, give_up)
    wait_for(lambda: not Path(f"/proc/{seen[0]}").exists(), "the pager to be gone")
    assert not (moved.directory / "pager.json").exists()
