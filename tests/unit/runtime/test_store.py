"""Containers on disk: names are unique, a crash leaves the truth, damage of one does not hide the others."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from runtime.api import ContainerSpec, ContainerState, NetworkSpec, Status
from runtime.errors import Busy, CorruptData, NameTaken, NotFound
from runtime.host import HostConfig
from runtime.store import INCOMING, SPEC, STATE, ContainerStore, process_start_ticks, write_durably


@pytest.fixture
def store(tmp_path: Path) -> ContainerStore:
    return ContainerStore(HostConfig(name="h", state_dir=tmp_path))


def spec_of(name: str, container_id: str = "", address: str = "") -> ContainerSpec:
    network = NetworkSpec(address=address, mac="02:42:0a:58:00:05", gateway="10.88.0.1") if address else None
    return ContainerSpec(
        id=container_id or ContainerStore.new_id(),
        name=name,
        rootfs="host",
        argv=("true",),
        created_at="2026-01-01T00:00:00.000Z",
        network=network,
    )


RUNNING = ContainerState(status=Status.RUNNING, init_pid=1, init_start_ticks=2)


def test_a_created_container_is_found_by_name_id_and_prefix(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    assert [store.get(reference) for reference in ("web1", made.id, made.id[:4])] == [made] * 3
    assert store.containers() == [made]


def test_an_unknown_reference_names_what_is_close(store: ContainerStore) -> None:
    store.create(spec_of("database"))
    with pytest.raises(NotFound) as caught:
        store.get("databse")
    assert caught.value.hint == "did you mean database?"


def test_a_prefix_of_two_ids_is_refused(store: ContainerStore) -> None:
    store.create(spec_of("a", "aa0000000001"))
    store.create(spec_of("b", "aa0000000002"))
    with pytest.raises(NotFound, match="means 2 containers"):
        store.get("aa")
    assert store.get("b").id == "aa0000000002"


def test_one_letter_is_never_taken_as_part_of_an_id(store: ContainerStore) -> None:
    store.create(spec_of("web", "c00000000001"))
    with pytest.raises(NotFound):
        store.get("c")


def test_a_name_can_be_had_once_and_again_after_removal(store: ContainerStore) -> None:
    first = store.create(spec_of("web1"))
    with pytest.raises(NameTaken, match=first.id):
        store.create(spec_of("web1"))
    store.remove(first.id)
    assert store.create(spec_of("web1")).id != first.id


def test_an_address_can_be_had_once(store: ContainerStore) -> None:
    store.create(spec_of("a", address="10.88.0.5/16"))
    with pytest.raises(NameTaken, match="10.88.0.5 is taken by container a"):
        store.create(spec_of("b", address="10.88.0.5/24"))


def _create_in_child(store: ContainerStore, start: int) -> int:
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.read(start, 1)
            store.create(spec_of("same"))
            status = 0
        except NameTaken:
            status = 1
        finally:
            os._exit(status)
    return pid


def test_of_four_processes_that_want_one_name_at_once_one_gets_it(store: ContainerStore) -> None:
    reader, writer = os.pipe()
    children = [_create_in_child(store, reader) for _ in range(4)]
    os.write(writer, b"gogo")
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    os.close(reader)
    os.close(writer)
    assert codes == [0, 1, 1, 1]


# Reservation of a container on its way here


def test_a_reserved_container_has_its_name_but_is_not_listed(store: ContainerStore) -> None:
    spec = spec_of("web1")
    store.reserve(spec, "move1")
    assert store.containers() == []
    assert store.incoming() == [("move1", spec)]
    with pytest.raises(NameTaken):
        store.create(spec_of("web1"))


def test_an_admitted_container_is_listed_and_no_longer_incoming(store: ContainerStore) -> None:
    spec = spec_of("web1")
    store.reserve(spec, "move1")
    store.admit(spec.id, RUNNING)
    assert store.get("web1").state == RUNNING
    assert store.incoming() == []


def test_forgetting_a_reservation_frees_the_name_for_the_same_move_only(store: ContainerStore) -> None:
    spec = spec_of("web1")
    store.reserve(spec, "move1")
    store.forget_reservation(spec.id, "another")
    assert store.incoming()
    store.forget_reservation(spec.id, "move1")
    store.forget_reservation(spec.id, "move1")
    assert store.incoming() == []
    assert not store.directory(spec.id).exists()


@pytest.mark.parametrize("written", [[], [STATE]])
def test_a_reservation_that_was_cut_short_is_forgotten_too(store: ContainerStore, written: list[str]) -> None:
    directory = store.directory(spec_of("web1").id)
    directory.mkdir(parents=True)
    for name in written:
        (directory / name).write_text("{}")
    store.forget_reservation(directory.name, "move1")
    assert not directory.exists()


def test_a_crash_in_the_middle_of_admit_does_not_make_the_container_removable(store: ContainerStore) -> None:
    spec = spec_of("web1")
    store.reserve(spec, "move1")
    reservation = (store.directory(spec.id) / INCOMING).read_bytes()
    store.admit(spec.id, RUNNING)
    (store.directory(spec.id) / INCOMING).write_bytes(reservation)
    store.forget_reservation(spec.id, "move1")
    assert store.get("web1").state == RUNNING
    assert store.incoming() == []


def test_each_stay_of_a_container_on_a_host_is_told_from_the_others(store: ContainerStore) -> None:
    spec = spec_of("web1")
    assert store.came_by(spec.id) == ""
    store.create(spec)
    assert store.came_by(spec.id) == ""
    store.remove(spec.id)
    for move_id in ("move1", "move2"):
        store.reserve(spec, move_id)
        assert store.came_by(spec.id) == move_id
        store.admit(spec.id, RUNNING)
        assert store.came_by(spec.id) == move_id
        store.remove(spec.id)
    assert store.came_by(spec.id) == ""


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 99}',
        b'{"schema": 1}',
        b"null",
    ],
)
@pytest.mark.parametrize("file", [SPEC, STATE])
def test_one_damaged_container_is_a_warning_and_hides_no_other(store: ContainerStore, file: str, damage: bytes) -> None:
    good, bad = store.create(spec_of("good")), store.create(spec_of("bad"))
    (store.directory(bad.id) / file).write_bytes(damage)
    assert store.containers() == [good]
    (warning,) = store.warnings
    assert str(store.directory(bad.id) / file) in warning


def test_a_spec_with_an_impossible_name_is_damage_and_not_a_crash(store: ContainerStore) -> None:
    bad = store.create(spec_of("bad"))
    file = store.directory(bad.id) / SPEC
    file.write_text(file.read_text().replace('"bad"', '"../../etc"'))
    assert store.containers() == []
    assert "is no container name" in store.warnings[0]


def test_a_spec_that_lies_in_another_ones_directory_is_damage(store: ContainerStore) -> None:
    good = store.create(spec_of("good"))
    shutil.copytree(store.directory(good.id), store.directory("0" * 12))
    assert store.containers() == [good]
    assert good.id in store.warnings[0]


def test_a_missing_state_file_is_told_and_keeps_the_name(store: ContainerStore) -> None:
    bad = store.create(spec_of("bad"))
    (store.directory(bad.id) / STATE).unlink()
    assert store.containers() == []
    assert store.warnings == [f"{store.directory(bad.id) / STATE} is missing"]
    with pytest.raises(NameTaken):
        store.create(spec_of("bad"))


def test_the_files_of_a_damaged_container_are_not_overwritten_by_one_of_the_same_id(store: ContainerStore) -> None:
    bad = store.create(spec_of("bad"))
    directory = store.directory(bad.id)
    (directory / SPEC).write_text("{")
    (directory / "upper").mkdir()
    with pytest.raises(NameTaken, match=str(directory)):
        store.reserve(spec_of("other", bad.id), "move1")
    assert (directory / "upper").exists()


def test_a_half_made_directory_is_skipped_and_replaced(store: ContainerStore) -> None:
    container_id = store.new_id()
    (store.directory(container_id) / "upper").mkdir(parents=True)
    assert store.containers() == []
    assert store.warnings == []
    store.create(spec_of("web1", container_id))
    assert not (store.directory(container_id) / "upper").exists()


def test_get_tells_of_damage_when_it_finds_nothing(store: ContainerStore) -> None:
    bad = store.create(spec_of("bad"))
    (store.directory(bad.id) / SPEC).write_text("{")
    with pytest.raises(NotFound, match="is damaged"):
        store.get("bad")


# Writing


def test_a_state_is_replaced_and_no_temporary_file_stays(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    store.write_state(made.id, RUNNING)
    assert store.get("web1").state == RUNNING
    assert sorted(os.listdir(store.directory(made.id))) == [SPEC, STATE]


def test_a_replaced_spec_is_read_back(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    changed = dataclasses.replace(made.spec, name="web2")
    store.replace_spec(made.id, changed)
    assert store.get("web2").spec == changed


def test_readers_never_see_half_a_file(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    file = store.directory(made.id) / STATE
    done = threading.Event()
    seen: list[object] = []

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads(file.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for pid in range(200):
        store.write_state(made.id, dataclasses.replace(RUNNING, init_pid=pid, moved_to="x" * (pid * 17 % 300)))
    done.set()
    reader.join(10)
    assert seen


def test_two_threads_may_write_one_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    contents = [bytes([letter]) * 5000 for letter in b"abcd"]

    def write(data: bytes) -> None:
        for _ in range(20):
            write_durably(file, data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert file.read_bytes() in contents
    assert os.listdir(tmp_path) == ["f"]


# Truth after a crash


def test_a_recorded_process_that_lives_is_running(store: ContainerStore) -> None:
    own = ContainerState(
        status=Status.RUNNING, init_pid=os.getpid(), init_start_ticks=process_start_ticks(os.getpid()) or 0
    )
    made = store.create(spec_of("web1"))
    assert store.observe(dataclasses.replace(made, state=own)) == own


def test_a_recorded_process_that_is_gone_means_exited_with_the_code_unknown(store: ContainerStore) -> None:
    child = subprocess.Popen(["sleep", "60"])
    ticks = process_start_ticks(child.pid)
    assert ticks
    state = ContainerState(status=Status.PAUSED, init_pid=child.pid, init_start_ticks=ticks, started_at="then")
    made = dataclasses.replace(store.create(spec_of("web1")), state=state)
    assert store.observe(made).status == Status.PAUSED
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_ticks(child.pid) is None, "a zombie is no running process"
    assert store.observe(made) == ContainerState(status=Status.EXITED, started_at="then")
    child.wait(10)
    assert store.observe(made).status == Status.EXITED


def test_a_pid_that_belongs_to_another_process_by_now_means_exited(store: ContainerStore) -> None:
    reused = ContainerState(status=Status.RUNNING, init_pid=os.getpid(), init_start_ticks=1)
    made = store.create(spec_of("web1"))
    assert store.observe(dataclasses.replace(made, state=reused)).status == Status.EXITED


def test_states_that_claim_no_process_are_believed(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    for status in (Status.CREATED, Status.EXITED, Status.MOVED):
        state = ContainerState(status=status, exit_code=3)
        assert store.observe(dataclasses.replace(made, state=state)) == state


# Locking


def test_a_held_lock_names_purpose_and_pid_of_its_holder(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    with (
        store.locked(made.id, wait_s=0, purpose="move to host2"),
        pytest.raises(Busy, match=rf"held by move to host2 \(pid {os.getpid()}\)"),
        store.locked(made.id, wait_s=0.05, purpose="stop"),
    ):
        pass
    with store.locked(made.id, wait_s=0, purpose="stop"):
        pass


def test_a_lock_is_waited_for(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    order: list[str] = []
    held = threading.Event()

    def hold() -> None:
        with store.locked(made.id, wait_s=0, purpose="first"):
            held.set()
            threading.Event().wait(0.1)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)
    with store.locked(made.id, wait_s=5, purpose="second"):
        order.append("second")
    thread.join(5)
    assert order == ["first", "second"]


def test_the_lock_of_a_killed_process_is_free(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    pid = os.fork()
    if pid == 0:
        try:
            with store.locked(made.id, wait_s=0, purpose="doomed"):
                os.kill(os.getpid(), 9)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    with store.locked(made.id, wait_s=0, purpose="next"):
        pass


def test_whoever_waited_for_a_removed_container_is_told_that_it_is_gone(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            with store.locked(made.id, wait_s=5, purpose="late"):
                pass
        except NotFound as error:
            failures.append(error)

    with store.locked(made.id, wait_s=0, purpose="rm"):
        thread = threading.Thread(target=wait)
        thread.start()
        threading.Event().wait(0.05)
        store.remove(made.id)
    thread.join(10)
    assert len(failures) == 1


def test_a_removal_that_was_cut_short_is_finished_by_the_next_creation(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    left = store.directory(made.id).with_name(f".removed-{made.id}.1.1")
    store.directory(made.id).rename(left)
    assert store.containers() == []
    store.create(spec_of("web1"))
    assert not left.exists()


def test_the_lock_of_a_container_made_anew_is_another_one(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    with store.locked(made.id, wait_s=0, purpose="rm"):
        store.remove(made.id)
        store.create(made.spec)
        with store.locked(made.id, wait_s=0, purpose="start"):
            pass


def test_a_damaged_file_read_alone_names_the_file(store: ContainerStore) -> None:
    made = store.create(spec_of("web1"))
    file = store.directory(made.id) / SPEC
    file.write_text("{}")
    with pytest.raises(CorruptData, match=str(file)):
        ContainerStore._read(store.directory(made.id))
