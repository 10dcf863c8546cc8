"""All checks before anything freezes: of this host (``doctor``), of a container that shall leave, of a host it shall
reach. Every blocker is found at once, each with a remedy. docs/preflight.md lists the checks.
"""

from migrate.preflight.doctor import doctor
from migrate.preflight.findings import Finding
from migrate.preflight.source import SourceCheck, check_source, source_facts, source_findings
from migrate.preflight.target import target_findings

__all__ = [
    "Finding",
    "SourceCheck",
    "check_source",
    "doctor",
    "source_facts",
    "source_findings",
    "target_findings",
]
