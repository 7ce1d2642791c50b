"""The curves of all runs on shared axes, a chart for each column of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

from featcache.drawing.page import escape
from student.reporting.contents import Contents
from student.reporting.metric_curves import POINTS
from student.reporting.reported_run import ReportedRun, last_step
from student.reporting.sections import line_chart, overview
from student.reporting.sections.line_chart import Series

TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "skipped": "steps left out so far (--skip-nonfinite)",
    "probe_knn": "k-NN on held-out pictures, %",
    "probe_linear": "linear probe on held-out pictures, %",
    "rankme": "RankMe: effective rank of the features",
    "images_per_s": "pictures a second",
    "data_wait": "share of a step that waits for data",
    "align": "part of the loss: alignment with the teacher",
    "pixel": "part of the loss: hidden pixels",
    "fallback": "pictures of a step that the teacher made (--fallback)",
}
BEGINNINGS = {
    "level_": "part of the loss: teacher's level ",
    "cosine_": "cosine with the teacher on held-out pictures, ",
}
PROBES = ("probe_knn", "probe_linear", "rankme")
STEADY = ("lr", "skipped", *PROBES)  # not noisy from step to step
OPTIMISER, SPEED = ("lr", "grad_norm", "skipped"), ("images_per_s", "data_wait", "fallback")
MOST_CHARTS = 48
WANTING = {
    "grad_norm": "the gradient norm is measured where gradients are clipped: "
    "student train --set clip_grad=NORM",
    "probe_knn": "k-NN, linear probe and RankMe while training: student train --probe LABELLED",
}


def section(contents: Contents) -> str:
    """Return all charts in groups; columns of every run, in the order in which they come."""
    names = list(dict.fromkeys(name for run in contents.runs for name in run.curves.columns))
    for name, what in WANTING.items():
        if name not in names:
            contents.miss(what)
    if not names:
        contents.miss("curves: no run has made a step")
        return ""
    groups = _groups(names)
    drawn = {title: _charts(contents, group) for title, group in groups.items()}
    parts = [f"<h3>{title}</h3>\n{charts}" for title, charts in drawn.items() if charts]
    return "\n".join([_explanation(contents), overview.legend(contents), *parts])


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns by the heading that they stand under."""
    probes = [name for name in names if name in PROBES or name.startswith("cosine_")]
    placed = {"loss", *probes, *OPTIMISER, *SPEED}
    return {
        "Loss and its parts": [
            *(name for name in names if name == "loss"),
            *(name for name in names if name not in placed),
        ],
        "Probes while training": probes,
        "Optimiser": [name for name in OPTIMISER if name in names],
        "Speed": [name for name in SPEED if name in names],
    }


def _charts(contents: Contents, names: Sequence[str]) -> str:
    """Return the charts of a group; what would be too many is told."""
    room = MOST_CHARTS - len(contents.charts)
    if len(names) > room:
        contents.miss(f"{len(names) - room} further columns of metrics.jsonl")
        names = names[:room]
    contents.charts += names
    charts = "\n".join(_chart(contents.runs, name) for name in names)
    return f'<div class="charts">\n{charts}\n</div>' if charts else ""


def _chart(runs: Sequence[ReportedRun], name: str) -> str:
    title = TITLES.get(name) or _title(name)
    having = [run for run in runs if name in run.curves.columns]
    series = [Series(run.number - 1, run.curves.columns[name]) for run in having]
    logarithmic = name not in (*STEADY, *SPEED) and line_chart.is_logarithmic(series)
    svg = line_chart.draw(
        title, series, last_step(list(runs)), noisy=name not in STEADY, logarithmic=logarithmic
    )
    told = [*(["logarithmic axis"] if logarithmic else []), *_notes(having, name)]
    notes = "".join(f'<p class="muted">{escape(note)}</p>' for note in told)
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{svg}{notes}</figure>'


def _title(name: str) -> str:
    for begin, words in BEGINNINGS.items():
        if name.startswith(begin):
            return words + name.removeprefix(begin)
    return name


def _notes(having: Sequence[ReportedRun], name: str) -> list[str]:
    """Count the rows of each run that a chart can only mark."""
    bad = {run.number: run.curves.columns[name].nonfinite for run in having}
    told = [
        f"run {number}: {count:,} row{'s' * (count > 1)}" for number, count in bad.items() if count
    ]
    return [f"\u00d7 not finite, {'; '.join(told)}"] if told else []


def _explanation(contents: Contents) -> str:
    """Say how the charts are to be read."""
    words = [
        "Across: the step. A thin line has every step, a thick one of the same run is its "
        "running mean over a thirtieth of the run."
    ]
    if len({run.facts["recipe"] for run in contents.runs}) > 1:
        words.append("Losses of different recipes have different scales.")
    thinned = max(
        (curve.bucket for run in contents.runs for curve in run.curves.columns.values()), default=1
    )
    if thinned > 1:
        words.append(
            f"Curves of more than {POINTS:,} rows keep the first, least, greatest and last of up "
            f"to {thinned:,} steps, so that every spike is there."
        )
    if any(curve.nonfinite for run in contents.runs for curve in run.curves.columns.values()):
        words.append("A cross above a chart is a step whose value is not finite.")
    for run in contents.runs:
        left_out = (run.curves.last or {}).get("skipped", 0)
        if left_out:
            words.append(f"Run {run.number} left out {left_out:,.0f} steps (--skip-nonfinite).")
        if run.curves.rewritten:
            words.append(
                f"Run {run.number} has {run.curves.rewritten:,} rows of steps that it had made "
                "before; the later ones are shown."
            )
    return f'<p class="muted">{escape(" ".join(words))}</p>'
