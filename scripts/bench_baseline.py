"""What plain tools do, for comparison: ``criu dump``, a tar pipe over TCP, ``criu restore``, images on tmpfs.

    python -m scripts.bench_baseline target    on the target's host: mounts, listens, unpacks, restores
    python -m scripts.bench_baseline source    on the source's host: dumps and sends

Both talk in lines of JSON on stdin and stdout; scripts/bench.py carries them to and fro. Whatever could be done before
is done before and not counted, the root difference is taken as already there, and the restored process gets no network:
every doubt is in favour of the plain tools. The container is one that ``cmigrate run`` started, dumped with the options
that it needs.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pycriu.images import load

from runtime.api import ContainerSpec, spec_from_json
from runtime.container import Containers
from runtime.criu.binary import find_criu
from runtime.criu.options import GHOST_LIMIT_BYTES, external_mounts, mount_source
from runtime.host import load_host_config
from runtime.linux import calls
from runtime.sandbox import rootfs
from runtime.sandbox.launch import ask_monitor

TIMEOUT_S = 300.0
LOG_FD = 20
COMMON = (
    "-v2", "--tcp-established", "--file-locks", "--link-remap", "--ghost-limit", str(GHOST_LIMIT_BYTES),
    "--manage-cgroups=ignore", "--empty-ns", "net", "--network-lock", "nftables", "--evasive-devices",
)  # fmt: skip


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def criu(action: str, directory: Path, *options: str, fds: tuple[int, ...] = ()) -> None:
    """Run one CRIU command to its end; raises RuntimeError with the end of its log."""
    argv = [*find_criu().argv, action, "-D", str(directory), "-o", f"{action}.log", *COMMON, *options]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, pass_fds=fds, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        log = directory / f"{action}.log"
        raise RuntimeError(f"criu {action}: {done.returncode}: {log.read_text()[-1500:] if log.exists() else ''}")


def statistics(directory: Path) -> dict[str, int]:
    with (directory / "stats-dump").open("rb") as file:
        found: dict[str, int] = load(file)["entries"][0]["dump"]
    return found


def hear() -> dict[str, Any]:
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    return order


def source() -> None:
    """Hears {"name"}, tells what the target needs; hears {"address", "port"}, dumps and sends; tells how it went."""
    containers = Containers(load_host_config())
    container = containers.get(hear()["name"])
    init_pid = container.state.init_pid
    mounts = external_mounts(container.spec, Path(f"/proc/{init_pid}/mountinfo").read_text())
    names = [option for mount in mounts for option in ("--external", f"mnt[{mount.point}]:{mount.key}")]
    upper = containers.store.directory(container.id) / "upper"
    say(
        spec=container.spec.to_json(),
        # As this process sees it: each lab host has a state directory of its own.
        upper=f"/proc/{container.state.monitor_pid}/root{upper}",
        keys=[mount.key for mount in mounts],
        pipes=ask_monitor(containers.host, container.id, "status")["pipes"],
    )
    order = hear()
    directory = containers.host.run_dir / "bench-images"
    directory.mkdir()
    try:
        with socket.create_connection((order["address"], order["port"]), TIMEOUT_S) as connection:
            connection.settimeout(None)
            begin = time.monotonic()
            criu("dump", directory, "-t", str(init_pid), *names)
            dumped = time.monotonic()
            subprocess.run(["tar", "-C", str(directory), "-cf", "-", "."], stdout=connection.fileno(), check=True)
        frozen_s = statistics(directory)["frozen_time"] / 1e6
        say(begin=begin, dumped=dumped, frozen_s=frozen_s)
    finally:
        shutil.rmtree(directory)


def target() -> None:
    """Hears what ``source`` told, prepares, tells {"address", "port"}; receives, restores, tells when and which pid."""
    host = load_host_config()
    order = hear()
    spec = spec_from_json(order["spec"])
    work = host.run_dir / "bench"
    for name in ("images", "container/upper", "container/work", "run"):
        (work / name).mkdir(parents=True)
    # The mounts live and die with this process; the restored container has its own.
    calls.unshare(calls.CLONE_NEWNS)
    calls.mount("none", "/", "", calls.MS_REC | calls.MS_PRIVATE)
    pid_file = work / "pid"
    try:
        subprocess.run(["cp", "-a", f"{order['upper']}/.", str(work / "container/upper")], check=True)
        rootfs.mount_root(spec.to_json(), str(work / "container"), str(work / "run"))
        rootfs.make_outer_mounts(spec.to_json(), str(work / "run"))
        with socket.create_server(("0.0.0.0", 0)) as listener:
            say(port=listener.getsockname()[1])
            connection, _peer = listener.accept()
        restore(connection, order, spec, work)
        say(restored=time.monotonic(), init_pid=int(pid_file.read_text()))
        hear()  # until it has been looked at
    finally:
        if pid_file.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
        for point in sorted((work / "run").iterdir()):
            with contextlib.suppress(OSError):
                calls.unmount(str(point), calls.MNT_DETACH)
        shutil.rmtree(work)


def restore(connection: socket.socket, order: dict[str, Any], spec: ContainerSpec, work: Path) -> None:
    # A descriptor for each pipe: CRIU takes them over one by one.
    with (work / "output").open("wb") as output:
        logs = [fcntl.fcntl(output, fcntl.F_DUPFD_CLOEXEC, LOG_FD) for _ in order["pipes"]]
    # What has to be mapped where; plain users write this into their scripts.
    names = [o for key in order["keys"] for o in ("--external", f"mnt[{key}]:{mount_source(spec, key, work / 'run')}")]
    pairs = zip(logs, order["pipes"], strict=True)
    pipes = [o for fd, inode in pairs for o in ("--inherit-fd", f"fd[{fd}]:pipe:[{inode}]")]
    images = work / "images"
    with connection:
        subprocess.run(["tar", "-C", str(images), "-xf", "-"], stdin=connection.fileno(), check=True)
    try:
        place = ("--root", str(work / "run/root"), "--pidfile", str(work / "pid"))
        criu("restore", images, "--restore-detached", *place, *names, *pipes, fds=tuple(logs))
    finally:
        for fd in logs:
            os.close(fd)


def main() -> None:
    {"source": source, "target": target}[sys.argv[1]]()


if __name__ == "__main__":
    main()
