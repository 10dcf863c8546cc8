"""Rules for every test: one that needs root says so, and none leaves anything behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.leaks import take_snapshot, wait_for_leaks_to_go

# How long an example takes says how busy the machine is.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")

INTEGRATION = Path(__file__).parent / "integration"


def pytest_configure() -> None:
    # Whoever starts the tests in the background starts them with SIGINT ignored, and so would everything that they
    # start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.root)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test that leaves a descriptor, thread or process behind.

    Of a root test also a mount, network namespace, link, cgroup or nft table. What a fixture of a wider scope holds is
    there before and after, and counts for nothing.
    """
    whole_host = request.node.get_closest_marker("root") is not None
    if whole_host and os.geteuid() != 0:
        pytest.fail("this test needs root: use sudo scripts/test, or leave it out with -m 'not root'", pytrace=False)
    before = take_snapshot(whole_host=whole_host)
    yield
    leaked = wait_for_leaks_to_go(before, whole_host=whole_host)
    if leaked:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaked), pytrace=False)
