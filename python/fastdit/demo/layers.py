"""The report of `fastdit.accelerate` as plain data and as rows of a table."""

from __future__ import annotations

from typing import Any

from fastdit.integrations import Report


def plain(report: Report) -> list[dict[str, Any]]:
    """Replaced layers first, then those left as they are with the reason."""
    ordered = sorted(report.rows, key=lambda row: not row.replaced)
    return [{"layer": r.layer, "count": r.count, "replaced": r.replaced, "why": r.why} for r in ordered]


def rows(entries: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(e["layer"], e["count"], f"{'replaced by' if e['replaced'] else 'left:'} {e['why']}") for e in entries]
