"""The matrix W of dynamic alignment: how much of each student block goes into what is compared with
each level of the teacher (MaskAlign)."""

from __future__ import annotations

import html

import numpy as np
import numpy.typing as npt

from featcache.drawing.page import escape, scrolling
from student.models.alignment import AlignmentHead
from student.reporting.contents import Contents
from student.reporting.reported_run import ReportedRun

EXPLAINED = (
    "Row: a block of the student. Column: a level of the teacher. A level's prediction is made of "
    "the sum of all blocks, each times its number here, as they stand: no softmax, no sum to one. "
    "Training starts from 1.01 at the level's own block and 0.01 at the others, or from one over "
    "the number of blocks where teacher and student differ in depth."
)


def section(contents: Contents) -> str:
    """Return a table of W for each run that has one."""
    found = [(run, weights) for run in contents.runs if (weights := matrix(run)) is not None]
    parts = [
        f"<div><h3>{escape(run.name)}, step {run.facts['step']:,}</h3>\n{_table(*weights)}</div>"
        for run, weights in found
    ]
    if not parts:
        return ""
    tables = "\n".join(parts)
    return f'<p class="muted">{escape(EXPLAINED)}</p>\n<div class="matrices">{tables}</div>'


def matrix(run: ReportedRun) -> tuple[list[int], npt.NDArray[np.float64]] | None:
    """Return the levels of the teacher (L,) and W (L, S) as the model of a run uses it; None where
    there is none."""
    head = getattr(run.model, "align", None)
    if not isinstance(head, AlignmentHead) or head.mix is None:
        return None
    return list(head.weights), head.mix.detach().double().numpy()


def _table(levels: list[int], weights: npt.NDArray[np.float64]) -> str:
    head = "".join(f"<th>level {level}</th>" for level in levels)
    largest = max(float(np.abs(weights).max()), 1e-12)
    rows = "\n".join(
        f"<tr><th>block {block}</th>{''.join(_cell(value, largest) for value in row)}</tr>"
        for block, row in enumerate(weights.T, 1)
    )
    return scrolling(f"<thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}\n</tbody>", "matrix")


def _cell(value: float, largest: float) -> str:
    """Return a number on a ground whose strength is its size: blue above zero, orange below."""
    share = round(60 * abs(value) / largest)
    colour = "var(--series-1)" if value >= 0 else "var(--series-2)"
    style = html.escape(f"background: color-mix(in srgb, {colour} {share}%, transparent)")
    return f'<td style="{style}">{value:.3f}</td>'
