"""`student eval` judges frozen features; each file of `student/evals` is a command of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from featcache.console.params import BATCH, SEED, FiniteRange, LocalPath, LocalText
from featcache.console.text import echo, first_paragraph, print_facts
from featcache.errors import UsageError

_NUMBER = click.IntRange(-(10**9), 10**9)
_KINDS: dict[type, click.ParamType] = {int: _NUMBER, type(None): _NUMBER}


class _Evals(click.Group):
    """Offers one command for each file in student/evals."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from student import evals

        return evals.names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        from student import evals

        return _eval_command(name, evals.load(name))


@click.group("eval", cls=_Evals)
def command() -> None:
    """Accuracy of frozen features on labelled pictures."""


def _eval_command(name: str, module: Any) -> click.Command:
    options = [
        click.Option(
            [f"--{key.replace('_', '-')}"],
            default=default,
            show_default=default is not None,
            help=text,
            type=_KINDS.get(type(default), type(default)),
        )
        for key, (default, text) in module.OPTIONS.items()
    ]
    shared = [
        click.Argument(["run"], required=False, type=LocalPath()),
        click.Option(
            ["--images", "images_spec"],
            type=LocalText(),
            help="Labelled pictures: class folders, tars with .cls, or .beton.",
        ),
        click.Option(
            ["--test", "test_spec"],
            type=LocalText(),
            help="Labelled test pictures. [default: a fifth of --images, held out]",
        ),
        click.Option(
            ["--teacher", "teacher_spec"],
            type=LocalText(),
            help="Evaluate a teacher in place of RUN.",
        ),
        click.Option(["--weights"], type=LocalText(), help="That teacher's weights."),
        click.Option(
            ["--ema"], is_flag=True, help="The average of RUN's weights, which train --ema keeps."
        ),
        click.Option(
            ["--pool"], default="cls", show_default=True, help="cls or mean of the patch tokens."
        ),
        click.Option(
            ["--crop-pct"],
            type=FiniteRange(0, 1, min_open=True),
            default=0.875,
            show_default=True,
        ),
        click.Option(["--embed-batch"], type=BATCH, default=64, show_default=True),
        click.Option(["--seed"], type=SEED, default=0, show_default=True),
        click.Option(["--device"], help="cpu, cuda, ... [default: cuda where there is one]"),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
    ]

    def run(**given: Any) -> None:
        _evaluate(module, name, {key: given.pop(key) for key in module.OPTIONS}, **given)

    help_text = first_paragraph(module.__doc__)
    example = f"Example:\n\n  student eval {name} runs/mralign-s0 --images train/ --test val/"
    return click.Command(
        name, params=[*shared, *options], callback=run, help=help_text, epilog=example
    )


def _evaluate(
    module: Any,
    name: str,
    own: dict[str, Any],
    *,
    run: Path | None,
    images_spec: str | None,
    test_spec: str | None,
    teacher_spec: str | None,
    weights: str | None,
    ema: bool,
    pool: str,
    crop_pct: float,
    embed_batch: int,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    from featcache.console.params import require_images
    from featcache.pictures import passed_over
    from featcache.pictures.open_source import open_source
    from featcache.runtime.device import pick_device
    from student.features import frozen
    from student.features.labels import match_notes, split_holdout

    if (run is None) == (teacher_spec is None):
        raise UsageError(
            f"student eval {name} takes either RUN, a run folder, or --teacher SPEC; give one of "
            "them"
        )
    if ema and run is None:
        raise UsageError(
            "--ema is about the weights of RUN, and --teacher is evaluated: leave one of them out"
        )
    train = open_source(require_images(images_spec))
    test = open_source(test_spec) if test_spec else None
    left_out = [row for source in (train, test) for row in passed_over.as_json(source)]
    net = (
        frozen.from_run(run, pool, ema)
        if run
        else frozen.from_teacher(str(teacher_spec), weights, pool)
    )
    if test is None:
        train, test = split_holdout(train, seed=seed)
        echo(
            f"note: no --test given; {len(test)} of {len(train) + len(test)} pictures are held out",
            err=True,
        )
    notes = match_notes(test, train)
    for note in notes:
        echo(f"note: {note}", err=True)
    with _stage_bars() as progress:
        result = module.evaluate(
            net, train, test, seed=seed, device=pick_device(device), batch_size_embed=embed_batch,
            crop_pct=crop_pct, progress=progress, **own,
        )  # fmt: skip
    facts = {
        "eval": name,
        "of": str(run or teacher_spec),
        "pool": pool,
        **({"ema": True} if ema else {}),
        **({"labels": notes} if notes else {}),
        **({"passed_over": left_out} if left_out else {}),
        **result,
    }
    if result.get("note"):
        echo(f"note: {result['note']}", err=True)
    print_facts(
        facts,
        as_json,
        f"{name} of {facts['of']}: top-1 {result['top1']:.2f} % "
        f"({result['n_test']} test, {result['n_train']} training pictures)",
    )


@contextlib.contextmanager
def _stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show each stage of an evaluation as a bar at a terminal, and nothing elsewhere."""
    from featcache.console.progress_bar import ProgressBar

    bars: dict[str, ProgressBar] = {}  # the one of the stage in hand

    def close() -> None:
        for bar in bars.values():
            bar.close()
        bars.clear()

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            close()
            bars[stage] = ProgressBar(stage, "it", lines=False)
        bars[stage](done, total)

    try:
        yield show
    finally:
        close()
