"""What a host that shall receive a container has: files of a lower layer, ports, who answers for an address."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType

from runtime.announcements import ARPOP_REQUEST, ETH_P_ARP
from runtime.api import NetworkSpec
from runtime.errors import KernelCallFailed
from runtime.facts import LowerFile
from runtime.linux.elf import read_elf
from runtime.linux.inroot import open_regular_in_root

ARPOP_REPLY = 2
_ETHERNET_BYTES = 14
_ARP = struct.Struct("!HHBBH6s4s6s4s")


def lower_files_at(rootfs: str, wanted: Sequence[LowerFile]) -> dict[str, LowerFile | None]:
    """The files of this host's ``rootfs`` ("host" or a directory) under the paths of ``wanted``; None: not there.

    The build id is read where the wanted file has one. Paths come from a peer: they are resolved inside the rootfs.
    """
    try:
        root = os.open("/" if rootfs == "host" else rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return {file.path: None for file in wanted}
    try:
        return {file.path: _lower_file(root, file) for file in wanted}
    finally:
        os.close(root)


def _lower_file(root: int, wanted: LowerFile) -> LowerFile | None:
    try:
        descriptor = open_regular_in_root(root, wanted.path)
    except (OSError, KernelCallFailed):
        return None
    try:
        status = os.fstat(descriptor)
        elf = read_elf(functools.partial(os.pread, descriptor)) if wanted.build_id else None
        return LowerFile(
            path=wanted.path,
            size_bytes=status.st_size,
            mode=status.st_mode,
            build_id=elf.build_id.hex() if elf else "",
        )
    finally:
        os.close(descriptor)


class AddressProbe:
    """Asks on the bridge who has an address, RFC 5227 section 2.1. The question is out when the probe is made.

    Use as context manager. Without a bridge, or with one that is down, nobody answers.
    """

    def __init__(self, bridge: str, network: NetworkSpec) -> None:
        self._address = ipaddress.ip_interface(network.address).ip.packed
        self._socket: socket.socket | None = None
        probe = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETH_P_ARP))
        try:
            probe.bind((bridge, 0))
            probe.send(arp_probe(probe.getsockname()[4], self._address))
            self._socket = probe
        except OSError:
            probe.close()

    def __enter__(self) -> AddressProbe:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._socket is not None:
            self._socket.close()

    def answer(self, timeout_s: float) -> str:
        """The MAC that answers for the address, empty for none within so long."""
        deadline = time.monotonic() + timeout_s
        while self._socket is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._socket.settimeout(left)
            with contextlib.suppress(TimeoutError, OSError):
                sender = arp_sender(self._socket.recv(2048), self._address)
                if sender:
                    return sender
        return ""


def arp_probe(own_mac: bytes, address: bytes) -> bytes:
    """ "Who has it?", with no sender address: nobody's cache changes."""
    own = own_mac[:6]
    header = b"\xff" * 6 + own + struct.pack("!H", ETH_P_ARP)
    return header + _ARP.pack(1, 0x0800, 6, 4, ARPOP_REQUEST, own, b"\0" * 4, b"\0" * 6, address)


def arp_sender(frame: bytes, address: bytes) -> str:
    """The MAC that claims ``address`` in this frame; empty when it does not."""
    if len(frame) < _ETHERNET_BYTES + _ARP.size:
        return ""
    kind, protocol, _, _, operation, mac, sender, _, _ = _ARP.unpack_from(frame, _ETHERNET_BYTES)
    if (kind, protocol) != (1, 0x0800) or operation not in (ARPOP_REQUEST, ARPOP_REPLY) or sender != address:
        return ""
    return ":".join(f"{byte:02x}" for byte in mac)
