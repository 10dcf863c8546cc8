"""How a container is reached after a move: what is decided from what was asked for and what was found."""

import pytest

from migrate.errors import MoveRefused
from migrate.segment import WantedNetwork, decide
from runtime.wire import WireSpec

WIRE = WireSpec(number=7, source="192.0.2.1", target="192.0.2.2", grace_s=600)


@pytest.mark.parametrize("wanted", ["auto", "l2"])
def test_in_a_shared_segment_no_wire_is_made(wanted: WantedNetwork) -> None:
    way = decide(wanted, True, "host2", lambda: WIRE)
    assert (way.network, way.wire, way.warning) == ("l2", None, "")


@pytest.mark.parametrize("wanted", ["forward", "vxlan"])
def test_a_wire_beside_a_shared_segment_is_refused(wanted: WantedNetwork) -> None:
    with pytest.raises(MoveRefused, match="circles"):
        decide(wanted, True, "host2", lambda: WIRE)


@pytest.mark.parametrize(("wanted", "network"), [("auto", "forward"), ("forward", "forward"), ("vxlan", "vxlan")])
def test_between_segments_a_wire_leads_to_the_target(wanted: WantedNetwork, network: str) -> None:
    way = decide(wanted, False, "host2", lambda: WIRE)
    assert (way.network, way.wire) == (network, WIRE)


def test_who_wants_no_wire_is_told_what_that_costs() -> None:
    way = decide("l2", False, "host2", lambda: WIRE)
    assert way.wire is None
    assert "connections will not go on" in way.warning
