"""From what the operator asked for to a complete spec: id, name, address, environment."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from runtime.address import allocate_address, with_ipv6
from runtime.api import ContainerSpec
from runtime.container import Containers, utc_now
from runtime.networks import Networks

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Two words as docker does it, so that a container nobody named can be said aloud.
_FIRST = "brave calm clever eager fair gentle happy keen kind lively merry noble proud quick quiet ready swift wise"
_SECOND = "badger crane eagle falcon finch fox hare heron ibis lark lynx otter owl raven robin stork swan wren"


def new_spec(
    containers: Containers,
    *,
    argv: Sequence[str],
    name: str = "",
    env: Sequence[str] = (),
    ip: str = "",
    ip6: str = "",
    network: bool = True,
    network_name: str = "",
    **fields: Any,
) -> ContainerSpec:
    """A spec with id, name and address chosen where they are not given; ``fields`` are ContainerSpec's own.

    ``network_name`` is a user-defined network, the host's own without one. Raises BadInput for what does not fit,
    NotFound for a network that is not there. Nothing is reserved yet: ``Containers.create`` does that.
    """
    container_id = containers.store.new_id()
    known = containers.store.known_specs()
    used = [spec.network.address for spec in known if spec.network is not None]
    host = Networks(containers.host).host_of(network_name) if network_name else containers.host
    chosen = replace(allocate_address(host, container_id, used, ip), name=network_name) if network else None
    if chosen is not None and ip6:
        used6 = [spec.network.address6 for spec in known if spec.network is not None]
        chosen = with_ipv6(chosen, host, ip6, used6)
    given = {variable.partition("=")[0] for variable in env}
    defaults = [] if "PATH" in given else [f"PATH={DEFAULT_PATH}"]
    return ContainerSpec(
        id=container_id,
        name=name or _free_name({spec.name for spec in known}),
        argv=tuple(argv),
        env=(*defaults, *env),
        network=chosen,
        created_at=utc_now(),
        **fields,
    )


def _free_name(taken: set[str]) -> str:
    while True:
        name = f"{secrets.choice(_FIRST.split())}_{secrets.choice(_SECOND.split())}"
        if name not in taken:
            return name
        if secrets.randbelow(10) == 0:
            return f"{name}_{secrets.token_hex(2)}"
