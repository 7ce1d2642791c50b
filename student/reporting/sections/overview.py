"""The head of a report: the runs by number, and whether they are an ablation."""

from __future__ import annotations

from featcache.console.text import format_bytes
from featcache.drawing.page import escape, scrolling
from student.reporting.contents import Contents
from student.reporting.reported_run import ReportedRun
from student.reporting.sections import line_chart

HEAD = ("", "run", "recipe", "state", "step", "loss", "size", "folder")


def section(contents: Contents) -> str:
    """Return a row for each run, and the verdict where there are several."""
    rows = "\n".join(map(_row, contents.runs))
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    table = scrolling(f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody>", "runs")
    if len(contents.runs) < 2:
        return table
    verdict = contents.judged["verdict"]
    told = escape(f"{verdict[:1].upper()}{verdict[1:]}.")
    return f"<p><strong>{told}</strong> {_meaning(contents)}</p>\n{table}"


def _meaning(contents: Contents) -> str:
    if contents.judged["ablation"]:
        return "Nothing else that bears on the numbers differs: scores may be compared."
    return (
        "These must be the same for scores to be compared as those of one change; "
        "what differs is below."
    )


def _row(run: ReportedRun) -> str:
    facts = run.facts
    begun = f" of {facts['begun']}" if facts["begun"] else ""
    loss = facts["loss"]
    cells = (
        run.name,
        f"{facts['recipe']}{begun}",
        facts["state"],
        f"{facts['step']:,} of {facts['steps']:,}",
        "-" if loss is None else loss if isinstance(loss, str) else f"{loss:.4f}",
        format_bytes(facts["bytes"]),
        str(run.path),
    )
    line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{line_chart.sample(run.number - 1)}</td>{line}</tr>"


def legend(contents: Contents) -> str:
    """Return the runs' lines and names, which stay in sight beside the charts."""
    parts = (
        f"<span>{line_chart.sample(run.number - 1)} {escape(run.name)}</span>"
        for run in contents.runs
    )
    return f'<div class="legend">{" ".join(parts)}</div>'
