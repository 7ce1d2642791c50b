"""The scores of results.jsonl, with their intervals, on one scale."""

from __future__ import annotations

from typing import Any

from featcache.drawing.page import escape, scrolling
from student.reporting.contents import Contents
from student.reporting.sections import line_chart


def section(contents: Contents) -> str:
    """Return for each evaluation the score and interval of every run that has one."""
    scores = contents.judged["scores"]
    if not scores:
        contents.miss("scores: `student eval` of a run writes results.jsonl")
        return ""
    parts = [_evaluation(contents, each) for each in scores]
    note = (
        "The newest result of each evaluation, in percent, and the interval that it has for so "
        "many test pictures. The bar is the interval on a scale from 0 to 100, the mark the score."
    )
    return f'<p class="muted">{note}</p>\n' + "\n".join(parts)


def _evaluation(contents: Contents, each: dict[str, Any]) -> str:
    rows = "\n".join(
        _row(run.number, run.name, value)
        for run, value in zip(contents.runs, each["values"], strict=True)
        if value is not None
    )
    return (
        f"<h3>{escape(each['label'])}, {each['n_test']:,} test pictures</h3>\n"
        f"{scrolling(f'<tbody>{rows}</tbody>', 'scores')}"
    )


def _row(number: int, name: str, value: dict[str, Any]) -> str:
    low, high = value["interval"][:2]
    score = value["score"]
    colour = f"var(--series-{(number - 1) % 6 + 1})"
    bar = (
        '<svg width="160" height="14" viewBox="0 0 100 14" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect width="100" height="14" fill="var(--panel)"/>'
        f'<rect x="{low:.2f}" y="4" width="{max(high - low, 0.5):.2f}" height="6" '
        f'fill="{colour}" opacity="0.5"/>'
        f'<rect x="{score - 0.4:.2f}" y="1" width="0.8" height="12" fill="{colour}"/></svg>'
    )
    return (
        f"<tr><td>{line_chart.sample(number - 1)}</td><td>{escape(name)}</td>"
        f"<td>{score:.2f}</td><td>{low:.2f} to {high:.2f}</td><td>{bar}</td></tr>"
    )
