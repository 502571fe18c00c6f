"""What the doctor found, as a table for people and as a dictionary for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from makd_llm.doctor.finding import Finding

COLOURS = {"ok": "green", "slow": "yellow", "check": "yellow", "missing": "dim"}


def doctor_table(findings: Sequence[Finding]) -> Table:
    """A line for each finding; what is missing and needed stands out."""
    states = [finding.state for finding in findings]
    counts = [f"{states.count(s)} {s}" for s in COLOURS if s in states]
    table = Table(title="this machine", caption=", ".join(counts))
    for column in ("", "state", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = "bold red" if finding.needed else COLOURS[finding.state]
        words = (escape(finding.found), escape(finding.advice))
        table.add_row(finding.name, f"[{colour}]{finding.state}[/]", *words)
    return table


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """ok: whether runs work here; findings: all of them."""
    return {
        "ok": not any(finding.needed for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
