"""Options that `student eval` and `student embed` share: what is looked at, through which encoder,
and how pictures get to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import BATCH, CROP_SHARE, Choice, LocalPath, LocalText
from featcache.errors import UsageError, counted

if TYPE_CHECKING:
    from student.features.frozen import FrozenEncoder


def parameters(*, pools: bool = True) -> list[click.Parameter]:
    """Return the parameters; without `pools` there are no --pool and no --blocks, which `filled`
    then fills in."""
    pool = [
        Option(
            ["--pool"],
            group=HelpGroup.FEATURES,
            type=Choice(["cls", "mean"]),
            default="cls",
            show_default=True,
            help="The token [CLS], or the mean of the patches' tokens.",
        ),
        Option(
            ["--blocks"],
            group=HelpGroup.FEATURES,
            type=click.IntRange(1, 256),
            default=1,
            show_default=True,
            help="Pool each of the last N blocks; their features stand side by side.",
        ),
    ]
    return [
        click.Argument(["run"], required=False, type=LocalPath()),
        Option(
            ["--checkpoint"],
            group=HelpGroup.INPUT,
            type=click.IntRange(0, 10**12),
            metavar="STEP",
            help="That checkpoint of RUN. [default: the newest]",
        ),
        Option(
            ["--ema"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="The average of RUN's weights, which train --ema keeps.",
        ),
        Option(
            ["--teacher", "teacher_spec"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            help="A teacher in place of RUN, by its name; `featcache teachers` lists them.",
        ),
        Option(
            ["--weights"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            help="The teacher's weights. [default: the pretrained ones]",
        ),
        *(pool if pools else ()),
        Option(
            ["--crop-pct"],
            group=HelpGroup.FEATURES,
            type=CROP_SHARE,
            default=0.875,
            show_default=True,
            help="Share of the shorter side that the centre crop has.",
        ),
        Option(
            ["--embed-batch"],
            group=HelpGroup.RUNNING,
            type=BATCH,
            default=64,
            show_default=True,
            help="Pictures embedded at once.",
        ),
        Option(
            ["--skip-bad"],
            group=HelpGroup.FEATURES,
            type=click.IntRange(0, 10**9),
            default=0,
            show_default=True,
            help="Pictures that may be left out because they cannot be decoded.",
        ),
        Option(
            ["--keep/--no-keep"],
            group=HelpGroup.FEATURES,
            default=True,
            show_default=True,
            help="Keep features below $FEATCACHE_HOME/features for the next evaluation.",
        ),
        Option(
            ["--device"],
            group=HelpGroup.RUNNING,
            help="cpu, cuda, ... [default: cuda where there is one]",
        ),
        Option(
            ["--json", "as_json"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Print the result as JSON.",
        ),
    ]


def filled(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a command, and those that it does not have; `own` names the former."""
    absent = {"pool": "cls", "blocks": 1, "shots": None, "fraction": None}
    return {**absent, **options, "own": frozenset(options)}


def check_subject(name: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError unless one thing is evaluated, by options that are about it."""
    run, teacher = given["run"], given["teacher_spec"]
    if (run is None) == (teacher is None):
        raise UsageError(
            f"student {name} takes either RUN, a run folder, or --teacher SPEC; give one of them"
        )
    for option, value in (("--ema", given["ema"]), ("--checkpoint", given["checkpoint"])):
        if teacher is not None and value not in (False, None):
            raise UsageError(
                f"{option} is about the weights of RUN, and --teacher is evaluated: leave one of "
                "them out"
            )
    if run is not None and given["weights"]:
        raise UsageError("--weights is about --teacher, and RUN is evaluated: leave one out")


def subject_facts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run ledger says of the run, or the teacher, that is looked at."""
    run = given["run"]
    return {"of": given["teacher_spec"]} if run is None else {"of_run": str(run.absolute())}


def freeze(given: Mapping[str, Any]) -> FrozenEncoder:
    """Return the encoder of RUN, or a teacher."""
    from student.features import frozen

    if given["run"] is not None:
        return frozen.from_run(given["run"], given["ema"], given["checkpoint"])
    return frozen.from_teacher(given["teacher_spec"], given["weights"])


def check_blocks(frozen: FrozenEncoder, blocks: int) -> None:
    """Raise UsageError for more blocks than there are."""
    if blocks > frozen.depth:
        raise UsageError(
            f"--blocks {blocks}: the encoder of {frozen.name} has "
            f"{counted(frozen.depth, 'block')}; give at "
            "most that"
        )


@contextlib.contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show each stage of an evaluation as a bar at a terminal, by a line now and then elsewhere."""
    from featcache.console.progress_bar import ProgressBar

    bars: dict[str, ProgressBar] = {}  # the one of the stage in hand

    def close() -> None:
        for bar in bars.values():
            bar.close()
        bars.clear()

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            close()
            unit = stage if stage in ("epochs", "fits", "classes") else "pictures"
            bars[stage] = ProgressBar(stage, unit, first=done)  # a resumed run begins late
        bars[stage](done, total)

    try:
        yield show
    finally:
        close()
