"""CRIU's requests for a container of ours. Every odd option carries its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.api import ContainerSpec
from runtime.linux.calls import CLONE_NEWNET
from runtime.sandbox import rootfs

# Deleted files that are still open travel inside the images up to this size each.
GHOST_LIMIT_BYTES = 2**31 - 1
# 2 is CRIU's own default: errors and warnings. Debug output costs milliseconds of blackout.
LOG_LEVEL = 2


@dataclass(frozen=True, kw_only=True)
class ExternalMount:
    """A mount that CRIU takes from outside: its key in the images and the point inside the container."""

    key: str
    point: str


def external_mounts(spec: ContainerSpec, mountinfo: str) -> tuple[ExternalMount, ...]:
    """Those of the container whose /proc/PID/mountinfo text is given; what is masked differs between kernels."""
    found = [ExternalMount(key=key, point=point) for key, point, _source in rootfs.external_mounts(spec.to_json(), "")]
    points = {line.split()[4] for line in mountinfo.splitlines() if line}
    for path in (*rootfs.MASKED_FILES, *rootfs.MASKED_DIRECTORIES):
        if path in points:
            found.append(ExternalMount(key=f"mask{path}", point=path))
    return tuple(found)


def mount_source(spec: ContainerSpec, key: str, run_dir: Path) -> str:
    """The path outside that stands for ``key`` on the restoring host. Raises KeyError for an unknown key."""
    if key.startswith("mask/"):
        return rootfs.mask_source(key.removeprefix("mask") in rootfs.MASKED_DIRECTORIES, str(run_dir))
    return {key: source for key, _point, source in rootfs.external_mounts(spec.to_json(), str(run_dir))}[key]


def _common(options: Any, images_fd: int, log_file: str) -> None:
    options.images_dir_fd = images_fd
    options.log_level = LOG_LEVEL
    options.log_file = log_file
    options.notify_scripts = True
    options.tcp_established = True
    # What still waits to be accepted can not be dumped; HeldDump.cut_off sees to it that this is next to nothing.
    options.tcp_skip_in_flight = True
    options.file_locks = True
    options.link_remap = True
    options.ghost_limit = GHOST_LIMIT_BYTES
    # The container's cgroups are ours: CRIU is started inside them and leaves them alone.
    options.manage_cgroups = True
    options.manage_cgroups_mode = rpc.IGNORE
    # The network namespace is made anew and empty by CRIU, inside the container's user namespace, so that its root
    # owns it; links, addresses and routes are ours to make.
    options.empty_ns = CLONE_NEWNET
    options.network_lock = rpc.NFTABLES
    options.evasive_devices = True


def dump_request(
    *,
    init_pid: int,
    images_fd: int,
    mounts: Sequence[ExternalMount],
    freeze_cgroup: str,
    page_server_fd: int | None = None,
    leave_running: bool = False,
) -> Any:
    """DUMP of a running container. With ``page_server_fd`` (a number inside CRIU) no page reaches an image file."""
    request = rpc.criu_req(type=rpc.DUMP)
    options = request.opts
    _common(options, images_fd, "dump.log")
    options.pid = init_pid
    options.leave_running = leave_running
    options.orphan_pts_master = True
    if freeze_cgroup:
        options.freeze_cgroup = freeze_cgroup
    for mount in mounts:
        options.ext_mnt.add(key=mount.point, val=mount.key)
    if page_server_fd is not None:
        options.ps.fd = page_server_fd
    return request


def restore_request(
    *,
    spec: ContainerSpec,
    run_dir: Path,
    images_fd: int,
    root: str,
    mounts: Sequence[ExternalMount],
    inherited: Sequence[tuple[int, int]],
    memory_files: Mapping[str, int],
    auto_dedup: bool = False,
    lazy: bool = False,
) -> Any:
    """RESTORE into a prepared sandbox. ``inherited`` are (inode of the source's log pipe, descriptor in CRIU),
    ``memory_files`` descriptors there of shared memory by their keys (segments.py)."""
    request = rpc.criu_req(type=rpc.RESTORE)
    options = request.opts
    _common(options, images_fd, "restore.log")
    options.root = root
    # The container becomes a child of CRIU's parent, which is its monitor.
    options.rst_sibling = True
    # Pages leave the image as they reach memory: the container is in memory once, not twice.
    options.auto_dedup = auto_dedup
    # Private memory stays away, and CRIU connects to the pager's socket in its work directory.
    options.lazy_pages = lazy
    for mount in mounts:
        options.ext_mnt.add(key=mount.key, val=mount_source(spec, mount.key, run_dir))
    for inode, descriptor in inherited:
        options.inherit_fd.add(key=f"pipe:[{inode}]", fd=descriptor)
    for key, descriptor in memory_files.items():
        options.inherit_fd.add(key=key, fd=descriptor)
    return request
