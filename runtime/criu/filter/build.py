"""Compiles the page filter once for each version of its source and compiler, and says whether it works here.

It is optional: without a compiler, on another processor or with a CRIU that takes no preloaded object, the page server
throws the same pages away a little later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from runtime.criu.binary import CriuBinary
from runtime.criu.filter.table import PageFilter
from runtime.errors import MissingFeature
from runtime.linux.probes import has_pagemap_scan

SOURCE = Path(__file__).with_name("page_filter.c")
COMPILERS = ("cc", "gcc", "clang")
MACHINES = ("x86_64", "aarch64")
COMPILE_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 20.0
# No libc, neither its headers nor its start code: the object must load beside whatever libc CRIU has.
FLAGS = (
    *("-std=c11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-nostdlib", "-ffreestanding"),
    *("-fvisibility=hidden", "-fno-stack-protector", "-Wl,-z,noexecstack"),
)
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def build_filter(cache: Path) -> Path:
    """The compiled object in ``cache``, a directory of root's own that is made when it is not there.

    Compiling takes 0.1 s, the first time. Raises MissingFeature saying why there is none.
    """
    if platform.machine() not in MACHINES:
        raise MissingFeature(f"the page filter is not written for {platform.machine()}")
    content = SOURCE.read_bytes()
    key = hashlib.sha256(content + "\0".join(FLAGS).encode() + platform.machine().encode()).hexdigest()[:16]
    library = cache / f"page_filter-{key}.so"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _compile(library)
    about = library.stat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise MissingFeature(f"{library} could have been changed by others", hint="remove it")
    return library


def _compile(library: Path) -> None:
    compiler = next(filter(None, (shutil.which(name, path=_ENVIRONMENT["PATH"]) for name in COMPILERS)), None)
    if compiler is None:
        raise MissingFeature("there is no C compiler for the page filter", hint="apt install gcc")
    # Somebody else may be at it too: each writes a file of its own, and the last rename wins.
    handle, temporary = tempfile.mkstemp(prefix=".page_filter-", suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, "-o", temporary, str(SOURCE)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            env=_ENVIRONMENT,
            check=False,
        )
        if done.returncode:
            raise MissingFeature(f"{compiler} could not compile the page filter: {done.stderr.strip()[:500]}")
        os.chmod(temporary, 0o600)
        os.rename(temporary, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingFeature(f"the page filter could not be compiled with {compiler}: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def filter_available(criu: CriuBinary, cache: Path) -> str:
    """Why the page filter can not be used with this CRIU on this kernel; empty when it can. Takes 20 ms."""
    if not has_pagemap_scan():
        return "this kernel has no PAGEMAP_SCAN"
    try:
        with PageFilter(build_filter(cache)) as page_filter:
            subprocess.run(
                [*criu.argv, "--version"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=PROBE_TIMEOUT_S,
                env={**_ENVIRONMENT, **page_filter.environment},
                pass_fds=page_filter.pass_fds,
                check=False,
            )
            return "" if page_filter.loaded else "CRIU takes no preloaded object (is it linked statically?)"
    except MissingFeature as error:
        return error.what
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"CRIU did not start with the page filter: {error}"
