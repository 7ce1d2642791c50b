"""A finished table as JSON and as Markdown that is legible as text: means and spreads over seeds,
and which expected orders hold."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featcache.console.text import format_table
from featcache.errors import counted
from pipelines.ablate.folder import Folder
from pipelines.ablate.scales import Scale
from pipelines.ablate.table import Ordering, Table
from pipelines.seeds import spread

Scores = Mapping[int, Mapping[str, Mapping[str, float]]]  # seed -> row -> column -> top-1, %


def collect(folder: Folder, seeds: Sequence[int]) -> dict[str, Any]:
    """Return scores, whole results and seconds of the jobs of some seeds that are done."""
    done = [(job, folder.result(job)) for job in folder.jobs if job.seed in seeds]
    found: dict[str, Any] = {"scores": {}, "results": {}, "seconds": {}, "made_by": []}
    found["went_on"] = [job.name for job, record in done if record and record.get("went_on")]
    for job, record in done:
        if record is None:
            continue
        seconds = found["seconds"].setdefault(job.seed, {})
        what = f"{job.row} evals" if job.makes is None else job.kind
        seconds[what] = round(seconds.get(what, 0.0) + record["seconds"], 1)
        if record["made_by"] not in found["made_by"]:
            found["made_by"].append(record["made_by"])
        if job.makes is None:
            for name, value in (
                ("scores", record["result"]["top1"]),
                ("results", record["result"]),
            ):
                found[name].setdefault(job.seed, {}).setdefault(job.row, {})[job.column] = value
    return found


def facts(table: Table, scale: Scale, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that results.json holds."""
    orders = [
        {**asdict(each), "points": differences(each, found["scores"])} for each in table.orderings
    ]
    return {"title": table.title, "scale": asdict(scale), "orderings": orders, **found}


def text(table: Table, scale: Scale, found: Mapping[str, Any]) -> str:
    """Format the table, what it says of the expected orders, and where it was made."""
    scores, seconds = found["scores"], found["seconds"]
    head = ["", *(column.title for column in table.columns), "train s", "evals s"]
    cells = [head]
    for row in table.rows:
        numbers = [
            spread([rows[row.name][column.name] for rows in scores.values()], ".1f")
            for column in table.columns
        ]
        kind = f"train {row.name}" if row.recipe else "data"
        parts = [
            [each.get(name) for each in seconds.values()] for name in (kind, f"{row.name} evals")
        ]
        cells.append([row.title, *numbers, *map(_seconds, parts)])
    lines = [f"# {table.title}: {scale.what}", "", "Top-1 in per cent.", ""]
    lines += [format_table(cells, right=range(1, len(head)), markdown=True), ""]
    lines += [verdict(each, table, scores) for each in table.orderings]
    return "\n".join([*lines, "", *_footer(table, scale, found)]) + "\n"


def _seconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):,.0f}" if known else "-"


def differences(each: Ordering, scores: Scores) -> list[float]:
    """Return by how many points the expected row is above the other, one number a seed."""
    return [
        round(rows[each.higher][each.column] - rows[each.lower][each.column], 2)
        for rows in scores.values()
    ]


def verdict(each: Ordering, table: Table, scores: Scores) -> str:
    """Say in words whether an expected order holds: in all seeds, in none, or in some."""
    points = differences(each, scores)
    above = sum(value > 0 for value in points)
    column = next(column.title for column in table.columns if column.name == each.column)
    holds = {len(points): "holds", 0: "does not hold"}.get(above, "is undecided")
    seeds = f"in {above} of {len(points)} seeds" if len(points) > 1 else "of one seed"
    return (
        f"- {each.higher} above {each.lower} by {column}: {holds}, {spread(points, '+.1f')} points "
        f"({seeds}). Expected: {each.source}"
    )


def _footer(table: Table, scale: Scale, found: Mapping[str, Any]) -> list[str]:
    seeds = list(found["scores"])
    length = "reduced: too short to mean much" if scale.is_reduced else "full length"
    total = sum(value for parts in found["seconds"].values() for value in parts.values())
    settings = ", ".join(f"{key}={value}" for key, value in scale.settings.items())
    lines = [
        *table.notes,
        *_interval_note(found["results"]),
        f"Seeds {', '.join(map(str, seeds))} ({length}): the teacher "
        f"{counted(scale.teacher_epochs, 'epoch')} "
        f"with labels, every student {counted(scale.epochs, 'epoch')} of "
        f"{counted(scale.batch_size, 'picture')} a step "
        f"on {counted(scale.views, 'view')}; of each setting that a recipe has: {settings}.",
        f"{total:,.0f} s in all; {'; '.join(map(_told_maker, found['made_by']))}.",
    ]
    if found["went_on"]:
        names = ", ".join(found["went_on"])
        lines.append(f"Stopped and continued, so that only the last part was timed: {names}.")
    if len(seeds) > 1:
        lines.append("Numbers are means over the seeds, with the standard deviation of one seed.")
    return lines


def _interval_note(results: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Say how far a score is known, from the intervals of all evaluations."""
    known = [
        each["interval"] for rows in results.values() for row in rows.values()
        for each in row.values() if "interval" in each
    ]  # fmt: skip
    if not known:
        return []
    half = statistics.mean((high - low) / 2 for low, high in known)
    return [f"One score has a 95 % interval of ± {half:.1f} points on average: so few are tested."]


def _told_maker(made_by: Mapping[str, Any]) -> str:
    return (
        f"{made_by['cores']} cores ({made_by['device']}), torch {made_by['torch']}, commit "
        f"{made_by['commit'] or 'unknown'}"
    )


def maker() -> dict[str, Any]:
    """Return machine, versions and commit of what runs now, for the record of each job."""
    from student.training.run_folder import environment

    known = environment()
    return {
        "device": _processor() if known["device"] == platform.machine() else known["device"],
        "cores": os.cpu_count(),
        **{key: known[key] for key in ("python", "torch", "timm", "featcache", "commit")},
    }


def _processor() -> str:
    """The processor's own name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
