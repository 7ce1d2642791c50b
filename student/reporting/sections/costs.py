"""What the runs cost: time, pictures a second, waiting, bytes, and on which machine."""

from __future__ import annotations

from typing import Any

from featcache.catalog import ledger
from featcache.console.text import format_bytes, format_seconds
from featcache.drawing.page import table
from featcache.errors import UserError
from student.reporting.contents import Contents
from student.reporting.reported_run import ReportedRun

PRECISIONS = {"no": "fp32"}  # by Accelerate's name
Row = tuple[str, ...]


def section(contents: Contents) -> str:
    """Return a column for each run."""
    columns = [_column(run) for run in contents.runs]
    names = list(columns[0])
    rows: list[Row] = [(name, *(column[name] for column in columns)) for name in names]
    views = contents.views
    if views is not None and views.cache is not None:
        size = format_bytes(views.cache.bytes)
        rows.append(("bytes of the cache that is shown", *[size] * len(columns)))
    return table(rows, ("", *(run.name for run in contents.runs)))


def _column(run: ReportedRun) -> dict[str, str]:
    curves, batch = run.curves, _number(run.record, "data", "global_batch")
    seconds = batch * curves.trained_s
    environment = run.environment
    return {
        "steps": f"{run.facts['step']:,} of {run.facts['steps']:,}",
        "pictures a step": f"{batch:,}" if batch else "-",
        "time of the steps": format_seconds(seconds) if seconds else "-",
        "pictures a second": f"{curves.timed / curves.trained_s:,.0f}" if curves.trained_s else "-",
        "waiting for data": f"{curves.waited_s / curves.trained_s:.1%}" if seconds else "-",
        "processes": str(_number(run.record, "running", "processes") or "-"),
        "started, by the run ledger": _starts(run),
        "bytes of the run's folder": format_bytes(run.facts["bytes"]),
        "device": str(environment["device"] or "-"),
        "torch": str(environment["torch"] or "-"),
        "commit": str(environment["commit"] or "-")[:12],
        "precision": PRECISIONS.get(given := str(run.record.get("precision", "-")), given),
        "last row": run.facts["last_written"],
    }


def _number(record: dict[str, Any], group: str, name: str) -> int:
    part = record.get(group)
    value = part.get(name) if isinstance(part, dict) else None
    return value if type(value) is int and 0 <= value < 10**12 else 0


def _starts(run: ReportedRun) -> str:
    """Count the ledger's lines on a run; it has those that are trained on a cache."""
    targets = run.record.get("targets")
    cache = targets.get("id") if isinstance(targets, dict) else None
    if not isinstance(cache, str):
        return "-"
    try:
        lines = ledger.runs_of(cache)
    except UserError:  # there is no home
        return "-"
    mine = [line for line in lines if line.get("run") == str(run.path.absolute())]
    return f"{len(mine)} time{'s' * (len(mine) != 1)}" if mine else "-"
