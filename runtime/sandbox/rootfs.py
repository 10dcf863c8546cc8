"""Mounts of a container: the outer ones (overlay, /dev, tmpfs), made by the monitor in its private mount namespace,
and the inner ones, made by the container's first process inside its own namespaces.

A restored container gets only the outer ones from here; CRIU makes the inner ones again from its images. What comes
from the outside is *external* to CRIU under the keys of ``external_mounts``. Stdlib only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.linux import calls

# Device numbers of linux/Documentation/admin-guide/devices.txt: name -> (major, minor).
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_DEV_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
    "core": "/proc/kcore",
}
# What docker masks and makes read-only: files that tell or change something of the host.
MASKED_FILES = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats")
MASKED_DIRECTORIES = ("/proc/acpi", "/proc/asound", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap")
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def _is_host_root(spec: Mapping[str, Any]) -> bool:
    return bool(spec["rootfs"] == "host")


def mount_root(spec: Mapping[str, Any], directory: str, run_dir: str) -> None:
    """The overlay at RUN/root, in the calling (private) mount namespace; the upper layer must not change from outside
    any more."""
    lower = "/" if _is_host_root(spec) else str(spec["rootfs"])
    os.makedirs(f"{run_dir}/root", exist_ok=True)
    options = f"lowerdir={_escape(lower)},upperdir={_escape(directory)}/upper,workdir={_escape(directory)}/work"
    # Off by name, whatever the kernel's defaults: the upper layer must mean the same on the next host.
    options += ",redirect_dir=off,metacopy=off,index=off,xino=off"
    calls.mount("overlay", f"{run_dir}/root", "overlay", 0, options)


def make_outer_mounts(spec: Mapping[str, Any], run_dir: str) -> None:
    """In the calling (private) mount namespace: device nodes at RUN/dev, an empty directory, tmpfs at RUN/tmpfs-N.

    RUN/tmpfs-0 is /dev/shm, the others are ``spec['tmpfs']`` in order. For a fresh namespace.
    """
    for name in ("dev", "empty"):
        os.makedirs(f"{run_dir}/{name}", exist_ok=True)
    _make_devices(f"{run_dir}/dev")
    calls.mount("tmpfs", f"{run_dir}/empty", "tmpfs", calls.MS_RDONLY, "size=4k,mode=755")
    for number in range(1 + len(spec["tmpfs"])):
        os.makedirs(f"{run_dir}/tmpfs-{number}", exist_ok=True)
        flags = calls.MS_NOSUID | calls.MS_NODEV | (calls.MS_NOEXEC if number == 0 else 0)
        calls.mount("tmpfs", f"{run_dir}/tmpfs-{number}", "tmpfs", flags, "mode=1777")


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _make_devices(dev: str) -> None:
    calls.mount("tmpfs", dev, "tmpfs", calls.MS_NOSUID | calls.MS_NOEXEC, "size=64k,mode=755")
    old_umask = os.umask(0)
    try:
        for name, (major, minor) in _DEVICES.items():
            os.mknod(f"{dev}/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
        for name, target in _DEV_LINKS.items():
            os.symlink(target, f"{dev}/{name}")
        os.mkdir(f"{dev}/pts", 0o755)
        os.mkdir(f"{dev}/shm", 0o1777)
    finally:
        os.umask(old_umask)


def external_mounts(spec: Mapping[str, Any], run_dir: str) -> list[tuple[str, str, str]]:
    """(key, mount point in the container, path outside) of every mount that CRIU must not make from its images."""
    result = [("dev", "/dev", f"{run_dir}/dev"), ("tmpfs-0", "/dev/shm", f"{run_dir}/tmpfs-0")]
    result += [(f"tmpfs-{n}", path, f"{run_dir}/tmpfs-{n}") for n, path in enumerate(spec["tmpfs"], 1)]
    result += [(f"volume-{n}", volume["destination"], volume["source"]) for n, volume in enumerate(spec["volumes"])]
    return result


def mask_source(path_is_directory: bool, run_dir: str) -> str:
    """What lies over a masked path, seen from outside."""
    return f"{run_dir}/empty" if path_is_directory else f"{run_dir}/dev/null"


def enter_root(spec: Mapping[str, Any], run_dir: str) -> None:
    """Make the inner mounts below RUN/root and pivot into it; the caller is alone in its new mount namespace."""
    root = f"{run_dir}/root"
    calls.mount("none", "/", "", calls.MS_REC | calls.MS_PRIVATE)
    calls.mount(root, root, "", calls.MS_BIND)
    inner = _external_first(spec, run_dir)
    for _key, point, source in inner:
        _make_point(root, point, os.path.isdir(source))
        calls.mount(source, root + point, "", calls.MS_BIND)
    calls.mount(
        "devpts", f"{root}/dev/pts", "devpts", calls.MS_NOSUID | calls.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"
    )
    flags = calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
    for point in ("/proc", "/sys"):
        _make_point(root, point, True)
    calls.mount("proc", f"{root}/proc", "proc", flags)
    calls.mount("sysfs", f"{root}/sys", "sysfs", flags | calls.MS_RDONLY)
    _hide_host(root, run_dir)
    for volume in spec["volumes"]:
        if volume["read_only"]:
            _remount_read_only(root + volume["destination"])
    if spec["read_only"]:
        _remount_read_only(root)
    os.chdir(root)
    calls.pivot_root(".", ".")
    # The old root now lies on top of the new one; without it the new one is all there is.
    calls.unmount(".", calls.MNT_DETACH)
    os.chdir("/")


def _external_first(spec: Mapping[str, Any], run_dir: str) -> list[tuple[str, str, str]]:
    return sorted(external_mounts(spec, run_dir), key=lambda item: item[1].count("/"))


def _make_point(root: str, point: str, is_directory: bool) -> None:
    path = root + point
    if os.path.exists(path):
        return
    os.makedirs(path if is_directory else os.path.dirname(path), exist_ok=True)
    if not is_directory:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _hide_host(root: str, run_dir: str) -> None:
    for path in existing(root, READ_ONLY_PATHS):
        calls.mount(root + path, root + path, "", calls.MS_BIND | calls.MS_REC)
        _remount_read_only(root + path)
    for path in existing(root, MASKED_FILES):
        calls.mount(mask_source(False, run_dir), root + path, "", calls.MS_BIND)
    for path in existing(root, MASKED_DIRECTORIES):
        calls.mount(mask_source(True, run_dir), root + path, "", calls.MS_BIND)


def existing(root: str, paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` that are there below ``root``."""
    return [path for path in paths if os.path.lexists(root + path)]


def _remount_read_only(path: str) -> None:
    # Flags of a mount that came from a more privileged namespace are locked: keep those that are set.
    now = os.statvfs(path).f_flag
    keep = 0
    for flag, bit in ((os.ST_NOSUID, calls.MS_NOSUID), (os.ST_NODEV, calls.MS_NODEV), (os.ST_NOEXEC, calls.MS_NOEXEC)):
        keep |= bit if now & flag else 0
    if now & os.ST_RELATIME:
        keep |= 1 << 21
    calls.mount("none", path, "", calls.MS_BIND | calls.MS_REMOUNT | calls.MS_RDONLY | keep)
