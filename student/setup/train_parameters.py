"""The parameters of `student train`, which a command line and a Python call share."""

from __future__ import annotations

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import (
    BATCH,
    COUNT,
    SEED,
    THREADS,
    ByteSize,
    CachePath,
    Choice,
    FiniteRange,
    FloatPair,
    LocalPath,
    LocalText,
)
from featcache.console.picture_options import picture_options
from student.setup import content_match, report_parameters, run_parameters


def parameters() -> list[click.Parameter]:
    """Return the parameters: the recipe, what is read, how it is trained and run."""
    return [
        *_inputs(),
        *_length(),
        *_targets(),
        *_settings(),
        *_checkpoints(),
        *_views(),
        *_reading(),
        *_running(),
        *report_parameters.parameters(),
    ]


def _inputs() -> list[click.Parameter]:
    """Return the options that name recipe, cache, pictures and run folder."""
    return [
        Option(
            ["--recipe", "recipe_name"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            default="mralign",
            show_default=True,
            help="A name from `student recipes`, or the path of your own .py file.",
        ),
        Option(
            ["--cache"],
            group=HelpGroup.INPUT,
            type=CachePath(),
            help="Cache folder, or s3://, gs:// or az:// URL. [default: the one in "
            "$FEATCACHE_HOME that serves]",
        ),
        *picture_options(
            "images",
            group=HelpGroup.INPUT,
            help="Training pictures. [default: $FEATCACHE_IMAGES, then the cache's]",
        ),
        Option(
            ["--out"],
            group=HelpGroup.INPUT,
            type=LocalPath(),
            help="Run folder. [default: runs/RECIPE-sSEED]",
        ),
    ]


def _length() -> list[click.Parameter]:
    """Return the options of how long, and by which batches, is trained."""
    return [
        run_parameters.EPOCHS,
        Option(
            ["--steps"],
            group=HelpGroup.TRAINING,
            type=click.IntRange(0, 10**12),
            help="Optimiser steps in place of epochs; 0 writes the untrained student.",
        ),
        Option(
            ["--batch-size"],
            group=HelpGroup.TRAINING,
            type=BATCH,
            help="Pictures, per process. [default: 64, or all if fewer; with --resume what keeps "
            "the run's global batch]",
        ),
        run_parameters.ACCUMULATE,
        Option(
            ["--aug-repeats"],
            group=HelpGroup.TRAINING,
            type=BATCH,
            default=1,
            show_default=True,
            help="Views of a picture in one step, decoded once: a batch of 64 with 4 shows 16 "
            "pictures.",
        ),
        Option(
            ["--sampling"],
            group=HelpGroup.READING,
            type=Choice(["random", "block"]),
            help="block: 64 neighbours in storage stay close in time, for network disks where "
            "opening a file is dear. [default: random; block from an object store]",
        ),
        Option(
            ["--stage"],
            group=HelpGroup.READING,
            type=LocalPath(),
            metavar="DIR",
            help="Fetch rows from an object store ahead of the steps that read them, to a folder "
            "of a fast disk. [default: they are fetched when they are read]",
        ),
        Option(
            ["--stage-limit"],
            group=HelpGroup.READING,
            type=ByteSize(),
            help="Bytes that --stage may hold, such as 200GB, of all processes of a machine. "
            "[default: half of what is free there]",
        ),
        Option(
            ["--resident"],
            group=HelpGroup.READING,
            is_flag=True,
            help="Read the cache into memory first, once for all processes of a machine.",
        ),
        Option(
            ["--seed"],
            group=HelpGroup.TRAINING,
            type=SEED,
            default=0,
            show_default=True,
            help="Of first weights, order of pictures, and masks.",
        ),
        Option(
            ["--init"],
            group=HelpGroup.TRAINING,
            type=LocalPath(),
            metavar="RUN|FILE|DIR",
            help="A run, its encoder.safetensors, or an exported folder (timm, hf, mae) whose "
            "encoder a new run begins with; positions are resized, all else must fit.",
        ),
    ]


def _targets() -> list[click.Parameter]:
    """Return the options of where targets come from."""
    return [
        Option(
            ["--teacher"],
            group=HelpGroup.TARGETS,
            type=Choice(["cached", "online"]),
            default="cached",
            show_default=True,
            help="cached: read the targets of a cache; online: run the teacher in the loop.",
        ),
        Option(
            ["--fallback"],
            group=HelpGroup.TARGETS,
            type=Choice(["online"]),
            help="With --cache: run the teacher for shards that are lost.",
        ),
        Option(
            ["--fallback-limit"],
            group=HelpGroup.TARGETS,
            type=FiniteRange(0, 1),
            metavar="SHARE",
            help="Share of the pictures that --fallback may be used for. [default: 0.01]",
        ),
        Option(
            ["--weights"],
            group=HelpGroup.TARGETS,
            type=LocalText(),
            help="Online, fallback or probe: the teacher's weights, FILE, tag or random:SEED.",
        ),
        Option(
            ["--other-weights"],
            group=HelpGroup.TARGETS,
            type=LocalText(),
            multiple=True,
            help="Online: those of a tokenizer or a second teacher; NAME=... for one of several.",
        ),
        Option(
            ["--teacher-name"],
            group=HelpGroup.TARGETS,
            metavar="SPEC",
            help="Online, fallback or probe: the teacher, where a cache's is a file of your own, "
            "./mine.py; a cache chooses no code and no file.",
        ),
        Option(
            ["--views"],
            group=HelpGroup.TARGETS,
            type=COUNT,
            help="Online: views a picture. [default: a fresh one each epoch]",
        ),
        Option(
            ["--policy"],
            group=HelpGroup.TARGETS,
            type=LocalText(),
            help="Online without --cache: a named view policy or a .json file. [default: default]",
        ),
        Option(
            ["--size"],
            group=HelpGroup.TRAINING,
            type=COUNT,
            help="Online without --cache: pixels of a view, a side. [default: the policy's, 224]",
        ),
    ]


def _settings() -> list[click.Parameter]:
    """Return the options of settings, device and pictures."""
    return [
        Option(
            ["--set", "settings"],
            group=HelpGroup.TRAINING,
            multiple=True,
            metavar="KEY=VALUE",
            help="One setting; `student recipes RECIPE` lists them.",
        ),
        run_parameters.PRECISION,
        run_parameters.DEVICE,
        Option(
            ["--decoder"],
            group=HelpGroup.SHOWN,
            type=Choice(["pillow", "ffcv"]),
            help="ffcv: a .beton through FFCV's own decode. [default: what the cache was extracted "
            "through, else pillow]",
        ),
        Option(
            ["--exif"],
            group=HelpGroup.SHOWN,
            is_flag=True,
            help="Without a cache: turn pictures as their EXIF orientation says. With one, what "
            "the cache was extracted with is done.",
        ),
        Option(
            ["--match"],
            group=HelpGroup.SHOWN,
            type=Choice(content_match.KINDS),
            default="key",
            show_default=True,
            help="How pictures find their rows: by key (their names), or by content, the bytes of "
            "their files, where they were renamed or moved: reads each file once before training.",
        ),
        run_parameters.WORKERS,
    ]


def _checkpoints() -> list[click.Parameter]:
    """Return the options of checkpoints."""
    return [
        run_parameters.SAVE_EVERY,
        Option(
            ["--keep-checkpoints"],
            group=HelpGroup.CHECKPOINTS,
            default="2",
            show_default=True,
            metavar="N|every:E",
            help="The newest N stay; every:E keeps those of every E epochs beside the newest 2, "
            "for `student eval --checkpoint`.",
        ),
    ]


def _views() -> list[click.Parameter]:
    """Return the options of the views that are shown, and of how they are compared."""
    return [
        Option(
            ["--check-pixels"],
            group=HelpGroup.SHOWN,
            type=FiniteRange(0, 1),
            default=1 / 16,
            show_default="1/16",
            help="Share of views compared with what the teacher saw.",
        ),
        Option(
            ["--pixel-tolerance"],
            group=HelpGroup.SHOWN,
            type=FiniteRange(0),
            default=0.0,
            show_default=True,
            help="Mean difference let pass, in levels of 255; written into the run.",
        ),
        Option(
            ["--scale"],
            group=HelpGroup.SHOWN,
            type=FloatPair(),
            help="Show only the cached views whose crop has such a share of the picture's area. "
            "[default: the recipe's, where the cache holds it]",
        ),
        Option(
            ["--without-view"],
            group=HelpGroup.SHOWN,
            type=FiniteRange(0, 1),
            default=0.001,
            show_default=True,
            help="Share of pictures that may have no such view and are left out.",
        ),
    ]


def _reading() -> list[click.Parameter]:
    """Return the options of how a cache is read."""
    return [
        Option(
            ["--decode"],
            group=HelpGroup.READING,
            is_flag=True,
            help="Decode the pictures although the cache stores pixels (--pixels raw).",
        ),
        Option(
            ["--direct"],
            group=HelpGroup.READING,
            is_flag=True,
            help="Read with O_DIRECT, so that the cache pushes no other files out of memory.",
        ),
        Option(
            ["--verify-rows"],
            group=HelpGroup.READING,
            type=FiniteRange(0, 1),
            default=1.0,
            show_default=True,
            help="Share of rows checked as they are read. Before that, a cache of up to 2 GiB is "
            "verified whole; of a larger one the files' existence and sizes.",
        ),
        Option(
            ["--read-threads"],
            group=HelpGroup.READING,
            type=THREADS,
            help="Threads that read a batch. [default: 4, or fewer cores]",
        ),
    ]


def _running() -> list[click.Parameter]:
    """Return the options of how the model is run."""
    return [
        Option(
            ["--resume"],
            group=HelpGroup.CHECKPOINTS,
            is_flag=True,
            help="Go on from the run's newest checkpoint; start where there is no run yet, so a "
            "job can be requeued. The number of processes may change, the global batch may not. "
            "--resume RUN: by the options that the run was made with; those given here win.",
        ),
        Option(
            ["--ema"],
            group=HelpGroup.TRAINING,
            type=FiniteRange(0, 1, min_open=True, max_open=True),
            help="Keep an average of the weights as well, of this decay, such as 0.9999; `student "
            "eval --ema` takes it.",
        ),
        Option(
            ["--compile", "compiled"],
            group=HelpGroup.RUNNING,
            is_flag=True,
            help="torch.compile the model, and the teacher with --teacher online: slow to begin "
            "with, then faster.",
        ),
        run_parameters.CHECKPOINT_ACTIVATIONS,
        run_parameters.DETERMINISTIC,
        run_parameters.SKIP_NONFINITE,
    ]
