"""Frames for a container that is on its way here: held while it is frozen, handed over when it runs.

A dropped frame costs the peer a retransmission timer, 200 ms and doubling; a held one costs nothing. From the freeze on
a tap device on the target's bridge speaks for the container's MAC, so that bridges lead its frames here; they wait in
the tap's queue, which needs no reader, and are sent into the container's link once its sockets are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path

from pyroute2 import IPRoute

from runtime.announcements import announcements, is_for, solicited_mac
from runtime.api import NetworkSpec
from runtime.errors import KernelCallFailed
from runtime.host import HostConfig
from runtime.network import link_name

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
QUEUE_FRAMES = 4096
"""Frames that can wait. A full queue drops, as a busy link would."""
MAX_FRAME_BYTES = 65536 + 18


def tap_name(container_id: str) -> str:
    return f"ch{container_id}"


class PacketHold:
    """Holds the frames of one container on this host's bridge. The tap goes with its descriptor, whoever dies."""

    def __init__(self, host: HostConfig, container_id: str, network: NetworkSpec) -> None:
        self._bridge = host.bridge
        self._name = tap_name(container_id)
        self._link = link_name(container_id)
        self._mac = bytes.fromhex(network.mac.replace(":", ""))
        self._solicited = solicited_mac(network)
        self._announcements = announcements(network)
        self._tap = -1
        self._sender: socket.socket | None = None
        self._netlink: IPRoute | None = None
        self._tap_index = self._bridge_index = 0
        self.handed_over = 0
        """Frames that were waiting."""

    def prepare(self) -> None:
        """Make the tap; nothing is held yet. Raises KernelCallFailed where there is no /dev/net/tun."""
        try:
            self._tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self._tap, _TUNSETIFF, struct.pack("16sH22x", self._name.encode(), _IFF_TAP | _IFF_NO_PI))
        except OSError as error:
            self.close()
            raise KernelCallFailed("TUNSETIFF", self._name, error.errno or 0) from error
        # The tap itself must not speak: no router solicitations from a device that is somebody else's voice.
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{self._name}/disable_ipv6").write_text("1")
        self._sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        self._netlink = netlink = IPRoute()
        self._tap_index = netlink.link_lookup(ifname=self._name)[0]
        self._bridge_index = netlink.link_lookup(ifname=self._bridge)[0]
        netlink.link("set", index=self._tap_index, txqlen=QUEUE_FRAMES, state="up")

    def start(self) -> None:
        """From here on frames for the container come here and wait: two system calls."""
        if self._netlink is None:
            return
        self._netlink.link("set", index=self._tap_index, master=self._bridge_index)
        for frame in self._announcements:
            os.write(self._tap, frame)

    def hand_over(self) -> None:
        """Send what waited into the container's link, which is on the bridge and announced by now.

        Tap and socket stay until ``close``: taking a device down, and closing a packet socket, wait until every
        processor has passed by, which costs ten milliseconds of blackout and more.
        """
        if self._tap < 0 or self._sender is None:
            return
        while (frame := self._next()) is not None:
            if is_for(frame, self._mac, self._solicited):
                with contextlib.suppress(OSError):
                    self._sender.sendto(frame, (self._link, 0))
                    self.handed_over += 1

    def _next(self) -> bytes | None:
        try:
            return os.read(self._tap, MAX_FRAME_BYTES)
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Stop holding; what still waits is dropped. Idempotent."""
        if self._tap >= 0:
            os.close(self._tap)
            self._tap = -1
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
