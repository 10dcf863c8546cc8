"""Fixtures that several integration tests share."""

import shutil
from collections.abc import Iterator

import pytest

from tests.support.lab import TwoHosts, disk_directory, lab_of_two_hosts


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[TwoHosts]:
    """One lab for all tests that move containers: bringing it up costs seconds."""
    directory = disk_directory()
    try:
        with lab_of_two_hosts(directory) as hosts:
            yield hosts
    finally:
        shutil.rmtree(directory, ignore_errors=True)
