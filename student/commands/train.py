"""`student train` trains a student by a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from featcache.console import config_file
from featcache.console.params import (
    BATCH,
    COUNT,
    SEED,
    THREADS,
    FiniteRange,
    FloatPair,
    LocalPath,
    LocalText,
    images_variable,
)
from featcache.errors import UsageError
from student.setup.console import Console

if TYPE_CHECKING:
    from accelerate import Accelerator

    from student.data.loader import Loader
    from student.training.train import Run


def _settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the recipe, from --config and --set."""
    from student.setup.file_settings import merged_values

    return merged_values(_load_recipe(given["recipe_name"])[1].Config, given)


@config_file.accepts(
    settings=_settings,
    own_code={
        "recipe_name": lambda name: not name.endswith(".py"),
        "teacher_name": config_file.is_registered,
    },
    rivals={"epochs": "steps", "steps": "epochs"},
    also_settings=("epochs",),
)
@click.command(
    epilog="\b\nExamples:\n  student train --recipe mralign --cache caches/clip-b16-1a2b3c4d "
    "--batch-size 256\n"
    "  student train --recipe maskalign --images train/ --set encoder=small "
    "--set drop_path=0 --out runs/small\n"
    "  accelerate launch -m student train --recipe mralign --cache CACHE --out RUN --resume\n"
    "  student train --config run.yaml --seed 1"
)
@click.option(
    "--recipe",
    "recipe_name",
    type=LocalText(),
    help="A name from `student recipes`, or the path of your own .py file.",
)
@click.option(
    "--cache",
    type=LocalPath(),
    help="Cache folder. [default: the one in $FEATCACHE_HOME that serves]",
)
@click.option(
    "--images",
    type=LocalText(),
    help="Training pictures. [default: $FEATCACHE_IMAGES, then the cache's]",
)
@click.option("--out", type=LocalPath(), help="Run folder. [default: runs/RECIPE-sSEED]")
@click.option("--epochs", type=COUNT, help="Passes over the pictures. [default: the recipe's]")
@click.option(
    "--steps",
    type=click.IntRange(0, 10**12),
    help="Optimiser steps in place of epochs; 0 writes the untrained student.",
)
@click.option(
    "--batch-size",
    type=BATCH,
    help="Pictures, per process. [default: 64, or all if fewer; with --resume what keeps the "
    "run's global batch]",
)
@click.option(
    "--accumulate",
    type=BATCH,
    default=1,
    show_default=True,
    help="Batches summed up in a step.",
)
@click.option(
    "--aug-repeats",
    type=BATCH,
    default=1,
    show_default=True,
    help="Views of a picture in one step, decoded once: a batch of 64 with 4 shows 16 pictures.",
)
@click.option(
    "--sampling",
    type=click.Choice(["random", "block"]),
    default="random",
    show_default=True,
    help="block: 64 neighbours in storage stay close in time, for network disks where opening a "
    "file is dear.",
)
@click.option(
    "--resident",
    is_flag=True,
    help="Read the cache into memory first, once for all processes of a machine.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of weights, order, masks.")
