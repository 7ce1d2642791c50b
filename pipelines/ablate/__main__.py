"""Make a table of students against each other.

    python -m pipelines.ablate models [--scale digits] [--out DIR] [--seeds 0,1,2]

Everything runs through the commands that a user has; each is printed before it runs. What is done
is skipped, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from featcache.console.command import Command, CommandList
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, Option
from featcache.console.params import Choice, LocalPath
from featcache.console.text import echo
from featcache.errors import UsageError, command_line
from featcache.storage import json_file
from pipelines import clipart
from pipelines.ablate import folder as folders
from pipelines.ablate import report, runner
from pipelines.ablate.folder import Folder
from pipelines.ablate.plan import Job, make_plan
from pipelines.ablate.scales import SCALES, Scale
from pipelines.ablate.table import Table
from pipelines.quickstart import WAITING
from pipelines.seeds import parse_seeds

TABLES = ("models", "finetune")  # each is a file beside this one, with its TABLE


class _Tables(CommandList):
    """Offers one command for each table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(TABLES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _command(name) if name in TABLES else None


@click.group(cls=_Tables, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Make a table of students against each other; the same command goes on where it stopped."""


def _command(name: str) -> click.Command:
    module = importlib.import_module(f"pipelines.ablate.{name}")
    options: list[click.Parameter] = [
        Option(
            ["--scale"],
            group=HelpGroup.INPUT,
            type=Choice(list(SCALES)),
            default="digits",
            show_default=True,
            help="Pictures, teacher and students: how large they are.",
        ),
        Option(
            ["--out"],
            group=HelpGroup.INPUT,
            type=LocalPath(),
            help="Folder of all that is made. [default: ablate/TABLE-SCALE]",
        ),
        Option(["--seeds"], group=HelpGroup.TRAINING, help="Such as 0,1. [default: the scale's]"),
        Option(
            ["--reduced"],
            group=HelpGroup.TRAINING,
            is_flag=True,
            help="A few epochs: shows that all runs, decides nothing.",
        ),
        Option(
            ["--clipart", "clipart_folder"],
            group=HelpGroup.INPUT,
            type=LocalPath(),
            default=clipart.ROOT,
            show_default=True,
            help="Where the package openclipart-png lies.",
        ),
        Option(
            ["--dry-run"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="List the jobs, and which are done.",
        ),
    ]

    def run(**given: Any) -> None:
        make_table(name, module.TABLE, **given)

    example = f"Example:\n\n  python -m pipelines.ablate {name} --scale digits --out {name}"
    summary = (module.__doc__ or "").partition("\n\n")[0].replace("The table", "Make the table")
    return Command(
        name,
        params=options,
        callback=run,
        help=summary,
        short_help=module.TITLE,
        epilog=example,
    )


def make_table(
    name: str,
    table: Table,
    *,
    scale: str,
    out: Path | None,
    seeds: str | None,
    reduced: bool,
    clipart_folder: Path,
    dry_run: bool,
) -> None:
    """Run what is not done of a table, seed by seed, and write what is known after each."""
    chosen = _scale(scale, reduced, clipart_folder)
    numbers = tuple(parse_seeds(seeds)) if seeds else chosen.seeds
    out = out or Path("ablate") / f"{name}-{scale}"
    folder = Folder(out, make_plan(table, chosen, out, numbers))
    about = {"table": name, "scale": scale, "reduced": reduced}
    if dry_run:
        folders.check(out, about)
        folder.check_unchanged()
        echo(_listing(folder))
        return
    with folders.hold(out, about) as lock:
        folder.check_unchanged()
        os.environ["FEATCACHE_HOME"] = str(out)  # frozen features and ledgers go there too
        os.environ.setdefault("OMP_WAIT_POLICY", WAITING)
        shown = ("FEATCACHE_HOME", "OMP_WAIT_POLICY")
        echo("export " + " ".join(f"{key}={command_line(os.environ[key])}" for key in shown))
        made_by = report.maker()
        for count, seed in enumerate(numbers, 1):
            runner.run_jobs(folder, [job for job in folder.jobs if job.seed == seed], lock, made_by)
            told = _write(folder, table, chosen, numbers[:count])
    echo(f"\n{told}\n{out / 'results.json'}  {out / 'results.md'}")


def _scale(name: str, reduced: bool, clipart_folder: Path) -> Scale:
    chosen = SCALES[name].reduced() if reduced else SCALES[name]
    if name == "clipart":
        return replace(chosen, given=("--clipart", str(clipart_folder)))
    if clipart_folder != clipart.ROOT:
        raise UsageError("--clipart is read at --scale clipart alone; leave one of them out")
    return chosen


def _write(folder: Folder, table: Table, scale: Scale, seeds: tuple[int, ...]) -> str:
    found = report.collect(folder, seeds)
    told = report.text(table, scale, found)
    facts = json.dumps(report.facts(table, scale, found), indent=1) + "\n"
    json_file.write_file(folder.out / "results.json", facts.encode())
    json_file.write_file(folder.out / "results.md", told.encode())
    return told


def _listing(folder: Folder) -> str:
    done = {job.name for job in folder.jobs if folder.result(job) is not None}
    lines = [_line(job, job.name in done) for job in folder.jobs]
    return "\n".join([*lines, f"{len(done)} of {len(lines)} done, {runner.told_eta(folder)}"])


def _line(job: Job, is_done: bool) -> str:
    return f"{'done' if is_done else 'to do'}\t{command_line('python', '-m', *job.words)}"


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
