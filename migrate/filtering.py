"""The page filter of one dump, where this host can have one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from migrate.observe import Observer, Warning
from runtime.criu.filter.build import build_filter
from runtime.criu.filter.table import PageFilter
from runtime.errors import MissingFeature


def load_filter(state_dir: Path, closing: ExitStack, observer: Observer) -> PageFilter | None:
    """Closed by ``closing``. Optional: without a compiler CRIU walks all memory, and dumps connection tracking that
    nobody restores."""
    try:
        found = PageFilter(build_filter(state_dir / "cache"), without_conntrack=True)
    except (MissingFeature, OSError) as error:
        observer.on_event(Warning(what=f"the dump goes without the page filter: {error}"))
        return None
    closing.callback(found.close)
    return found
