"""What a lab consists of: names, addresses, and the text of every file and script it needs. No I/O.

The client's namespace holds the lab's one bridge, with the containers' gateway address. Each host has a bridge of its
own, joined to that one by its uplink, so containers of all hosts are in one segment and their addresses can move.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BadInput

CLIENT = "client"
MAX_HOSTS = 64
CGROUP_ROOT = "cmigrate-lab"
SUBNET = ipaddress.IPv4Network("10.88.0.0/16")
GATEWAY = SUBNET[1]
# runtime.network gives none of the last 256 addresses to containers.
_FIRST_HOST = SUBNET.num_addresses - 256
BRIDGE = "cmigrate0"
ROUTED_CLIENT = "10.87.0.1"
"""The client of a routed lab, where it is the router between hosts that share no segment."""
UPLINK = "uplink"
SSH_PORT = 22
STREAM_PORT = 7477
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)bit", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
# A token bucket must hold what the rate gives in a tick of the kernel's clock, and the largest packet (64 KiB by GSO).
_TICK_S = 0.004
_LEAST_BURST_BYTES = 128 * 1024


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A link's rate; ``text`` is what tc understands."""

    text: str
    burst_bytes: int


def parse_rate(text: str) -> Rate:
    """``1gbit``, ``100mbit``, ``64kbit``. Raises BadInput."""
    match = _RATE.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise BadInput(f"{text!r} is no rate", hint="a number and bit, kbit, mbit or gbit: 1gbit")
    bit_per_s = float(match[1]) * _FACTORS[match[2].lower()]
    return Rate(text=f"{round(bit_per_s)}bit", burst_bytes=max(_LEAST_BURST_BYTES, round(bit_per_s / 8 * _TICK_S)))


def lab_id(directory: Path) -> str:
    """Short, and always the same for one directory: what belongs to a lab is found even when its records are gone."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]


def host_names(count: int) -> tuple[str, ...]:
    if not 1 <= count <= MAX_HOSTS:
        raise BadInput(f"{count} hosts", hint=f"between 1 and {MAX_HOSTS}")
    return tuple(f"host{number}" for number in range(1, count + 1))


def host_address(number: int, *, routed: bool = False) -> str:
    """Of host ``number``, from 1."""
    return f"10.87.{number}.2" if routed else str(SUBNET[_FIRST_HOST + number])


def client_address(*, routed: bool = False) -> str:
    return ROUTED_CLIENT if routed else str(GATEWAY)


def bridge_mac(number: int) -> str:
    """Fixed: a bridge left alone takes the lowest of its ports', which come and go with containers."""
    return f"02:43:{0:02x}:{0:02x}:{0:02x}:{number:02x}"


def config_toml(*, name: str, address: str, cgroup_parent: str, routed: bool = False) -> str:
    """Where hosts are routed each is its containers' gateway, all under one address, as installations are."""
    values = {
        "name": name,
        "cgroup_parent": cgroup_parent,
        "bridge": BRIDGE,
        "subnet": str(SUBNET),
        "gateway": str(GATEWAY),
        **({} if routed else {"bridge_address": f"{address}/{SUBNET.prefixlen}"}),
        "stream_port": STREAM_PORT,
    }
    return "# A host of a lab: see `cmigrate lab`.\n" + "".join(
        f"{key} = {json.dumps(value)}\n" for key, value in values.items()
    )


def sshd_config(*, directory: Path, path: str) -> str:
    """Keys only, and everything below ``directory``. SetEnv stands above what the account has."""
    return f"""\
Port {SSH_PORT}
HostKey "{directory}/ssh_host_ed25519_key"
PidFile none
AuthorizedKeysFile "{directory}/home/.ssh/authorized_keys"
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
SetEnv "PATH={path}" "HOME={directory}/home"
"""


def hosts_file(existing: str, addresses: dict[str, str]) -> str:
    """/etc/hosts with the lab's names before what was there."""
    lines = "".join(f"{address} {name}\n" for name, address in addresses.items())
    return f"127.0.0.1 localhost\n{lines}{existing}"


