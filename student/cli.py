"""The `student` command: train, replay, recipes, eval."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import entry
from featcache.console.params import Pair
from featcache.errors import STOPPED, StoppedError, UsageError, UserError

if TYPE_CHECKING:
    from student.training.train import Job


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="featcache")
def cli() -> None:
    """Train and evaluate students from a featcache cache, with no teacher in memory."""


def main() -> None:
    entry(cli, STOPPED)


@cli.command(
    epilog="\b\nExamples:\n  student train --recipe mralign --cache caches/clip-b16-1a2b3c4d --batch-size 256\n"
    "  student train --recipe maskalign --images train/ --set encoder=small --set drop_path=0 --out runs/small\n"
    "  accelerate launch -m student train --recipe mralign --cache CACHE --out RUN --resume"
)
@click.option("--recipe", "recipe_name", help="A name from `student recipes`, or the path of your own .py file.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Cache folder. [default: the one in $FEATCACHE_HOME that serves]"
)
@click.option("--images", help="Training pictures. [default: $FEATCACHE_IMAGES, then the cache's]")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/RECIPE-sSEED]")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the pictures. [default: the recipe's]")
@click.option(
    "--steps", type=click.IntRange(0), help="Optimiser steps in place of epochs; 0 writes the untrained student."
)
@click.option("--batch-size", type=click.IntRange(1), help="Pictures, per process. [default: 64, or all if fewer]")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches summed up in a step.")
@click.option(
    "--aug-repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Views of a picture in one step, decoded once: a batch of 64 with 4 shows 16 pictures.",
)
@click.option(
    "--sampling",
    type=click.Choice(["random", "block"]),
    default="random",
    show_default=True,
    help="block: 64 neighbours in storage stay close in time, for network disks where opening a file is dear.",
)
@click.option("--resident", is_flag=True, help="Read the cache into memory first, once for all processes of a machine.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights, order and masks.")
@click.option(
    "--teacher",
    type=click.Choice(["cached", "online"]),
    default="cached",
    show_default=True,
    help="online: the teacher in the loop, no targets read.",
)
@click.option("--fallback", type=click.Choice(["online"]), help="With --cache: the teacher for shards that are lost.")
@click.option(
    "--fallback-limit",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Share of the pictures that --fallback may be used for. [default: 0.01]",
)
@click.option("--weights", help="Online or fallback: the teacher's weights, FILE, tag or random:SEED.")
@click.option("--views", type=click.IntRange(1), help="Online: views a picture. [default: a fresh one each epoch]")
@click.option("--policy", help="Online without --cache: a named view policy or a .json file. [default: default]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="JSON of recipe settings, or a run's config.json; --set wins."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting; `student recipes RECIPE` lists them."
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--device", help="cpu keeps off the GPU. [default: cuda where there is one]")
@click.option(
    "--decoder",
    type=click.Choice(["pillow", "ffcv"]),
    help="ffcv: a .beton through FFCV's own decode. [default: what the cache was extracted through, else pillow]",
)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Decoding threads.")
@click.option("--save-every", type=click.IntRange(1), help="Steps between checkpoints. [default: an epoch]")
@click.option(
    "--check-pixels",
    type=click.FloatRange(0, 1),
    default=1 / 16,
    show_default="1/16",
    help="Share of views compared with what the teacher saw.",
)
@click.option(
    "--pixel-tolerance",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Mean difference let pass, in levels of 255; written into the run.",
)
@click.option(
    "--scale",
    type=Pair(),
    help="Show only the cached views whose crop has such a share of the picture's area. [default: the recipe's, where "
    "the cache holds it]",
)
@click.option(
    "--without-view",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of pictures that may have no such view and are left out.",
)
@click.option("--decode", is_flag=True, help="Decode the pictures although the cache stores pixels (--pixels raw).")
@click.option("--direct", is_flag=True, help="Read with O_DIRECT: the cache takes no memory from other files.")
@click.option(
    "--verify-rows",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of rows checked as they are read. Before that, a cache of up to 2 GiB is verified whole; of a larger "
    "one the files' existence and sizes.",
)
@click.option("--read-threads", type=click.IntRange(1), help="Threads that read a batch. [default: 4, or fewer cores]")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the run's newest checkpoint; start where there is no run yet, so a job can be requeued.",
)
@click.option(
    "--ema",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Keep an average of the weights as well, of this decay, such as 0.9999; `student eval --ema` takes it.",
)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the model: slow to begin with, then faster.")
@click.option(
    "--checkpoint-activations", is_flag=True, help="Compute blocks again in the backward pass: less memory, more time."
)
@click.option("--deterministic", is_flag=True, help="The same bits again on a GPU too, by slower kernels.")
@click.option(
    "--skip-nonfinite",
    type=click.IntRange(0),
    metavar="N",
    help="Leave out up to N steps whose loss is not finite. [default: the first one stops]",
)
@click.option(
    "--tracker",
    "trackers",
    type=click.Choice(["json", "tensorboard", "wandb"]),
    multiple=True,
    default=("json",),
    show_default=True,
    help="Show metrics there as well; RUN/metrics.jsonl (json) is always written. May be given twice.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be trained, with memory, time and disk; write nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def train(recipe_name: str | None, as_json: bool, dry_run: bool, deterministic: bool, **options: Any) -> None:
    """Train a student by RECIPE from cached targets, or with the teacher in the loop.

    Stopped by Ctrl-C or SIGTERM it saves a checkpoint after the step in hand and exits with status 75; --resume goes
    on.
    """
    from student import checkpoint, recipes
    from student.setup import build as jobs
    from student.setup.options import Options
    from student.training import accelerator as hardware
    from student.training import dry_run as estimate
    from student.training import preemption as stop
    from student.training import train as work

    if recipe_name is None:
        raise UsageError(f"no recipe given: --recipe is one of {', '.join(recipes.names())}, or a .py file of your own")
    recipe = recipes.load(recipe_name)
    if deterministic:
        hardware.deterministic()
    acc = hardware.accelerator(options["precision"], options.pop("device"))
    options["images"] = options["images"] or os.environ.get("FEATCACHE_IMAGES")
    job, loader = jobs.build(recipe_name, recipe, acc, Options(**options), _say if acc.is_main_process else _hush)
    facts = jobs.facts(job, loader)
    if note := jobs.warmup_note(job, loader):
        (_say if acc.is_main_process else _hush)(note)
    if dry_run:
        with hardware.out_of_memory_told(loader.batch_size):
            facts |= estimate.measure(job, loader, acc)
        if acc.is_main_process:
            click.echo(json.dumps(facts) if as_json else estimate.text(facts))
        return
    if acc.is_main_process:
        _say(
            f"{recipe_name}: {facts['pictures']} pictures, {facts['targets']}, {facts['steps']} steps of "
            f"{facts['global_batch']} -> {job.out}"
        )
    before = checkpoint.step_of(job.out)
    try:
        summary = work.train(job, loader, acc)
    except (StoppedError, KeyboardInterrupt) as stopped:
        if not acc.is_main_process:  # one process speaks
            sys.exit(STOPPED)
        _note(job, before, {"run": str(job.out), "stopped": True})
        raise stopped if isinstance(stopped, StoppedError) else stop.at_once(job.out, job.resume) from None
    except (UserError, OSError):
        if acc.is_main_process and (step := checkpoint.step_of(job.out)) != before:
            _note(job, before, {"run": str(job.out), "stopped": True})
            _say(f"note: the checkpoint of step {step} is kept; {stop.how(job.resume)}")
        raise
    if acc.is_main_process:
        _note(job, before, summary)
        text = f"{summary['run']}: {summary['steps']} steps done, loss {summary['loss']}"
        click.echo(json.dumps(summary) if as_json else text)


def _note(job: Job, before: int | None, facts: dict[str, Any]) -> None:
    """A line in the ledger, where this process brought the run further than it was `before`."""
    from featcache.catalog import home
    from student import checkpoint

    if (step := checkpoint.step_of(job.out)) != before:
        facts = {**facts, "run": str(job.out.absolute()), "step": step}
        home.note_run(command="train", recipe=job.name, cache_id=job.about.get("id"), **facts)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _hush(text: str) -> None:
    """Other processes than the first say nothing."""


@cli.command(epilog="Example:\n\n  student replay runs/mralign-s0/nonfinite/step-00000412.safetensors --precision fp32")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe_name", help="Your own .py file, where the run had one. [default: the run's recipe]")
@click.option("--precision", help="fp32, bf16 or fp16. [default: the run's]")
@click.option("--device", help="cpu, cuda, ... [default: cuda where there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def replay(file: Path, recipe_name: str | None, precision: str | None, device: str | None, as_json: bool) -> None:
    """Run a micro-batch again whose loss was not finite, with the weights it met; FILE is of RUN/nonfinite.

    Tells the loss then and now, and where it goes wrong: weights, inputs, the first module, gradients.
    """
    from featcache.runtime.device import pick_device
    from student.training import nonfinite as reproduce

    facts = reproduce.run_again(file, recipe_name, pick_device(device), precision)
    click.echo(json.dumps(facts) if as_json else reproduce.text(facts))


@cli.command(epilog="Examples:\n\n  student recipes\n\n  student recipes mralign --set encoder=large")
@click.argument("name", required=False)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Show the configuration with this change.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def recipes(name: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """The recipes, or one recipe's paper trail and its flattened configuration."""
    from student import config
    from student import recipes as known

    if name is None:
        lines = {each: (known.load(each).__doc__ or "").strip().splitlines()[0] for each in known.names()}
        click.echo(json.dumps(lines) if as_json else "\n".join(f"{each:12}{line}" for each, line in lines.items()))
        return
    module = known.load(name)
    values = config.as_dict(config.from_overrides(module.Config, settings))
    if as_json:
        click.echo(json.dumps(values))
        return
    click.echo((module.__doc__ or "").strip() + "\n")
    click.echo("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))


class _Evals(click.Group):
    """One command for each file in student/evals."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from student import evals

        return evals.names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        from student import evals

        return _eval_command(name, evals.load(name))


@cli.group("eval", cls=_Evals)
def evaluate() -> None:
    """Accuracy of frozen features on labelled pictures."""


def _eval_command(name: str, module: Any) -> click.Command:
    options = [
        click.Option([f"--{key.replace('_', '-')}"], default=default, show_default=default is not None, help=text,
                     type=int if default is None else type(default))
        for key, (default, text) in module.OPTIONS.items()
    ]  # fmt: skip
    shared = [
        click.Argument(["run"], required=False, type=click.Path(path_type=Path)),
        click.Option(["--images", "images_spec"], help="Labelled pictures: class folders, tars with .cls, or .beton."),
        click.Option(["--test", "test_spec"], help="Labelled test pictures. [default: a fifth of --images, held out]"),
        click.Option(["--teacher", "teacher_spec"], help="Evaluate a teacher in place of RUN."),
        click.Option(["--weights"], help="That teacher's weights."),
        click.Option(["--ema"], is_flag=True, help="The average of RUN's weights, which train --ema keeps."),
        click.Option(["--pool"], default="cls", show_default=True, help="cls or mean of the patch tokens."),
        click.Option(["--crop-pct"], type=click.FloatRange(0, 1, min_open=True), default=0.875, show_default=True),
        click.Option(["--embed-batch"], type=click.IntRange(1), default=64, show_default=True),
        click.Option(["--seed"], type=click.IntRange(0), default=0, show_default=True),
        click.Option(["--device"], help="cpu, cuda, ... [default: cuda where there is one]"),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON."),
    ]

    def run(**given: Any) -> None:
        _evaluate(module, name, {key: given.pop(key) for key in module.OPTIONS}, **given)

    help_text = (module.__doc__ or "").strip().splitlines()[0]
    example = f"Example:\n\n  student eval {name} runs/mralign-s0 --images train/ --test val/"
    return click.Command(name, params=[*shared, *options], callback=run, help=help_text, epilog=example)


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
    from featcache.console.text import given_images
    from featcache.pictures import open_source as images
    from featcache.runtime.device import pick_device
    from student.features import frozen

    if (run is None) == (teacher_spec is None):
        raise UsageError(f"student eval {name} takes either RUN, a run folder, or --teacher SPEC; give one of them")
    if ema and run is None:
        raise UsageError("--ema is about the weights of RUN, and --teacher is evaluated: leave one of them out")
    train = images.open_source(given_images(images_spec))
    test = images.open_source(test_spec) if test_spec else None
    net = frozen.from_run(run, pool, ema) if run else frozen.from_teacher(str(teacher_spec), weights, pool)
    if test is None:
        train, test = frozen.split(train, seed=seed)
        click.echo(f"note: no --test given; {len(test)} of {len(train) + len(test)} pictures are held out", err=True)
    bar = _EvalBar()
    result = module.evaluate(
        net, train, test, seed=seed, device=pick_device(device), batch_size_embed=embed_batch, crop_pct=crop_pct,
        progress=bar, **own,
    )  # fmt: skip
    bar.close()
    facts = {"eval": name, "of": str(run or teacher_spec), "pool": pool, **({"ema": True} if ema else {}), **result}
    if result.get("note"):
        click.echo(f"note: {result['note']}", err=True)
    click.echo(
        json.dumps(facts)
        if as_json
        else f"{name} of {facts['of']}: top-1 {result['top1']:.2f} % "
        f"({result['n_test']} test, {result['n_train']} training pictures)"
    )


class _EvalBar:
    """Progress of an evaluation at a terminal: (stage, done, total)."""

    def __init__(self) -> None:
        self.stage, self.bar = "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self.stage:
            self.close()
            self.stage = stage
            self.bar = tqdm(total=total, desc=stage, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar, self.stage = None, ""
