"""What is loaded when: who only looks does not wait for what moves, and a move has everything before it begins."""

import subprocess
import sys

import pytest


def holds_in_a_new_process(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["runtime.container", "runtime.execute", "runtime.logs", "runtime.specify"])
def test_looking_at_containers_loads_nothing_that_takes_long(module: str) -> None:
    heavy = {"pyroute2", "numpy", "paramiko", "cryptography", "google.protobuf", "pycriu"}
    holds_in_a_new_process(f"import sys, {module}; found = {heavy} & set(sys.modules); assert not found, found")


@pytest.mark.parametrize("module", ["migrate.wiring", "migrate.serve"])
def test_what_sets_up_networks_is_there_before_a_move(module: str) -> None:
    """Nothing is imported in a blackout; containers import these where they use them."""
    used = {"runtime.network", "runtime.wayback", "runtime.wire"}
    holds_in_a_new_process(f"import sys, {module}; missing = {used} - set(sys.modules); assert not missing, missing")
