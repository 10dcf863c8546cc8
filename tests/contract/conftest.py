from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tests.contract.pairs import KINDS, Pair, make_pair
from tests.contract.sshd import SshServer, running_sshd


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both ends of an open channel, of each kind in turn; `near` is the end that connected."""
    with _open(request, tmp_path_factory, request.param) as both:
        yield both


@pytest.fixture(params=[*KINDS, *(f"{kind} reversed" for kind in ("local", "tls", "sealed", "ssh"))])
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The same for what each side has to do alike; where the sides are made differently, also with `near` and `far`
    exchanged."""
    kind, _, is_reversed = request.param.partition(" ")
    with _open(request, tmp_path_factory, kind) as both:
        yield Pair(both.far, both.near) if is_reversed else both


def _open(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> AbstractContextManager[Pair]:
    server = request.getfixturevalue("ssh_server") if kind == "ssh" else None
    # Not tmp_path, whose name holds that of the test: the path of a socket has 107 characters at most.
    return make_pair(kind, tmp_path_factory.mktemp("pair"), server)
