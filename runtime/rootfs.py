"""What the upper layer of a new container holds before it starts: init, name resolution, nothing of the host's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runtime.api import ContainerSpec
from runtime.errors import BadInput, MissingFeature

# Small static inits that reap and pass signals on; the first found is copied into the container, so that the same
# file is there after a move whatever the target host has installed.
INIT_PROGRAMS = ("/usr/bin/tini-static", "/usr/local/bin/tini-static", "/usr/libexec/podman/catatonit")
# With the host's root as lower layer these would show the operator's own files: they start empty instead.
HIDDEN_OF_HOST = {"tmp": 0o1777, "run": 0o755, "root": 0o700, "home": 0o755, "mnt": 0o755, "media": 0o755, "srv": 0o755}
HIDDEN_DEEP = ("var/lib/redis", "var/lib/postgresql", "var/log", "var/tmp", "etc/ssh")
# What this program itself keeps: keys and other containers' files.
HIDDEN_OWN = ("var/lib/cmigrate", "var/lib/cmigrate-lab", "etc/cmigrate")
OPAQUE = "trusted.overlay.opaque"


def prepare_upper(spec: ContainerSpec, directory: Path) -> None:
    """Make ``directory``/upper and /work for a new container. Raises BadInput or MissingFeature."""
    upper = directory / "upper"
    for name in ("upper", "work"):
        (directory / name).mkdir(mode=0o755)
    if spec.rootfs == "host":
        _hide_host_files(upper)
    elif not Path(spec.rootfs).is_dir():
        raise BadInput(f"--rootfs {spec.rootfs} is not a directory", hint="unpack an image there first, or use 'host'")
    if spec.init:
        _copy_init(upper)
    _write_names(spec, upper)


def _hide_host_files(upper: Path) -> None:
    for name, mode in HIDDEN_OF_HOST.items():
        _make_opaque(upper / name, mode)
    for name in HIDDEN_OWN:
        if (Path("/") / name).is_dir():
            _make_opaque(upper / name, 0o700)
    for name in HIDDEN_DEEP:
        source = Path("/") / name
        if source.is_dir():
            status = source.stat()
            _make_opaque(upper / name, status.st_mode & 0o7777)
            # Their services run as users of their own and write here.
            os.chown(upper / name, status.st_uid, status.st_gid)
            _copy_directories(source, upper / name)


def _copy_directories(source: Path, target: Path) -> None:
    """The directories of the first level with owner and mode, empty: services expect theirs to be there."""
    for entry in os.scandir(source):
        if entry.is_dir(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            made = target / entry.name
            made.mkdir()
            os.chown(made, status.st_uid, status.st_gid)
            made.chmod(status.st_mode & 0o7777)


def _make_opaque(path: Path, mode: int) -> None:
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(mode=0o755)
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    os.setxattr(path, OPAQUE, b"y")


def _copy_init(upper: Path) -> None:
    found = next((path for path in INIT_PROGRAMS if os.access(path, os.X_OK)), None)
    if found is None:
        raise MissingFeature("there is no init program for the container", hint="install tini, or give --no-init")
    (upper / ".cmigrate").mkdir(mode=0o755)
    shutil.copyfile(found, upper / ".cmigrate/init")
    (upper / ".cmigrate/init").chmod(0o755)


def _write_names(spec: ContainerSpec, upper: Path) -> None:
    """/etc/hostname, /etc/hosts and /etc/resolv.conf are files of the container's own and travel with it."""
    etc = upper / "etc"
    etc.mkdir(mode=0o755, exist_ok=True)
    hostname = spec.hostname or spec.id
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    if spec.network is not None:
        lines.append(f"{spec.network.address.split('/')[0]}\t{hostname} {spec.name}")
    (etc / "hosts").write_text("\n".join(lines) + "\n")
    (etc / "hostname").write_text(hostname + "\n")
    try:
        resolv = Path("/etc/resolv.conf").read_text()
    except OSError:
        resolv = ""
    (etc / "resolv.conf").write_text(resolv)
