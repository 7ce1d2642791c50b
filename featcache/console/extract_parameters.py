"""The parameters of `featcache extract`, which a command line and a Python call share."""

from __future__ import annotations

import os

import click

from featcache.console.params import (
    BATCH,
    COUNT,
    THREADS,
    CountOrAuto,
    FloatPair,
    LocalPath,
    LocalText,
)
from featcache.storage.store import STORES
from featcache.views import pixel_path
from featcache.views.policy import POLICIES


def parameters() -> list[click.Parameter]:
    """Return the parameters: what is extracted, from which pictures and how, and where to."""
    return [*_targets(), *_views(), *_storage(), *_pixels(), *_teacher(), *_running()]


def _targets() -> list[click.Parameter]:
    """Return the options that name teachers, pictures and levels."""
    return [
        click.Option(
            ["--teacher", "names"],
            type=LocalText(),
            multiple=True,
            help="Name, or NAME,key=value,...; `featcache teachers` lists them. "
            "Several: one pass over the same views.",
        ),
        click.Option(
            ["--for", "recipes"],
            type=LocalText(),
            metavar="RECIPE[,RECIPE]",
            help="Make what these recipes read by default, where no other option says it: "
            "--teacher, --levels, --size, --scale, --jitter. A name, or your own ./mine.py.",
        ),
        click.Option(
            ["--images", "images_spec"],
            type=LocalText(),
            help="Folder of pictures, webdataset tars or .beton. [default: $FEATCACHE_IMAGES]",
        ),
        click.Option(
            ["--out"], type=LocalPath(), help="Cache folder. [default: $FEATCACHE_HOME/TEACHER-ID]"
        ),
        click.Option(
            ["--views", "view_count"],
            type=COUNT,
            default=1,
            show_default=True,
            help="Views drawn of each picture.",
        ),
        click.Option(
            ["--levels"],
            multiple=True,
            help="Blocks to store: last:N, a list such as 8,10,12 or -1,-3 from the end, or all; "
            "TEACHER=... for one. [default: last:5]",
        ),
    ]


def _views() -> list[click.Parameter]:
    """Return the options of how views are drawn."""
    return [
        click.Option(
            ["--policy", "policy_name"],
            type=LocalText(),
            default="default",
            show_default=True,
            help=f"How views are drawn: {', '.join(POLICIES)} or a .json file.",
        ),
        click.Option(
            ["--size"], type=int, help="Pixels of a view, a side. [default: the policy's, 224]"
        ),
        click.Option(
            ["--scale"],
            type=FloatPair(),
            help="Share of the picture's area in a view. [default: the policy's, 0.2,1]",
        ),
        click.Option(
            ["--ratio"],
            type=FloatPair(),
            help="Width / height of a view. [default: the policy's, 3/4,4/3]",
        ),
        click.Option(
            ["--filter", "filter_name"],
            help="bicubic, bilinear or lanczos; area with FFCV. [default: the policy's, bicubic]",
        ),
        click.Option(
            ["--flip"],
            type=float,
            help="Probability of a mirrored view. [default: the policy's, 0.5]",
        ),
        click.Option(
            ["--jitter"],
            type=float,
            help="Largest change of brightness, contrast, saturation. [default: the policy's, 0]",
        ),
        click.Option(["--seed"], type=int, help="Seed of the views. [default: the policy's, 0]"),
    ]


def _storage() -> list[click.Parameter]:
    """Return the options of what is stored of a view."""
    return [
        click.Option(
            ["--order"],
            help="Stored mask order: attentive, topk or uniform. [default: attentive; uniform for "
            "a teacher without attention]",
        ),
        click.Option(
            ["--codec"],
            default="fp16",
            show_default=True,
            help="How features are stored: fp16, or q8, t4, t3 of 8, 4, 3 bits.",
        ),
        click.Option(
            ["--store", "store_name"],
            type=click.Choice(list(STORES)),
            default="zarr",
            show_default=True,
            help="Zarr v3 arrays, or tars.",
        ),
        click.Option(
            ["--tokens"],
            default="raster",
            show_default=True,
            help="Order of patches: raster, as in the picture; ranked, in mask order, "
            "of which the first can be read or kept.",
        ),
        click.Option(
            ["--keep"],
            help="With --tokens ranked: store only the first N patches of a view, or a share such "
            "as 0.3.",
        ),
        click.Option(
            ["--pixels"],
            type=click.Choice(["raw"]),
            help="raw: store the rendered views, so training decodes nothing.",
        ),
    ]


def _pixels() -> list[click.Parameter]:
    """Return the options of how pictures become pixels."""
    return [
        click.Option(
            ["--decoder"],
            type=click.Choice(pixel_path.DECODERS),
            default="pillow",
            show_default=True,
            help="ffcv: a .beton through FFCV's own decode and resize: other pixels than Pillow's. "
            "Training does the same.",
        ),
        click.Option(
            ["--exif"],
            is_flag=True,
            help="Turn pictures as their EXIF orientation says, which is ignored otherwise. "
            "Training does the same.",
        ),
    ]


def _teacher() -> list[click.Parameter]:
    """Return the options of how the teacher runs."""
    return [
        click.Option(
            ["--weights"],
            type=LocalText(),
            multiple=True,
            help="FILE, a tag, or random:SEED for a trial; TEACHER=... for one. "
            "[default: the pretrained ones]",
        ),
        click.Option(
            ["--precision"],
            default="fp32",
            show_default=True,
            help="Of the teacher: fp32, or autocast to bf16 or fp16, or tf32.",
        ),
        click.Option(
            ["--compile", "compiled"],
            is_flag=True,
            help="torch.compile the teacher: minutes first, then faster.",
        ),
        click.Option(
            ["--check-teacher", "labelled"],
            type=LocalText(),
            metavar="LABELLED",
            help="First a k-NN score on these labelled pictures.",
        ),
    ]


def _running() -> list[click.Parameter]:
    """Return the options of how the work is done, and of what is told."""
    return [
        click.Option(
            ["--rows-per-shard"],
            type=CountOrAuto(),
            default="auto",
            show_default=True,
            help="Pictures in a shard, the unit of resuming, sharing and repair. auto: 1024, 1 GiB "
            "or a sixteenth of all, whichever is least, but at least 64; a cache that was begun "
            "keeps its own.",
        ),
        click.Option(
            ["--batch-size"],
            type=BATCH,
            default=32,
            show_default=True,
            help="Views a teacher batch.",
        ),
        click.Option(
            ["--workers"],
            type=THREADS,
            default=os.cpu_count() or 1,
            help="Decoding threads. [default: cores]",
        ),
        click.Option(
            ["--device"], help="cpu, cuda, cuda:1, ... [default: cuda where there is one]"
        ),
        click.Option(
            ["--devices"],
            help="all, or a list such as cuda:0,cuda:1: one process each, on one cache.",
        ),
        click.Option(
            ["--shard", "share"],
            help="I/N: only shards I, I + N, ...; I counts from 0. For job arrays.",
        ),
        click.Option(
            ["--add"],
            is_flag=True,
            help="Add views, levels or a second teacher to the cache at --out.",
        ),
        click.Option(
            ["--strict"], is_flag=True, help="Stop at the first picture that cannot be used."
        ),
        click.Option(
            ["--dry-run"],
            is_flag=True,
            help="Say what would be written, whether the disk has room, and the hours by the pace "
            "of one batch; write nothing.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the summary as JSON."),
    ]
