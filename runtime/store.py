"""Containers on disk: one directory each, replaced by rename, serialised by a lock. Nothing here touches a process.

A container being moved in has ``incoming.json`` instead of ``spec.json``: its name is taken, but no command sees it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.api import ID_PATTERN, Container, ContainerSpec, ContainerState, Status, spec_from_json, state_from_json
from runtime.errors import Busy, CorruptData, NameTaken, NoRoom, NotFound, RuntimeFault
from runtime.host import HostConfig

STORE_LOCK_WAIT_S = 10.0
LOCK_POLL_S = 0.01
SPEC, INCOMING, STATE = "spec.json", "incoming.json", "state.json"
ARRIVED = "arrived.json"
"""What ``incoming.json`` was: the move that brought the container into this directory."""
REMOVED_PREFIX = ".removed-"
DAMAGE_HINT = "restore it from a backup, or remove the container's directory"


def process_start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: with the pid it names one process for good. None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def write_durably(file: Path, data: bytes) -> None:
    """Replace ``file``; contents and name are on disk when this returns. Raises NoRoom for a full disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(data)
            while left:  # a disk that fills up takes a part first and fails after that
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, file)
        sync_directory(file.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"no room to write {file}", hint=f"free space on {file.parent}") from error
        raise


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any]:
    """Raises CorruptData naming the file, FileNotFoundError when it is not there."""
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"{file} is damaged: {error}", hint=DAMAGE_HINT) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptData(f"{file} can not be read: {error.strerror}", hint=DAMAGE_HINT) from error
    if not isinstance(data, dict):
        raise CorruptData(f"{file} is damaged: no JSON object", hint=DAMAGE_HINT)
    return data


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """What does not fit inside the file is told with the file's name."""
    try:
        yield
    except RuntimeFault as error:
        raise CorruptData(f"{file} is damaged: {error.what}", hint=error.hint or DAMAGE_HINT) from error