@click.option(
    "--teacher",
    type=click.Choice(["cached", "online"]),
    default="cached",
    show_default=True,
    help="online: the teacher in the loop, no targets read.",
)
@click.option(
    "--fallback",
    type=click.Choice(["online"]),
    help="With --cache: the teacher for shards that are lost.",
)
@click.option(
    "--fallback-limit",
    type=FiniteRange(0, 1),
    metavar="SHARE",
    help="Share of the pictures that --fallback may be used for. [default: 0.01]",
)
@click.option(
    "--weights",
    type=LocalText(),
    help="Online, fallback or probe: the teacher's weights, FILE, tag or random:SEED.",
)
@click.option(
    "--other-weights",
    type=LocalText(),
    multiple=True,
    help="Online: those of a tokenizer or a second teacher; NAME=... for one of several.",
)
@click.option(
    "--teacher-name",
    metavar="SPEC",
    help="Online, fallback or probe: the teacher, where a cache's is a file of your own, "
    "./mine.py; a cache chooses no code and no file.",
)
@click.option(
    "--views",
    type=COUNT,
    help="Online: views a picture. [default: a fresh one each epoch]",
)
@click.option(
    "--policy",
    type=LocalText(),
    help="Online without --cache: a named view policy or a .json file. [default: default]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting; `student recipes RECIPE` lists them.",
)
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16.")
@click.option("--device", help="cpu keeps off the GPU. [default: cuda where there is one]")
@click.option(
    "--decoder",
    type=click.Choice(["pillow", "ffcv"]),
    help="ffcv: a .beton through FFCV's own decode. [default: what the cache was extracted "
    "through, else pillow]",
)
@click.option(
    "--exif",
    is_flag=True,
    help="Without a cache: turn pictures as their EXIF orientation says. With one, what the cache "
    "was extracted with is done.",
)
@click.option("--workers", type=THREADS, default=2, show_default=True, help="Decoding threads.")
@click.option(
    "--save-every",
    type=click.IntRange(1, 10**12),
    help="Steps between checkpoints. [default: an epoch]",
)
@click.option(
    "--keep-checkpoints",
    default="2",
    show_default=True,
    metavar="N|every:E",
    help="The newest N stay; every:E keeps those of every E epochs beside the newest 2, for "
    "`student eval --checkpoint`.",
)
@click.option(
    "--check-pixels",
    type=FiniteRange(0, 1),
    default=1 / 16,
    show_default="1/16",
    help="Share of views compared with what the teacher saw.",
)
@click.option(
    "--pixel-tolerance",
    type=FiniteRange(0),
    default=0.0,
    show_default=True,
    help="Mean difference let pass, in levels of 255; written into the run.",
)
@click.option(
    "--scale",
    type=FloatPair(),
    help="Show only the cached views whose crop has such a share of the picture's area. [default: "
    "the recipe's, where the cache holds it]",
)
@click.option(
    "--without-view",
    type=FiniteRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of pictures that may have no such view and are left out.",
)
@click.option(
    "--decode",
    is_flag=True,
    help="Decode the pictures although the cache stores pixels (--pixels raw).",
)
@click.option(
    "--direct", is_flag=True, help="Read with O_DIRECT: the cache takes no memory from other files."
)
@click.option(
    "--verify-rows",
    type=FiniteRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of rows checked as they are read. Before that, a cache of up to 2 GiB is verified "
    "whole; of a larger one the files' existence and sizes.",
)
@click.option(
    "--read-threads",
    type=THREADS,
    help="Threads that read a batch. [default: 4, or fewer cores]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the run's newest checkpoint; start where there is no run yet, so a job "
    "can be requeued. The number of processes may change, the global batch may not.",
)
@click.option(
    "--ema",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Keep an average of the weights as well, of this decay, such as 0.9999; `student eval "
    "--ema` takes it.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="torch.compile the model, and the teacher with --teacher online: slow to begin with, then "
    "faster.",
)
@click.option(
    "--checkpoint-activations",
    is_flag=True,
    help="Compute blocks again in the backward pass: less memory, more time.",
)
@click.option(
    "--deterministic", is_flag=True, help="The same bits again on a GPU too, by slower kernels."
)
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
    help="Show metrics there as well; RUN/metrics.jsonl (json) is always written. May be "
    "given twice.",
)
@click.option(
    "--probe",
    type=LocalText(),
    help="Labelled pictures: their k-NN, linear probe, RankMe and cosine with the teacher are "
    "measured as the run goes on, of which no number changes.",
)
@click.option("--probe-every", type=COUNT, help="Epochs between probes. [default: 3 % of the time]")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be trained, with memory, time and disk; write nothing.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def command(
    recipe_name: str | None,
    as_json: bool,
    dry_run: bool,
    deterministic: bool,
    device: str | None,
    **options: Any,
) -> None:
    """Train a student by RECIPE from cached targets, or with the teacher in the loop.

    Stopped by Ctrl-C or SIGTERM it saves a checkpoint after the step in hand and exits with status
    75; --resume goes on.
    """
    from student.setup import build
    from student.setup.options import Options
    from student.training import accelerator

    name, recipe = _load_recipe(recipe_name)
    if deterministic:
        accelerator.deterministic()
    acc = accelerator.accelerator(options["precision"], device)
    options["images"] = options["images"] or images_variable()
    console = Console(acc.is_main_process, as_json)
    if not console.speaks:
        logging.getLogger("featcache").setLevel(logging.ERROR)  # notes on the pictures
    run, loader = build.build_run(name, recipe, acc, Options(**options), console.say)
    for note in build.rate_notes(run, loader):
        console.say(note)
    (_dry_run if dry_run else _train)(run, loader, acc, console)


def _load_recipe(name: str | None) -> tuple[str, ModuleType]:
    from student import recipes

    if name is None:
        raise UsageError(
            f"no recipe given: --recipe is one of {', '.join(recipes.names())}, or a .py file of "
            "your own"
        )
    return name, recipes.load(name)


def _dry_run(run: Run, loader: Loader, acc: Accelerator, console: Console) -> None:
    """Say what would be trained and what it costs; every process takes part."""
    from student.setup import build
    from student.training import accelerator, dry_run

    facts = build.run_facts(run, loader)
    with accelerator.out_of_memory_told(loader.batch_size):
        facts |= dry_run.measure(run, loader, acc)
    console.print(facts, dry_run.text(facts))


def _train(run: Run, loader: Loader, acc: Accelerator, console: Console) -> None:
    """Train, and note in the ledger how far the run came, however it ended."""
    from student.setup.run_to_end import run_to_end

    summary = run_to_end(run, loader, acc, console)
    text = f"{summary['run']}: {summary['steps']} steps done, loss {summary['loss']}"
    console.print(summary, text)
