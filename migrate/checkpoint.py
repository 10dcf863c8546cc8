"""``cmigrate checkpoint`` and ``restore``: one container, whole, in one file.

The file holds the spec, CRIU's images, the container's own part of the root, its tmpfs mounts and its log, all taken
while it is frozen, with a checksum of each.
"""

from __future__ import annotations

import dataclasses
import platform
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from runtime.api import Container, ContainerSpec, Status, spec_from_json
from runtime.archive import ArchiveReader, ArchiveWriter
from runtime.container import Containers, open_tree_roots, utc_now
from runtime.criu.binary import find_criu
from runtime.criu.dump import HeldDump
from runtime.criu.images import image_files
from runtime.criu.options import ExternalMount
from runtime.criu.restore import HeldRestore
from runtime.errors import BadInput, CorruptData, NotFound, WrongState
from runtime.host import HostConfig

CHECKPOINT_SCHEMA = 1
METADATA = "checkpoint.json"
UPPER, LOG = "upper", "log.jsonl"


def checkpoint(host: HostConfig, reference: str, output: Path, *, leave_running: bool = False) -> Container:
    """Write a running container to ``output`` (mode 0600; replaced only by a whole file).

    Without ``leave_running`` the container has ended afterwards: it stays listed as exited, and ``restore`` brings it
    back. On any failure it runs on. Raises WrongState, NoRoom, CriuFailed, NotFound.
    """
    containers = Containers(host)
    if output.is_dir():
        raise BadInput(f"{output} is a directory", hint="give a file name")
    with containers.locked(reference, f"checkpoint to {output}", wait_s=5.0) as container, ExitStack() as undo:
        if container.state.status != Status.RUNNING:
            raise WrongState(f"container {container.name} is {container.state.status}", hint="it must run for this")
        images = undo.enter_context(_work_directory(host))
        dump = HeldDump(containers, container, find_criu(), images)
        undo.callback(dump.rollback)
        dump.prepare(leave_running=leave_running)
        dump.freeze()
        dump.cut_off()
        dump.dump()
        dump.hold()
        _write(containers, container, dump, output, open_tree_roots(containers, container, undo))
        if leave_running:
            dump.resume()
            return container
        dump.finish()
        containers.clean_up(container.id)
        state = dataclasses.replace(
            container.state, status=Status.EXITED, init_pid=0, init_start_ticks=0, finished_at=utc_now(), exit_code=None
        )
        containers.store.write_state(container.id, state)
        return Container(spec=container.spec, state=state)


@contextmanager
def _work_directory(host: HostConfig) -> Iterator[Path]:
    path = host.state_dir / "checkpoints" / secrets.token_hex(6)
    path.mkdir(parents=True, mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write(containers: Containers, container: Container, dump: HeldDump, output: Path, roots: Sequence[int]) -> None:
    log = containers.store.directory(container.id) / LOG
    metadata = {
        "schema": CHECKPOINT_SCHEMA,
        "created_at": utc_now(),
        "spec": container.spec.to_json(),
        "state": container.state.to_json(),
        "mounts": [[mount.key, mount.point] for mount in dump.mounts],
        "pipes": list(dump.pipes),
        "criu": find_criu().version_text,
        "kernel": platform.release(),
        "machine": platform.machine(),
    }
    with ArchiveWriter(output) as archive:
        archive.add_json(METADATA, metadata)
        archive.add_tree(UPPER, roots[0])
        for number, root in enumerate(roots[1:]):
            archive.add_tree(f"tmpfs-{number}", root)
        if log.exists():
            archive.add_file(LOG, log)
        for path in image_files(dump.images):
            archive.add_file(f"images/{path.name}", path)


def restore(host: HostConfig, file: Path, *, name: str | None = None) -> Container:
    """Bring a container back from ``file``, under another ``name`` if given.

    An exited container of the same id here is replaced: it is the one that the file was made of. Raises NotFound,
    CorruptData, NameTaken, CriuFailed; nothing of it is left then, and an exited container stays as it was.
    """
    containers = Containers(host)
    if not file.is_file():
        raise NotFound(f"there is no file {file}", hint="cmigrate checkpoint NAME -o FILE writes one")
    with ArchiveReader(file) as archive, ExitStack() as undo:
        archive.verify()
        facts = _Facts(archive.read_json(METADATA))
        spec = dataclasses.replace(facts.spec, name=name) if name else facts.spec
        aside = _set_aside(containers, spec, undo)
        move_id = secrets.token_hex(6)
        containers.store.reserve(spec, move_id)
        undo.callback(containers.store.forget_reservation, spec.id, move_id)
        images = undo.enter_context(_work_directory(host))
        directory = containers.store.directory(spec.id)
        for part in ("upper", "work"):
            (directory / part).mkdir(exist_ok=True)
        held = HeldRestore(containers, spec, find_criu(), images, directory)
        undo.callback(held.discard)
        held.prepare()
        _extract(archive, directory, images, held)
        held.restore(facts.mounts, facts.pipes)
        state = held.release(started_at=facts.started_at)
        containers.store.admit(spec.id, state)
        held.settle()
        undo.pop_all()
        shutil.rmtree(images, ignore_errors=True)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        return Container(spec=spec, state=state)


class _Facts:
    """The metadata of a checkpoint, checked."""

    def __init__(self, data: dict[str, Any]) -> None:
        try:
            if data["schema"] != CHECKPOINT_SCHEMA:
                raise CorruptData(
                    f"the checkpoint has schema {data['schema']!r}, this version knows {CHECKPOINT_SCHEMA}"
                )
            if data["machine"] != platform.machine():
                raise BadInput(f"the checkpoint is of {data['machine']}, this host is {platform.machine()}")
            self.spec: ContainerSpec = spec_from_json(data["spec"])
            self.mounts = tuple(ExternalMount(key=str(key), point=str(point)) for key, point in data["mounts"])
            self.pipes = (int(data["pipes"][0]), int(data["pipes"][1]))
            self.started_at = str(data["state"]["started_at"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptData(f"the checkpoint's metadata do not fit: {error!r}") from error


def _set_aside(containers: Containers, spec: ContainerSpec, undo: ExitStack) -> Path | None:
    """Move the exited container of the same id out of the way, to be put back if the restore fails."""
    try:
        known = containers.get(spec.id)
    except NotFound:
        return None
    if known.state.status in (Status.RUNNING, Status.PAUSED):
        raise WrongState(f"container {known.name} ({known.id}) runs here", hint="stop it first: both are the same one")
    directory = containers.store.directory(spec.id)
    aside = directory.with_name(f".{spec.id}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)
    undo.callback(aside.rename, directory)
    return aside


def _extract(archive: ArchiveReader, directory: Path, images: Path, held: HeldRestore) -> None:
    archive.extract_tree(UPPER, directory / "upper")
    for number, root in enumerate(held.tmpfs_roots()):
        archive.extract_tree(f"tmpfs-{number}", root)
    names = archive.names()
    if LOG in names:
        archive.extract_file(LOG, directory / LOG)
    for member in names:
        if member.startswith("images/"):
            archive.extract_file(member, images / Path(member).name)
