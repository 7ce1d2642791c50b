"""One chart of the curves of several runs, as inline SVG: matplotlib's, in the colours of the page.

Runs differ in colour and in dashes. A noisy curve is drawn twice: all of it, thin, and its running
mean, thick. No text but the numbers of the axes stands in a chart, since texts of a page follow its
width and those of a picture do not.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.drawing.page import escape
from student.reporting.metric_curves import F64, Curve

DASHES = ("solid", (0, (5, 1.6)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (9, 2.5)), (0, (3, 3)))
MARKS = ("", "o", "s")  # of the next six runs, and of those after them
MOST_RUNS = len(DASHES) * len(MARKS)
WIDTH_IN, HEIGHT_IN = 4.4, 2.3  # small, so that numbers can be read on a telephone
LOG_FROM = 30  # greatest over small values of a chart that has a logarithmic axis
SMOOTHED = 60  # points of a curve that gets a running mean
# matplotlib takes colours alone; these stand for the page's own
_INK, _LINE = "#010101", "#020202"
_SERIES = tuple(f"#03030{i}" for i in range(6))
_NAMES = {_INK: "var(--muted)", _LINE: "var(--line)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)
}


@dataclass(frozen=True)
class Series:
    """Holds the curve of run number `run`, from 0."""

    run: int
    curve: Curve


def draw(
    title: str,
    series: Sequence[Series],
    last_step: int,
    *,
    noisy: bool = True,
    logarithmic: bool = False,
) -> str:
    """Return the SVG of curves on axes from step 0 to `last_step`; steps whose value is not finite
    have a cross above. A curve that is not `noisy` has no running mean. `title` is for those who
    cannot see it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        EngFormatter,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        ScalarFormatter,
    )

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False, useMathText=False))
    for each in series:
        _draw_curve(axes, each, noisy)
    axes.set_xlim(0, max(last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=_LINE, linewidth=0.6)
    axes.tick_params(colors=_INK, labelsize=11, length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    return to_inline(figure, title)


def is_logarithmic(series: Sequence[Series]) -> bool:
    """Return whether values are positive, and the greatest far above nearly all: a few that are
    small do not make it so."""
    values = np.concatenate([each.curve.values[each.curve.finite] for each in series])
    if not len(values) or values.min() <= 0:
        return False
    return bool(values.max() / np.percentile(values, 5) > LOG_FROM)


def _draw_curve(axes: Any, series: Series, noisy: bool) -> None:
    curve, colour = series.curve, _SERIES[series.run % len(_SERIES)]
    finite = curve.finite
    at, values = curve.steps[finite], curve.values[finite]
    smooth = noisy and len(at) > SMOOTHED
    if smooth:
        axes.plot(at, values, color=colour, alpha=0.3, linewidth=0.7)
        at, values = running_mean(curve)
    mark = MARKS[series.run // len(DASHES) % len(MARKS)] or ("o" if len(at) <= 30 else "")
    axes.plot(
        at, values, color=colour, linewidth=1.9, linestyle=DASHES[series.run % len(DASHES)],
        marker=mark or None, markersize=3.5, markevery=max(1, len(at) // 12) if smooth else 1,
    )  # fmt: skip
    if not finite.all():
        axes.plot(
            curve.steps[~finite], np.ones((~finite).sum()), "x", color=colour, markersize=7,
            markeredgewidth=2, transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def running_mean(curve: Curve) -> tuple[Any, F64]:
    """Return steps and the mean of each row and its neighbours, a thirtieth of the run in all; of a
    curve that was thinned the rows are the first of each bucket, which are no extremes.

    >>> curve = Curve(np.arange(90), np.tile([1.0, 2.0, 3.0], 30))
    >>> running_mean(curve)[1][[0, 40]].tolist()
    [1.5, 2.0]
    """
    at = np.flatnonzero(curve.finite)
    bucket = curve.steps[at] // curve.bucket
    at = at[np.diff(bucket, prepend=-1) > 0]
    sums = np.concatenate([[0.0], np.cumsum(curve.values[at])])
    place, width = np.arange(len(at)), len(at) // 60
    first, end = np.maximum(place - width, 0), np.minimum(place + width + 1, len(at))
    return curve.steps[at], (sums[end] - sums[first]) / (end - first)


def sample(run: int) -> str:
    """Return a short line of a run's colour and dashes, for a legend."""
    dash = DASHES[run % len(DASHES)]
    dashes = "" if isinstance(dash, str) else " ".join(f"{1.9 * each:g}" for each in dash[1])
    mark = MARKS[run // len(DASHES) % len(MARKS)]
    shape = {
        "": "",
        "o": '<circle cx="24" cy="6" r="3"/>',
        "s": '<rect x="21" y="3" width="6" height="6"/>',
    }[mark]
    colour = f"var(--series-{run % len(_SERIES) + 1})"
    return (
        f'<svg class="sample" width="48" height="12" aria-hidden="true" style="fill: {colour}">'
        f'<line x1="0" y1="6" x2="48" y2="6" stroke="{colour}" stroke-width="2.4" '
        f'stroke-dasharray="{dashes}"/>{shape}</svg>'
    )


def _rounded(attribute: re.Match[str]) -> str:
    """Round the numbers of an attribute to hundredths of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def to_inline(figure: Any, title: str) -> str:
    """Return a figure as an <svg> element that takes colours and fonts of the page it stands in.
    The same figure gives the same text."""
    import matplotlib

    text = io.StringIO()
    own: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": escape(title),
        "path.simplify_threshold": 0.3,
    }
    with matplotlib.rc_context(own):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for needless in (
        r"<metadata>.*?</metadata>\s*",
        r"<defs>\s*<style.*?</style>\s*</defs>\s*",
        r"<!--.*?-->\s*",
    ):
        svg = re.sub(needless, "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([^\s\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r'(?<= )(d|x|y|transform)="[^"]+"', _rounded, svg)
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1).strip()
