"""What the CRIU of this host can do on this kernel: asked of CRIU itself, once a boot.

The answers are kept in ``run_dir`` under a key that a new kernel, a reboot or another CRIU changes. A failed check is
never kept: what was wrong may have been put right.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycriu import rpc_pb2 as rpc

from runtime.criu.binary import CriuBinary
from runtime.criu.log import decisive_lines
from runtime.criu.rpc import CriuSession
from runtime.errors import CriuFailed

ANSWER_TIMEOUT_S = 30.0
CACHE_FILE = "criu-features.json"
CACHE_SCHEMA = 1
# What `criu check --feature` is asked beyond FEATURE_CHECK. compat_cr: 32-bit tasks.
PROBED = ("compat_cr", "timens", "uffd", "network_lock_nftables")
# CPU_CAP_FPU | CPU_CAP_INS of CRIU's cpu capabilities: register state fits, and no instruction is missing. The
# stricter "cpu" would refuse a target that can do more than the source (docs/preflight.md: tried on both).
CPU_CAP_FPU_INS = 0x1 | 0x4
MAX_CPUINFO_BYTES = 64 << 10
CPUINFO_IMAGE = "cpuinfo.img"


@dataclass(frozen=True, kw_only=True)
class CriuFeatures:
    """``check_error`` is empty when CRIU's own check passes. ``missing`` are names of PROBED that are not here.

    ``cpuinfo`` is CRIU's image of this host's CPU; empty where CRIU can not describe it.
    """

    version: tuple[int, int, int]
    check_error: str
    mem_track: bool
    lazy_pages: bool
    pidfd_store: bool
    missing: tuple[str, ...]
    cpuinfo: bytes

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"version": list(self.version), "missing": list(self.missing), "cpuinfo": self.cpuinfo.hex()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CriuFeatures:
        """The inverse of ``to_json``. Raises KeyError, TypeError or ValueError for anything else."""
        major, minor, sub = (int(part) for part in data["version"])
        return cls(
            version=(major, minor, sub),
            check_error=str(data["check_error"]),
            mem_track=data["mem_track"] is True,
            lazy_pages=data["lazy_pages"] is True,
            pidfd_store=data["pidfd_store"] is True,
            missing=tuple(str(name) for name in data["missing"]),
            cpuinfo=bytes.fromhex(data["cpuinfo"]),
        )


def criu_features(criu: CriuBinary, run_dir: Path) -> CriuFeatures:
    """The features, from the cache in ``run_dir`` where that is still true. Raises CriuFailed when CRIU is mute."""
    file = run_dir / CACHE_FILE
    key = _cache_key(criu)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_bytes())
        if kept["key"] == key:
            return CriuFeatures.from_json(kept["features"])
    found = probe(criu, run_dir)
    if not found.check_error:
        _keep(file, {"key": key, "features": found.to_json()})
    return found


def _cache_key(criu: CriuBinary) -> dict[str, Any]:
    program = os.stat(criu.argv[-1])
    return {
        "schema": CACHE_SCHEMA,
        "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "kernel": os.uname().release,
        "argv": list(criu.argv),
        "program": [program.st_ino, program.st_size, program.st_mtime_ns],
        "probed": list(PROBED),
    }


def _keep(file: Path, content: dict[str, Any]) -> None:
    """A cache that can not be written costs time, nothing else."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o711)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, file)


def probe(criu: CriuBinary, scratch: Path) -> CriuFeatures:
    """Ask CRIU, without the cache. About 0.3 s the first time after a boot. Raises CriuFailed."""
    with _Desk(criu, scratch) as desk:
        kinds = rpc.criu_req(type=rpc.FEATURE_CHECK)
        for name in ("mem_track", "lazy_pages", "pidfd_store"):
            setattr(kinds.features, name, True)
        features = desk.ask(kinds)
        checked = desk.ask(rpc.criu_req(type=rpc.CHECK))
        error = "" if checked.success else desk.reason(checked)
        described = desk.ask(_cpuinfo_request(rpc.CPUINFO_DUMP))
        image = desk.directory / CPUINFO_IMAGE
        return CriuFeatures(
            version=criu.version,
            check_error=error,
            mem_track=features.features.mem_track,
            lazy_pages=features.features.lazy_pages,
            pidfd_store=features.features.pidfd_store,
            missing=tuple(name for name in PROBED if not _has_feature(criu, name)),
            cpuinfo=image.read_bytes() if described.success and image.exists() else b"",
        )


def cpu_mismatch(criu: CriuBinary, cpuinfo: bytes, scratch: Path) -> str:
    """Why tasks dumped on the CPU that ``cpuinfo`` describes can not run on this one; empty when they can.

    This is CRIU's own judgement (CPUINFO_CHECK). Raises CriuFailed when CRIU is mute.
    """
    if len(cpuinfo) > MAX_CPUINFO_BYTES:
        return "the description of the source's CPU is too long"
    with _Desk(criu, scratch) as desk:
        (desk.directory / CPUINFO_IMAGE).write_bytes(cpuinfo)
        answer = desk.ask(_cpuinfo_request(rpc.CPUINFO_CHECK))
        return "" if answer.success else desk.reason(answer)


def _cpuinfo_request(kind: int) -> Any:
    request = rpc.criu_req(type=kind)
    request.opts.cpu_cap = CPU_CAP_FPU_INS
    return request


def _has_feature(criu: CriuBinary, name: str) -> bool:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [*criu.argv, "check", "--feature", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            cwd="/",
        )
        return done.returncode == 0
    return False


class _Desk:
    """One question after another, each to a ``criu swrk`` of its own: most kinds of request end theirs.

    ``directory`` holds CRIU's images and log while the desk is open.
    """

    def __init__(self, criu: CriuBinary, scratch: Path) -> None:
        self._criu = criu
        self._scratch = scratch
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> _Desk:
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o711)
        with contextlib.ExitStack() as stack:
            made = tempfile.TemporaryDirectory(prefix=".criu-", dir=self._scratch)
            self.directory = Path(stack.enter_context(made))
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, self._fd)
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *_exc: object) -> None:
        self._close()

    def ask(self, request: Any) -> Any:
        request.opts.images_dir_fd = self._fd
        request.opts.log_level = 1
        request.opts.log_file = "criu.log"
        with CriuSession.spawn(self._criu, pass_fds=(self._fd,)) as session:
            session.send(request)
            return session.next_event(ANSWER_TIMEOUT_S)

    def reason(self, answer: Any) -> str:
        """The first line that says why, without its place in CRIU's source."""
        lines: tuple[str, ...] = ()
        with contextlib.suppress(OSError):
            lines = decisive_lines((self.directory / "criu.log").read_text(errors="replace"))
        text = lines[0] if lines else str(answer.cr_errmsg).strip() or f"error {answer.cr_errno}"
        return text.partition("): ")[2] or text


__all__ = ["PROBED", "CriuFailed", "CriuFeatures", "cpu_mismatch", "criu_features", "probe"]
