"""Which private pages of a process have content of their own now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.linux.pagemap import Bounds, Pagemap
from runtime.memory.maps import Kind, Mapping, parse_details
from runtime.memory.ranges import EMPTY, PageRanges
from runtime.memory.tasks import AddressSpace
from runtime.memory.watched import PRIVATE


def private_mappings(space: AddressSpace) -> list[Mapping]:
    return [mapping for mapping in space.mappings if mapping.kind in PRIVATE]


def existing_pages(space: AddressSpace, private: Sequence[Mapping], *, use_scan: bool) -> PageRanges:
    """Of ``private``, some of the space's mappings. ``use_scan``: the kernel has PAGEMAP_SCAN (Linux 6.7)."""
    if not use_scan:
        private = _populated(space.tid, private)
    found: list[Bounds] = [EMPTY.bounds]
    with Pagemap(space.tid) as pagemap:
        for mapping in private:
            if use_scan:
                of_files = mapping.kind == Kind.PRIVATE_FILE
                found.append(pagemap.own_pages(mapping.start, mapping.end, of_files=of_files))
            else:
                found.append(pagemap.own_pages_by_entry(mapping.start, mapping.end))
    return PageRanges.of(np.concatenate(found))


def _populated(tid: int, private: Sequence[Mapping]) -> list[Mapping]:
    """Mappings that hold pages at all: an arena of many GiB with nothing in it is not to be read page by page."""
    details = parse_details(Path(f"/proc/{tid}/smaps").read_text())
    held = {each.mapping.start for each in details if each.resident_bytes or each.swapped_bytes}
    return [mapping for mapping in private if mapping.start in held]
