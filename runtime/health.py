"""Whether a container is well: a command in it says so by its exit code."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

from runtime.container import Containers
from runtime.execute import start

# What killing it in the container, and its last output, may take on a busy host.
GRACE_S = 20.0
MAX_OUTPUT_BYTES = 3000
EXIT_TIMEOUT = 124
"""As timeout(1) has it."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """``output`` is the end of what the command wrote."""

    exit_code: int
    output: str


def run_check(containers: Containers, reference: str, command: str, timeout_s: float) -> CheckResult:
    """Run a shell command in the container as its own user. One that takes longer than ``timeout_s`` is killed there
    and has exit code 124. Raises NotFound, and WrongState for a container that does not run."""
    begin = time.monotonic()
    process = start(containers, reference, ["sh", "-c", command], timeout_s=timeout_s)
    with process:
        process.stdin = None  # it was closed when the program began
        try:
            written, told = process.communicate(timeout=timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
            written = told = b""
    code, output = process.returncode, (written + told)[-MAX_OUTPUT_BYTES:].decode(errors="replace").strip()
    if code != 0 and time.monotonic() - begin >= timeout_s:
        late = f"it did not end within {timeout_s:g} s"
        return CheckResult(exit_code=EXIT_TIMEOUT, output=f"{late}: {output}" if output else late)
    return CheckResult(exit_code=code, output=output)
