from __future__ import annotations

from collections.abc import Iterator

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
    server = request.getfixturevalue("ssh_server") if request.param == "ssh" else None
    # Not tmp_path, whose name holds that of the test: the path of a socket has 107 characters at most.
    with make_pair(request.param, tmp_path_factory.mktemp("pair"), server) as both:
        yield both


@pytest.fixture(params=["to the far end", "to the near end"])
def ends(request: pytest.FixtureRequest, pair: Pair) -> Pair:
    """The same with `near` and `far` exchanged in half of the tests: for what each side has to do alike."""
    return pair if request.param == "to the far end" else Pair(pair.far, pair.near)