class ContainerStore:
    """The containers of one host."""

    def __init__(self, host: HostConfig) -> None:
        self._base = host.containers_dir
        self.warnings: list[str] = []
        """What the last ``containers`` could not read."""

    def directory(self, container_id: str) -> Path:
        return self._base / container_id

    @staticmethod
    def new_id() -> str:
        return secrets.token_hex(6)

    # Making and removing

    def create(self, spec: ContainerSpec) -> Container:
        """Reserve id, name and address. Raises NameTaken, NoRoom; nothing is left then."""
        state = ContainerState(status=Status.CREATED)
        self._make(spec, SPEC, spec.to_json(), state)
        return Container(spec=spec, state=state)

    def reserve(self, spec: ContainerSpec, move_id: str) -> None:
        """Take name and id for a container that is on its way here. Raises NameTaken, NoRoom."""
        content = {"move_id": move_id, "spec": spec.to_json()}
        self._make(spec, INCOMING, content, ContainerState(status=Status.CREATED))

    def admit(self, container_id: str, state: ContainerState) -> None:
        """The reserved container lives here now, in this state; from the moment spec.json is there, whoever dies."""
        directory = self.directory(container_id)
        spec = read_json(directory / INCOMING)["spec"]
        self.write_state(container_id, state)
        write_durably(directory / SPEC, json.dumps(spec).encode())
        (directory / INCOMING).rename(directory / ARRIVED)
        sync_directory(directory)

    def came_by(self, container_id: str) -> str:
        """The move that brought it into its directory here; empty where it was made here, or is not here.

        It tells one stay of a container on this host from another, which no time of day does.
        """
        for name in (ARRIVED, INCOMING):
            with contextlib.suppress(FileNotFoundError, CorruptData):
                return str(read_json(self.directory(container_id) / name).get("move_id", ""))
        return ""

    def forget_reservation(self, container_id: str, move_id: str) -> None:
        """Undo ``reserve`` of this move; does nothing when there is none."""
        directory = self.directory(container_id)
        with contextlib.suppress(FileNotFoundError, CorruptData), self._store_lock():
            if (directory / SPEC).exists():
                return  # ``admit`` was cut short after the point from which the container lives here
            # Without either file ``reserve`` was cut short: whoever makes one holds the lock.
            half_made = directory.exists() and not (directory / INCOMING).exists()
            if half_made or read_json(directory / INCOMING).get("move_id") == move_id:
                self.remove(container_id)

    def _make(self, spec: ContainerSpec, marker: str, content: dict[str, Any], state: ContainerState) -> None:
        with self._store_lock():
            self._sweep()
            directory = self.directory(spec.id)
            self._refuse_doubles(spec, directory)
            shutil.rmtree(directory, ignore_errors=True)  # half made or half removed by a command that was killed
            try:
                directory.mkdir(parents=True, mode=0o711)
                self.write_state(spec.id, state)
                write_durably(directory / marker, json.dumps(content).encode())
                sync_directory(self._base)
            except BaseException as error:
                shutil.rmtree(directory, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoRoom(f"no room for a container in {self._base}") from error
                raise

    def _refuse_doubles(self, spec: ContainerSpec, directory: Path) -> None:
        for known in self.known_specs():
            if known.name == spec.name:
                raise NameTaken(
                    f"the name {spec.name!r} is taken by container {known.id}", hint="choose another, or rm it"
                )
            if known.network and spec.network and _host_part(known) == _host_part(spec):
                raise NameTaken(
                    f"the address {_host_part(spec)} is taken by container {known.name}", hint="give another by --ip"
                )
        # Of a container whose files are damaged as well: they are all that is left of it.
        if (directory / SPEC).exists() or (directory / INCOMING).exists():
            raise NameTaken(f"the id {spec.id} is taken: see {directory}", hint="cmigrate ps -a lists what is there")

    def remove(self, container_id: str) -> None:
        """The name is free when this returns; does nothing when there is no such container."""
        # In one step, so that nobody who waits for the lock in it can make files in a half removed directory.
        doomed = self._base / f"{REMOVED_PREFIX}{container_id}.{os.getpid()}.{threading.get_native_id()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.directory(container_id), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        """Finish removals that were cut short."""
        for path in self._base.glob(f"{REMOVED_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def replace_spec(self, container_id: str, spec: ContainerSpec) -> None:
        write_durably(self.directory(container_id) / SPEC, json.dumps(spec.to_json()).encode())

    def write_state(self, container_id: str, state: ContainerState) -> None:
        write_durably(self.directory(container_id) / STATE, json.dumps(state.to_json()).encode())

    # Reading

    def containers(self) -> list[Container]:
        """All that can be read; what can not is named in ``warnings``."""
        self.warnings = []
        found: list[Container] = []
        for directory in self._directories():
            try:
                if (directory / SPEC).exists():  # else half made, half removed or on its way here
                    found.append(self._read(directory))
            except FileNotFoundError:
                if (directory / SPEC).exists():  # else it was removed while we looked
                    self.warnings.append(f"{directory / STATE} is missing")
            except CorruptData as error:
                self.warnings.append(error.what)
        return found

    def get(self, reference: str) -> Container:
        """By name, id or unambiguous prefix of an id (at least two characters). Raises NotFound."""
        containers = self.containers()
        exact = [c for c in containers if reference in (c.name, c.id)]
        matches = exact or [c for c in containers if len(reference) >= 2 and c.id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise NotFound(f"{reference!r} means {len(matches)} containers", hint="give more of the id")
        close = difflib.get_close_matches(reference, [c.name for c in containers], n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "cmigrate ps -a lists them"
        damaged = f"; {self.warnings[0]}" if self.warnings else ""
        raise NotFound(f"no container {reference!r}{damaged}", hint=hint)

    def incoming(self) -> list[tuple[str, ContainerSpec]]:
        """(move id, spec) of the containers on their way here."""
        found = []
        for directory in self._directories():
            with contextlib.suppress(FileNotFoundError, RuntimeFault, KeyError):
                if not (directory / SPEC).exists():
                    data = read_json(directory / INCOMING)
                    found.append((str(data["move_id"]), spec_from_json(data["spec"])))
        return found

    def known_specs(self) -> list[ContainerSpec]:
        """Of all that are here or on their way here, whatever their state file says."""
        found = [spec for _move, spec in self.incoming()]
        for directory in self._directories():
            with contextlib.suppress(FileNotFoundError, CorruptData):
                found.append(self._read_spec(directory))
        return found

    def _directories(self) -> list[Path]:
        try:
            return sorted(path for path in self._base.iterdir() if ID_PATTERN.fullmatch(path.name))
        except FileNotFoundError:
            return []

    @staticmethod
    def _read_spec(directory: Path) -> ContainerSpec:
        data = read_json(directory / SPEC)
        with naming(directory / SPEC):
            spec = spec_from_json(data)
        if spec.id != directory.name:
            raise CorruptData(f"{directory / SPEC} is damaged: it is of container {spec.id}", hint=DAMAGE_HINT)
        return spec

    @classmethod
    def _read(cls, directory: Path) -> Container:
        spec = cls._read_spec(directory)
        data = read_json(directory / STATE)
        with naming(directory / STATE):
            return Container(spec=spec, state=state_from_json(data))

    @staticmethod
    def observe(container: Container) -> ContainerState:
        """The recorded state, corrected by what is true: running only while its first process lives."""
        state = container.state
        if state.status not in (Status.RUNNING, Status.PAUSED):
            return state
        if state.init_pid and process_start_ticks(state.init_pid) == state.init_start_ticks:
            return state
        fields = state.to_json() | {"status": "exited", "init_pid": 0, "init_start_ticks": 0}
        return state_from_json(fields)

    # Locking

    @contextlib.contextmanager
    def locked(self, container_id: str, *, wait_s: float, purpose: str) -> Iterator[None]:
        """Hold the container's lock. Raises Busy naming who holds it."""
        with self._lock(self.directory(container_id) / "lock", wait_s, purpose, f"container {container_id}"):
            yield

    @contextlib.contextmanager
    def _store_lock(self) -> Iterator[None]:
        self._base.mkdir(parents=True, exist_ok=True, mode=0o711)
        with self._lock(self._base / ".lock", STORE_LOCK_WAIT_S, "create", "the container store"):
            yield

    @staticmethod
    @contextlib.contextmanager
    def _lock(path: Path, wait_s: float, purpose: str, what: str) -> Iterator[None]:
        deadline = time.monotonic() + wait_s
        while (descriptor := _try_lock(path, what)) is None:
            if time.monotonic() >= deadline:
                holder = _text(path)
                raise Busy(f"{what} is held by {holder or 'another command'}", hint="wait for it to end")
            time.sleep(LOCK_POLL_S)
        try:
            with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{purpose} (pid {os.getpid()})\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _try_lock(path: Path, what: str) -> int | None:
    """The locked descriptor, or None while somebody else has it. Raises NotFound when its directory is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{what} is gone", hint="cmigrate ps -a lists what is there") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Somebody may have removed the container, and made it anew, between our open and our lock.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _host_part(spec: ContainerSpec) -> str:
    return spec.network.address.partition("/")[0] if spec.network else ""


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()[:200]
    return ""
