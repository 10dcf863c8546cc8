"""Which CRIU to start, and how.

`scripts/setup` leaves a newer Debian suite's CRIU in a private prefix where the host's own does not work on its kernel.
That CRIU needs the prefix's libc, so it is started through the prefix's dynamic loader; no shell lies between, so that
an LD_PRELOAD in its environment reaches CRIU and nothing before it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import MissingFeature

VERSION_TIMEOUT_S = 20.0

Origin = Literal["env", "prefix", "host"]


@dataclass(frozen=True, kw_only=True)
class CriuBinary:
    """A CRIU that can be started: `[*argv, "swrk", "3"]` and the like."""

    argv: tuple[str, ...]
    version: tuple[int, int, int]
    origin: Origin

    def __post_init__(self) -> None:
        if not self.argv:
            raise ValueError("argv must name at least the program")

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)


def parse_version(text: str) -> tuple[int, int, int]:
    """Read a version out of `criu --version` output, or a bare `4.2`; a missing third part is 0.

    Raises ValueError where there is none.
    """
    match = re.search(r"(?:^|Version:\s*)v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip(), re.MULTILINE)
    if not match:
        raise ValueError(f"no version in {text!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def default_prefixes() -> tuple[Path, ...]:
    """Where `scripts/setup` puts its prefix: beside the packages, and beside the virtual environment."""
    return Path(__file__).resolve().parents[2] / ".criu", Path(sys.prefix).resolve().parent / ".criu"


def find_criu(environment: Mapping[str, str] | None = None, prefixes: tuple[Path, ...] | None = None) -> CriuBinary:
    """Find CRIU: the one CMIGRATE_CRIU names, then the checkout's prefix, then PATH's.

    `environment` and `prefixes` default to this process's. Raises MissingFeature when there is none, or when the
    chosen one does not start.
    """
    env = os.environ if environment is None else environment
    named = env.get("CMIGRATE_CRIU", "")
    if named:
        return _named_by_environment(Path(named))
    for prefix in default_prefixes() if prefixes is None else prefixes:
        if (prefix / "criu.json").is_file():
            return _in_prefix(prefix, "prefix")
    # Root's cron and ssh sessions often have a PATH without sbin, where Debian installs CRIU.
    search = os.pathsep.join([env.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    found = shutil.which("criu", path=search)
    if found:
        return _on_path(found, "host")
    raise MissingFeature(
        "CRIU is not installed", hint="run scripts/setup, or set CMIGRATE_CRIU to the path of a criu binary"
    )


def _named_by_environment(path: Path) -> CriuBinary:
    # A prefix may be named by its directory or by its wrapper script; the script itself is never started.
    for prefix in (path, path.parent.parent):
        if (prefix / "criu.json").is_file():
            return _in_prefix(prefix, "env")
    if not path.is_file() or not os.access(path, os.X_OK):
        raise MissingFeature(
            f"CMIGRATE_CRIU names {path}, which is not a program",
            hint="set CMIGRATE_CRIU to the path of a criu binary, or unset it",
        )
    return _on_path(str(path), "env")


def _in_prefix(prefix: Path, origin: Origin) -> CriuBinary:
    manifest = prefix / "criu.json"
    try:
        found = json.loads(manifest.read_text())
        loader = prefix / found["loader"]
        program = prefix / found["criu"]
        libraries = ":".join(str(prefix / path) for path in found["library_path"])
        version = parse_version(found["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingFeature(
            f"{manifest} is not readable: {error}", hint=f"remove {prefix} and run scripts/setup again"
        ) from error
    for path in (loader, program):
        if not path.is_file():
            raise MissingFeature(f"{path} is missing", hint=f"remove {prefix} and run scripts/setup again")
    return CriuBinary(argv=(str(loader), "--library-path", libraries, str(program)), version=version, origin=origin)


def _on_path(path: str, origin: Origin) -> CriuBinary:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingFeature(f"{path} does not start: {error}", hint="run scripts/setup") from error
    try:
        version = parse_version(done.stdout)
    except ValueError as error:
        raise MissingFeature(
            f"{path} --version answered status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}",
            hint="run scripts/setup, which finds a CRIU that works here",
        ) from error
    return CriuBinary(argv=(path,), version=version, origin=origin)
