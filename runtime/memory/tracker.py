"""Which trackers work on this kernel, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.errors import MissingFeature
from runtime.linux.probes import has_async_write_protect, has_pagemap_scan
from runtime.linux.registers import this_architecture
from runtime.memory.api import DirtyTracker, TrackerKind
from runtime.memory.tracker_hash import HashTracker
from runtime.memory.tracker_uffd import UffdTracker


def probe_trackers() -> Mapping[TrackerKind, str]:
    """Each kind, best first, with the reason why it does not work here; empty when it does."""
    return {"uffd-wp": _why_no_uffd(), "hash": ""}


def _why_no_uffd() -> str:
    try:
        this_architecture()
    except MissingFeature as error:
        return str(error)
    if not has_async_write_protect():
        return "the kernel has no userfaultfd with asynchronous write-protection (Linux 6.7)"
    if not has_pagemap_scan():
        return "the kernel has no PAGEMAP_SCAN (Linux 6.7)"
    return ""


def make_tracker(kind: TrackerKind | None = None, *, shared: bool = False) -> DirtyTracker:
    """The best one that works here, or the one that is asked for. Raises MissingFeature.

    ``shared``: track shared memory too (``Scan.segments``), which costs reading all of it in each scan.
    """
    reasons = probe_trackers()
    chosen = kind if kind is not None else next(each for each, reason in reasons.items() if not reason)
    if reasons[chosen]:
        raise MissingFeature(f"no tracker {chosen}: {reasons[chosen]}", hint="the hash tracker works everywhere")
    return UffdTracker(shared=shared) if chosen == "uffd-wp" else HashTracker(shared=shared)