def holder_script() -> str:
    """Run by sh in fresh network, mount and UTS namespaces, which it then keeps by sleeping.

    Arguments: the cgroup's procs file, the name, and what to mount where for each bind mount. Says its pid and "ready".
    """
    return """\
set -e
echo $$ >"$0"
echo $$
name=$1
shift
echo "$name" >/proc/sys/kernel/hostname
mount -t tmpfs -o mode=755,nosuid,nodev cmigrate-lab /run
mkdir -p /run/sshd /run/lock
while [ $# -gt 0 ]; do
  mount --bind "$1" "$2"
  shift 2
done
ip link set lo up
cd /
echo ready
exec sleep infinity </dev/null >/dev/null 2>&1
"""


# Arguments: the cgroup's procs file, the directory to be in, the command.
ENTER_SCRIPT = 'echo $$ >"$1" && { cd "$2" 2>/dev/null || cd /; } && shift 2 && exec "$@"'
ENTER_NAME = "lab exec"  # how the shell begins its complaint when there is no such command

# Arguments: the log file, the command. The pid that it says stays that of the command.
DETACHED_SCRIPT = 'echo $$; exec </dev/null >>"$0" 2>&1; exec "$@"'


def client_links(pids: list[int]) -> str:
    """For `ip -batch` in the client's namespace: the lab's bridge, and an uplink into each host (by pid)."""
    lines = [
        f"link add name lab0 address {bridge_mac(0)} type bridge stp_state 0 forward_delay 0",
        f"address add {GATEWAY}/{SUBNET.prefixlen} dev lab0",
        "link set lab0 up",
    ]
    for number, pid in enumerate(pids, start=1):
        lines += [
            f"link add name h{number} type veth peer name {UPLINK} netns {pid}",
            f"link set h{number} master lab0 up",
        ]
    return "\n".join(lines) + "\n"


def routed_client_links(pids: list[int]) -> str:
    """As ``client_links``, with a segment for each host."""
    lines = ["link set lo up", f"address add {ROUTED_CLIENT}/32 dev lo"]
    for number, pid in enumerate(pids, start=1):
        lines += [
            f"link add name h{number} type veth peer name {UPLINK} netns {pid}",
            f"address add 10.87.{number}.1/24 dev h{number}",
            f"link set h{number} up",
        ]
    return "\n".join(lines) + "\n"


ROUTING = "echo 1 >/proc/sys/net/ipv4/ip_forward"


def routed_host_links(number: int) -> str:
    """As ``host_links``; the bridge joins nothing but this host's containers."""
    return "\n".join(
        [
            f"link add name {BRIDGE} address {bridge_mac(number)} type bridge stp_state 0 forward_delay 0",
            f"address add {GATEWAY}/{SUBNET.prefixlen} dev {BRIDGE}",
            f"link set {BRIDGE} up",
            f"address add {host_address(number, routed=True)}/24 dev {UPLINK}",
            f"link set {UPLINK} up",
            f"route add default via 10.87.{number}.1",
            "",
        ]
    )


def host_links(number: int) -> str:
    """For `ip -batch` in the namespace of host ``number``."""
    return "\n".join(
        [
            f"link add name {BRIDGE} address {bridge_mac(number)} type bridge stp_state 0 forward_delay 0",
            f"address add {host_address(number)}/{SUBNET.prefixlen} dev {BRIDGE}",
            f"link set {UPLINK} master {BRIDGE} up",
            f"link set {BRIDGE} up",
            f"route add default via {GATEWAY}",
            "",
        ]
    )


def shaping(links: list[str], rate: Rate) -> str:
    """For `tc -batch`: what leaves by each of these links is limited."""
    return "".join(
        f"qdisc add dev {link} root tbf rate {rate.text} burst {rate.burst_bytes} latency 50ms\n" for link in links
    )
