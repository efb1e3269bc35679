"""Looking through findings."""

from collections.abc import Iterable

from steptron.doctor.finding import Finding


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    """The last of each name."""
    return {finding.name: finding for finding in findings}


def bad(findings: Iterable[Finding]) -> dict[str, str]:
    """States of those that are not ok."""
    return {finding.name: finding.state for finding in findings if finding.state != "ok"}
