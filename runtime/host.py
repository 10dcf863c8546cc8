"""Where this host keeps things: directories, cgroup parent, bridge. Read from one TOML file, every key optional."""

from __future__ import annotations

import os
import socket
import tomllib
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BadInput, ReadOnly

CONFIG_DIR = Path("/etc/cmigrate")


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """This host's settings.

    ``state_dir`` survives a reboot (containers, reports, journals); ``run_dir`` does not and must be a tmpfs.
    ``cgroup_parent`` is a path below each cgroup hierarchy's root. ``subnet`` is where container addresses come from,
    ``gateway`` their way out. ``bridge_address`` (with prefix length) is the bridge's own where that is not the
    gateway's. ``gateway6`` (with prefix length) is the bridge's IPv6 address and the containers' way out.
    ``stream_port`` is where ``cmigrate serve`` listens.
    """

    name: str
    config_dir: Path = CONFIG_DIR
    state_dir: Path = Path("/var/lib/cmigrate")
    run_dir: Path = Path("/run/cmigrate")
    cgroup_parent: str = "cmigrate"
    bridge: str = "cmigrate0"
    subnet: str = "10.88.0.0/16"
    gateway: str = "10.88.0.1"
    bridge_address: str = ""
    gateway6: str = ""
    stream_listen: str = "0.0.0.0"
    stream_port: int = 7477

    @property
    def containers_dir(self) -> Path:
        return self.state_dir / "containers"

    @property
    def reports_dir(self) -> Path:
        return self.state_dir / "reports"

    @property
    def journal_dir(self) -> Path:
        return self.state_dir / "journal"


def must_be_writable(host: HostConfig) -> None:
    """Raises ReadOnly when state or run directory can not be written: an error of a disk makes it so at any time."""
    for path in (host.state_dir, host.run_dir):
        there = next(one for one in (path, *path.parents) if one.exists())
        if not os.access(there, os.W_OK):
            raise ReadOnly(
                f"nothing can be written to {there}",
                hint="mount its file system writable again; the kernel's log (dmesg) says why it is not",
            )


def load_host_config(config_dir: Path | None = None) -> HostConfig:
    """Read ``config.toml`` of ``config_dir`` (default: $CMIGRATE_CONFIG, then /etc/cmigrate); no file means defaults.

    Raises BadInput for a file that is not TOML or has an unknown key or a wrong type.
    """
    directory = config_dir or Path(os.environ.get("CMIGRATE_CONFIG", CONFIG_DIR))
    file = directory / "config.toml"
    values: dict[str, object] = {}
    if file.exists():
        try:
            values = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{file}: {error}", hint="correct or remove the file") from error
    known: dict[str, object] = {"name": socket.gethostname(), "config_dir": directory}
    for key, value in values.items():
        field = HostConfig.__dataclass_fields__.get(key)
        if field is None or key == "config_dir":
            raise BadInput(f"{file}: unknown key {key!r}", hint="see docs/configuration.md for the keys")
        wanted: type = int if key == "stream_port" else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise BadInput(f"{file}: {key} must be of type {wanted.__name__}")
        known[key] = Path(str(value)) if key in ("state_dir", "run_dir") else value
    return HostConfig(**known)  # type: ignore[arg-type]
