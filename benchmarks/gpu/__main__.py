"""The command: `python -m benchmarks.gpu`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from benchmarks import _commit, command_options
from benchmarks.gpu import results as kept
from benchmarks.gpu import runner
from benchmarks.gpu.plan import PLAN, REAL, TRIAL, Measurement
from benchmarks.gpu.results import DONE, NOT_RUN, Entry, Results
from benchmarks.gpu.worker import WorkerOptions
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import UsageError, UserError, near

LOG = "log.txt"
RESERVE_S = 5  # to end the process and to write


@click.command(
    cls=Command,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
    epilog="\b\nExamples:\n"
    "  python -m benchmarks.gpu --minutes 4 --out results\n"
    "  python -m benchmarks.gpu --minutes 10 --out results --only kernels,memory --again\n"
    "  python -m benchmarks.gpu --trial --out trial",
)
@option(
    "--minutes",
    group=HelpGroup.RUNNING,
    type=click.FloatRange(0.1, 10_000),
    default=4.0,
    show_default=True,
    help="In all.",
)
@option(
    "--out",
    group=HelpGroup.REPORT,
    type=command_options.WorkFolder(),
    help="Folder of results.json, results.md and log.txt; what it holds is not measured again.",
)
@option(
    "--only",
    group=HelpGroup.INPUT,
    help="Names of measurements, with commas, in this order.",
)
@option(
    "--again",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Measure what has been measured too.",
)
@option(
    "--trial",
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Tiny models, on a CPU too: tries the program.",
)
@option(
    "--list",
    "listed",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="List the measurements, and end.",
)
@option(
    "--device",
    group=HelpGroup.RUNNING,
    help="cuda, cuda:1, ...  [default: cuda; with --trial where there is one]",
)
@option(
    "--workers",
    group=HelpGroup.RUNNING,
    type=click.IntRange(1, 4096),
    help="Decoding threads. [default: cores]",
)
@option(
    "--folder",
    group=HelpGroup.REPORT,
    type=command_options.WorkFolder(),
    help="Where pictures and caches are made and kept.  [default: a temporary one]",
)
@option(
    "--commit",
    group=HelpGroup.REPORT,
    help="Of this code, where no repository tells it.",
)
def cli(
    minutes: float,
    out: Path | None,
    only: str | None,
    again: bool,
    trial: bool,
    listed: bool,
    device: str | None,
    workers: int | None,
    folder: Path | None,
    commit: str | None,
) -> None:
    """Measure what only a GPU can show, most valuable first, in the minutes that there are.

    Each measurement has a time box. What does not fit is a row "not run"; the same command again
    takes up what is missing.
    """
    begun = time.monotonic()
    if listed:
        click.echo("\n".join(f"{each.name:14}{each.title}" for each in PLAN))
        return
    if out is None:
        raise UsageError("--out is needed: a folder for the results, or --list")
    sizes: Literal["real", "trial"] = "trial" if trial else "real"
    results, chosen = kept.load(out, sizes), _chosen(only)
    todo = chosen if again else _missing(chosen, results)
    if not todo:
        click.echo(f"all is measured: {out / kept.MARKDOWN}; --again measures it anew")
        return
    out.mkdir(parents=True, exist_ok=True)
    _check_log(out / LOG)
    until = begun + 60 * minutes - RESERVE_S
    if trial:  # time boxes are those of a GPU, and a CPU may have other work
        todo = [replace(each, box_s=round(60 * minutes)) for each in todo]
    with _made(folder) as shared:
        options = WorkerOptions(
            shared,
            (out / LOG).resolve(),
            device or (None if trial else "cuda"),
            TRIAL if trial else REAL,
            workers or len(os.sched_getaffinity(0)),
        )
        _measure(todo, results, out, options, until, commit or _commit())
    click.echo(f"\n{kept.markdown(results)}\n{out / kept.JSON}  {out / kept.MARKDOWN}")
    missing = [each.name for each in chosen if results.measurements[each.name].status != DONE]
    if missing:
        click.echo(f"missing: {', '.join(missing)}; the same command takes them up")
    if any(results.measurements[name].status not in (DONE, NOT_RUN) for name in missing):
        sys.exit(1)


def _measure(
    todo: Sequence[Measurement],
    results: Results,
    out: Path,
    options: WorkerOptions,
    until: float,
    commit: str,
) -> None:
    """Run what is to be done, and save after every row."""
    with runner.closing_worker(options) as own:
        kept.check_machine(results, own.machine["machine"])
        results.machine, results.versions = own.machine["machine"], own.machine["versions"]
        results.commit, results.settings = commit, options.sizes.describe()
        click.echo(kept.machine_line(results))

        def keep(name: str, entry: Entry) -> None:
            if entry.status == NOT_RUN and name in results.measurements:
                return  # what is there says more
            entry.commit = commit
            results.measurements[name] = entry
            order = {each.name: number for number, each in enumerate(PLAN)}
            results.measurements = dict(
                sorted(
                    results.measurements.items(), key=lambda item: order.get(item[0], len(order))
                )
            )
            kept.save(out, results)

        runner.run(todo, own, until, keep, lambda line: click.echo(line))


def _check_log(log: Path) -> None:
    """Refuse to write through a link, or into what is no file."""
    if log.is_symlink() or (log.exists() and not log.is_file()):
        raise UserError(f"{str(log)!r} is a link, or no file: remove it, or give another --out")


def _chosen(only: str | None) -> list[Measurement]:
    if only is None:
        return list(PLAN)
    known = {each.name: each for each in PLAN}
    for name in only.split(","):
        if name not in known:
            raise UsageError(f"--only: unknown {name!r}; {near(name, known)}")
    return [known[name] for name in only.split(",")]


def _missing(chosen: Sequence[Measurement], results: Results) -> list[Measurement]:
    """Return what is not done: first what has never been tried, then what failed or was ended."""
    before = {name: entry.status for name, entry in results.measurements.items()}
    left = [each for each in chosen if before.get(each.name) != DONE]
    return sorted(left, key=lambda each: before.get(each.name, NOT_RUN) != NOT_RUN)


@contextlib.contextmanager
def _made(folder: Path | None) -> Iterator[Path]:
    """Yield the folder that was named, which stays, or a temporary one, which does not."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    temporary = Path(tempfile.mkdtemp(prefix="featcache-gpu-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    entry(cli)
