"""From the monitor's fork to the container's first instruction: namespaces, mounts, user, exec. Stdlib only.

Two steps of fork: the *outer* child unshares everything and forks the *inner* one, which is PID 1 of the new pid
namespace; then the outer one leaves and the monitor, a subreaper, inherits PID 1.
"""

from __future__ import annotations

import base64
import os
import signal
import socket
from collections.abc import Mapping
from typing import Any

from runtime.linux import calls
from runtime.sandbox import confine, rootfs

NAMESPACES = (
    calls.CLONE_NEWNS
    | calls.CLONE_NEWUTS
    | calls.CLONE_NEWIPC
    | calls.CLONE_NEWNET
    | calls.CLONE_NEWPID
    | calls.CLONE_NEWCGROUP
)
INIT_PATH = "/.cmigrate/init"


def outer_child(config: Mapping[str, Any], up: socket.socket, stdio: tuple[int, int]) -> None:
    """Never returns to the caller's code path: the caller ends the process in a ``finally``.

    Dialogue on ``up`` (one datagram each): "map" -> (monitor writes the id maps) "mapped" -> "pid N" from here and,
    maybe before it, "ready" from the inner child, which waits for "go"; the descriptor closes on exec or carries
    "exit N text".
    """
    join_cgroups(config["cgroup_paths"])
    flags = NAMESPACES
    if config["spec"]["userns"] == "private":
        flags |= calls.CLONE_NEWUSER
    calls.unshare(flags)
    up.send(b"map")
    if up.recv(16) != b"mapped":
        return
    pid = os.fork()
    if pid:
        up.send(f"pid {pid}".encode())
        return
    _inner_child(config, up, stdio)


def join_cgroups(paths: list[str]) -> None:
    """Move the calling process into each cgroup directory."""
    for path in paths:
        with open(f"{path}/cgroup.procs", "w") as file:
            file.write("0")


def _inner_child(config: Mapping[str, Any], up: socket.socket, stdio: tuple[int, int]) -> None:
    spec = config["spec"]
    os.setsid()
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    socket.sethostname(spec["hostname"] or spec["id"])
    rootfs.enter_root(spec, config["run_dir"])
    up.send(b"ready")
    if up.recv(16) != b"go":
        return
    _bring_up_stdio(stdio)
    run_program(spec, config, up)


def _bring_up_stdio(stdio: tuple[int, int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for source, number in ((null, 0), (stdio[0], 1), (stdio[1], 2)):
        os.dup2(source, number)
    os.close(null)


def run_program(spec: Mapping[str, Any], config: Mapping[str, Any], up: socket.socket) -> None:
    """Become the container's user and exec. On failure sends "exit CODE TEXT" on ``up`` and returns."""
    try:
        identity = confine.look_up_user(spec["user"], confine.read_text("/etc/passwd"), confine.read_text("/etc/group"))
        environment = dict(variable.split("=", 1) for variable in spec["env"])
        environment.setdefault("HOME", identity.home)
        os.makedirs(spec["cwd"], exist_ok=True)
        os.chdir(spec["cwd"])
        program = confine.find_program(spec["argv"][0], environment.get("PATH", os.defpath), spec["cwd"])
        argv = [program, *spec["argv"][1:]]
        if config["with_init"]:
            # -g: signals go to the program's whole group, as a terminal's would.
            argv = [INIT_PATH, "-g", "--", *argv]
        confine.become(identity, config["capabilities"], base64.b64decode(config["seccomp"]))
        _keep_only_stdio(up.fileno())
        _reset_signals()
        os.execve(argv[0], argv, environment)
    except FileNotFoundError as error:
        up.send(f"exit {confine.EXIT_NOT_FOUND} {spec['argv'][0]}: {error.strerror}".encode())
    except PermissionError as error:
        up.send(f"exit {confine.EXIT_NOT_EXECUTABLE} {spec['argv'][0]}: {error.strerror}".encode())
    except Exception as error:  # the parent reports it; this process ends
        up.send(f"exit 125 {error}".encode())


def _keep_only_stdio(keep: int) -> None:
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number != keep:
            try:
                os.set_inheritable(number, False)
            except OSError:
                continue  # the listing's own descriptor


def _reset_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
