"""A report of runs is one HTML page that opens from disk: no script, no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.drawing import page
from featcache.errors import UsageError, UserError, counted
from featcache.pictures.open_source import open_source
from featcache.pictures.regular_file import open_regular
from featcache.reading.cache import Cache
from featcache.storage import json_file
from featcache.views.policy import Policy, policy_from_dict
from student.reporting import comparison, reported_run, shown_views
from student.reporting.contents import Contents
from student.reporting.reported_run import ReportedRun
from student.reporting.sections import (
    alignment,
    attention,
    costs,
    curves,
    features,
    line_chart,
    masks,
    overview,
    reconstructions,
    scores,
    settings,
)
from student.reporting.shown_views import ShownViews

MARK = b"<!-- student report -->\n"  # a file that begins so is ours to replace
SECTIONS = (
    ("runs", "Runs", overview.section),
    ("curves", "Curves", curves.section),
    ("scores", "Scores", scores.section),
    ("settings", "Settings", settings.section),
    ("costs", "Costs", costs.section),
    ("alignment", "Alignment matrix W", alignment.section),
    ("attention", "Attention", attention.section),
    ("features", "Features as colours", features.section),
    ("masks", "Masks", masks.section),
    ("reconstructions", "Reconstructions", reconstructions.section),
)
STYLE = """
.charts {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr));
}
.chart figcaption { color: var(--ink); font-weight: 600; }
.chart p { font-size: .85rem; margin: 0; }
.chart svg { width: 100%; }
.legend {
  position: sticky; top: 0; background: var(--paper); padding: .3rem 0; font-size: .85rem;
  display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
}
.sample { vertical-align: middle; min-width: 48px; }
.runs td { white-space: nowrap; }
.figures { gap: .8rem; }
.figures figure { width: min(10.5rem, calc(50% - .4rem)); }
.figures img { width: 100%; }
.matrices { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.matrices > div { max-width: 100%; }
.matrix td, .matrix th { padding: .2rem .5rem; text-align: right; border: 0; }
.scores td { vertical-align: middle; white-space: nowrap; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Request:
    """Holds what a report is asked to show."""

    runs: Sequence[Path]
    cache: Path | None = None
    images: str | None = None
    count: int = 4
    seed: int = 0


def check_target(out: Path) -> None:
    """Raise UsageError where a page at `out` would replace what is no report."""
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise UsageError(f"--out {str(out)!r} is no plain file; give the name of a new one")
    if not out.parent.is_dir():
        raise UsageError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}; make it")
    if not out.exists():
        return
    try:
        with os.fdopen(open_regular(out), "rb") as file:
            begin = file.read(len(MARK))
    except OSError as error:
        raise UserError(f"--out {str(out)!r}: {error.strerror}; give another name") from error
    if begin != MARK:
        raise UsageError(
            f"--out {str(out)!r} is there, and is no report; only a report is replaced by a new "
            "one: give another name, or move the file away"
        )


def write(request: Request, out: Path) -> dict[str, Any]:
    """Write the page of a request to `out`; return its facts. Raises UserError where a run, the
    cache or the pictures cannot be used."""
    check_target(out)
    contents = read(request)
    bodies = [(name, title, make(contents)) for name, title, make in SECTIONS]
    data = MARK + render(contents, bodies).encode()
    json_file.write_file(out, data)
    judged = comparison.plain(contents.judged)
    return {
        "out": str(out),
        "bytes": len(data),
        "runs": [run.facts for run in contents.runs],
        **{name: judged[name] for name in ("ablation", "verdict", "settings", "held", "told")},
        "scores": judged["scores"],
        "sections": [name for name, _, body in bodies if body],
        "charts": contents.charts,
        "pictures": contents.views.keys if contents.views else [],
        "missing": contents.all_missing,
    }


def read(request: Request) -> Contents:
    """Read the runs, and choose the views that are shown."""
    if len(request.runs) > line_chart.MOST_RUNS:
        raise UsageError(
            f"{counted(len(request.runs), 'run')} given; up to {line_chart.MOST_RUNS} "
            "can be told apart in a "
            "chart: leave some out"
        )
    runs = [reported_run.read(number, run) for number, run in enumerate(request.runs, 1)]
    steps = [run.facts["step"] for run in runs]
    judged = comparison.judge(request.runs, [run.record for run in runs], steps)
    contents = Contents(runs, judged)
    contents.views = _views(request, contents)
    if contents.views is not None:
        contents.views.check_pixels()
    return contents


def _views(request: Request, contents: Contents) -> ShownViews | None:
    source = open_source(request.images) if request.images else None
    path = request.cache or shown_views.find_cache(_cache_ids(contents.runs))
    if path is not None:
        views = shown_views.of_cache(Cache(path), source, request.count, request.seed)
        if source is None and views.pixels(views.policy.size) is None:
            contents.miss("what students make of the views: --images SRC, the cache's pictures")
        return views
    if source is None:
        contents.miss(
            "attention, features, masks and reconstructions: --cache CACHE, and --images SRC with "
            "its pictures; --images SRC alone for students without their teacher"
        )
        return None
    policy = _policy(contents.runs)
    return shown_views.of_pictures(source, policy, request.count, request.seed)


def _cache_ids(runs: Sequence[ReportedRun]) -> list[str]:
    targets = [run.record.get("targets") for run in runs]
    found = [each.get("id") for each in targets if isinstance(each, dict)]
    return [each for each in found if isinstance(each, str) and each]


def _policy(runs: Sequence[ReportedRun]) -> Policy:
    """Return how the first run that says so drew its views."""
    for run in runs:
        targets = run.record.get("targets")
        given = targets.get("policy") if isinstance(targets, dict) else None
        if isinstance(given, dict):
            return policy_from_dict(given)
    sizes = [run.img_size for run in runs if run.img_size]
    return Policy(size=sizes[0] if sizes else Policy().size)


def render(contents: Contents, bodies: Sequence[tuple[str, str, str]]) -> str:
    """Return the page of sections: name, title and HTML each; those without HTML are left out."""
    there = [each for each in bodies if each[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in there)
    parts = [f"<nav><ul>{links}</ul></nav>", *(page.section(*each) for each in there)]
    if contents.all_missing:
        lines = "".join(f"<li>{page.escape(what)}</li>" for what in contents.all_missing)
        parts.insert(2, page.section("missing", "Not on this page", f"<ul>{lines}</ul>"))
    return page.page(_title(contents.runs), "\n".join(parts), style=STYLE)


def _title(runs: Sequence[ReportedRun]) -> str:
    names = [run.name.partition(": ")[2] for run in runs]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Report: {', '.join(names[:3])}{more}"
