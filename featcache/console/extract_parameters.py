"""The parameters of `featcache extract`, which a command line and a Python call share."""

from __future__ import annotations

import os

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import (
    BATCH,
    COUNT,
    ENGINES,
    MASK_ORDERS,
    MIN_GPU,
    PRECISIONS,
    THREADS,
    TOKEN_ORDERS,
    CachePath,
    Choice,
    CountOrAuto,
    CountRange,
    FiniteRange,
    FloatPair,
    LocalText,
    PicturesText,
)
from featcache.console.picture_options import picture_options
from featcache.storage.store import STORES
from featcache.targets import codec_names
from featcache.views import pixel_path
from featcache.views.policy import AREA, POLICIES
from featcache.views.render import FILTERS


def parameters() -> list[click.Parameter]:
    """Return the parameters: what is extracted, from which pictures and how, and where to."""
    return [*_targets(), *_views(), *_storage(), *_pixels(), *_teacher(), *_running()]


def _targets() -> list[click.Parameter]:
    """Return the options that name teachers, pictures and levels."""
    return [
        Option(
            ["--teacher", "names"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            multiple=True,
            help="Name, or NAME,key=value,...; `featcache teachers` lists them; run:RUN is a run "
            "of your own. Several: one pass over the same views.",
        ),
        Option(
            ["--for", "recipes"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            metavar="RECIPE[,RECIPE]",
            help="Make what these recipes read by default, where no other option says it: "
            "--teacher, --levels, --size, --scale, --jitter. A name, or your own ./mine.py.",
        ),
        *picture_options(
            "images_spec",
            group=HelpGroup.INPUT,
            help="Folder of pictures, webdataset tars, a tar of tars, parquet or .beton; "
            "#labels=, #separator=, #label-column=, #image-column= and #image-member= may follow. "
            "[default: $FEATCACHE_IMAGES]",
        ),
        Option(
            ["--out"],
            group=HelpGroup.INPUT,
            type=CachePath(),
            help="Cache folder, or s3://, gs:// or az:// URL. [default: "
            "$FEATCACHE_HOME/TEACHER-ID]",
        ),
        Option(
            ["--views", "view_count"],
            group=HelpGroup.VIEWS,
            type=COUNT,
            default=1,
            show_default=True,
            help="Views drawn of each picture.",
        ),
        Option(
            ["--levels"],
            group=HelpGroup.STORAGE,
            multiple=True,
            help="Transformer blocks to store: last:N, a list such as 8,10,12 or -1,-3 from the "
            "end, or all; TEACHER=... for one. [default: last:5]",
        ),
    ]


def _views() -> list[click.Parameter]:
    """Return the options of how views are drawn."""
    return [
        Option(
            ["--policy", "policy_name"],
            group=HelpGroup.VIEWS,
            type=LocalText(),
            default="default",
            show_default=True,
            help=f"How views are drawn: {', '.join(POLICIES)} or a .json file.",
        ),
        Option(
            ["--size"],
            group=HelpGroup.VIEWS,
            type=int,
            help="Pixels of a view, a side. [default: the policy's, 224]",
        ),
        Option(
            ["--scale"],
            group=HelpGroup.VIEWS,
            type=FloatPair(),
            help="Share of the picture's area in a view. [default: the policy's, 0.2,1]",
        ),
        Option(
            ["--ratio"],
            group=HelpGroup.VIEWS,
            type=FloatPair(),
            help="Width / height of a view. [default: the policy's, 3/4,4/3]",
        ),
        Option(
            ["--filter", "filter_name"],
            group=HelpGroup.VIEWS,
            type=Choice([*FILTERS, AREA]),
            help="How pixels are resampled; area with FFCV alone. [default: the policy's, bicubic]",
        ),
        Option(
            ["--flip"],
            group=HelpGroup.VIEWS,
            type=float,
            help="Probability of a mirrored view. [default: the policy's, 0.5]",
        ),
        Option(
            ["--jitter"],
            group=HelpGroup.VIEWS,
            type=float,
            help="Largest change of brightness, contrast, saturation. [default: the policy's, 0]",
        ),
        Option(
            ["--seed"],
            group=HelpGroup.VIEWS,
            type=int,
            help="Seed of the views. [default: the policy's, 0]",
        ),
    ]


def _storage() -> list[click.Parameter]:
    """Return the options of what is stored of a view."""
    return [
        Option(
            ["--order"],
            group=HelpGroup.STORAGE,
            type=Choice(MASK_ORDERS),
            help="In which order patches are kept visible: attentive, drawn by the teacher's "
            "attention; topk, the most attended first; uniform, by chance. [default: attentive; "
            "uniform for a teacher without attention]",
        ),
        Option(
            ["--codec"],
            group=HelpGroup.STORAGE,
            type=Choice(codec_names.NAMES),
            default="fp16",
            show_default=True,
            help="How features are stored: fp16, or q8, t4, t3 of 8, 4, 3 bits.",
        ),
        Option(
            ["--store", "store_name"],
            group=HelpGroup.STORAGE,
            type=Choice(list(STORES)),
            default="zarr",
            show_default=True,
            help="Zarr v3 arrays, or tars.",
        ),
        Option(
            ["--tokens"],
            group=HelpGroup.STORAGE,
            type=Choice(TOKEN_ORDERS),
            default="raster",
            show_default=True,
            help="Order of patches: raster, as in the picture; ranked, in mask order, "
            "of which the first can be read or kept.",
        ),
        Option(
            ["--keep"],
            group=HelpGroup.STORAGE,
            help="With --tokens ranked: store only the first N patches of a view, or a share such "
            "as 0.3.",
        ),
        Option(
            ["--pixels"],
            group=HelpGroup.STORAGE,
            type=Choice(["raw"]),
            help="raw: store the rendered views, so training decodes nothing.",
        ),
    ]


def _pixels() -> list[click.Parameter]:
    """Return the options of how pictures become pixels."""
    return [
        Option(
            ["--decoder"],
            group=HelpGroup.VIEWS,
            type=Choice(pixel_path.DECODERS),
            default="pillow",
            show_default=True,
            help="ffcv: a .beton through FFCV's own decode and resize: other pixels than Pillow's. "
            "Training does the same.",
        ),
        Option(
            ["--exif"],
            group=HelpGroup.VIEWS,
            is_flag=True,
            help="Turn pictures as their EXIF orientation says, which is ignored otherwise. "
            "Training does the same.",
        ),
    ]


def _teacher() -> list[click.Parameter]:
    """Return the options of how the teacher runs."""
    return [
        Option(
            ["--weights"],
            group=HelpGroup.TEACHER,
            type=LocalText(),
            multiple=True,
            help="A FILE or folder of weights, a tag of open_clip's, or random:SEED for a trial; "
            "TEACHER=... for one. [default: the pretrained ones]",
        ),
        Option(
            ["--precision"],
            group=HelpGroup.TEACHER,
            type=Choice(PRECISIONS),
            default="fp32",
            show_default=True,
            help="Of the teacher: fp32, or autocast to bf16 or fp16, or tf32.",
        ),
        Option(
            ["--compile", "compiled"],
            group=HelpGroup.TEACHER,
            is_flag=True,
            help="torch.compile the teacher: minutes first, then faster.",
        ),
        Option(
            ["--check-teacher", "labelled"],
            group=HelpGroup.CHECKS,
            type=PicturesText(),
            metavar="LABELLED",
            help="First score the teacher by k-NN on these labelled pictures, and stop where it is "
            "no better than chance.",
        ),
    ]


def _running() -> list[click.Parameter]:
    """Return the options of how the work is done, and of what is told."""
    return [
        Option(
            ["--rows-per-shard"],
            group=HelpGroup.STORAGE,
            type=CountOrAuto(),
            metavar="N|auto",
            default="auto",
            show_default=True,
            help="Pictures in a shard, the unit of resuming, sharing and repair. auto: 1024, 1 GiB "
            "or a sixteenth of all, whichever is least, but at least 64; a cache that was begun "
            "keeps its own.",
        ),
        Option(
            ["--batch-size"],
            group=HelpGroup.RUNNING,
            type=BATCH,
            default=32,
            show_default=True,
            help="Views in one batch of the teacher.",
        ),
        Option(
            ["--workers"],
            group=HelpGroup.RUNNING,
            type=THREADS,
            default=os.cpu_count() or 1,
            help="Decoding threads of each process. [default: cores]",
        ),
        Option(
            ["--device"],
            group=HelpGroup.RUNNING,
            help="cpu, cuda, cuda:1, ... [default: cuda where there is one]",
        ),
        Option(
            ["--devices"],
            group=HelpGroup.SHARING,
            help="all, or a list such as cuda:0,cuda:1: one process each, on one cache.",
        ),
        Option(
            ["--shard", "share"],
            group=HelpGroup.SHARING,
            help="I/N: only shards I, I + N, ...; I counts from 0. For job arrays.",
        ),
        Option(
            ["--engine"],
            group=HelpGroup.SHARING,
            type=Choice(ENGINES),
            default="local",
            show_default=True,
            help="What makes the shards: local, this machine; ray, actors of a Ray cluster.",
        ),
        Option(
            ["--address"],
            group=HelpGroup.SHARING,
            help="With --engine ray: the cluster, auto, HOST:PORT or ray://HOST:PORT. [default: "
            "$RAY_ADDRESS, else one is started on this machine]",
        ),
        Option(
            ["--actors"],
            group=HelpGroup.SHARING,
            type=CountRange(),
            metavar="MIN:MAX",
            help="With --engine ray: how many actors are waited for, and how many there may be. "
            "[default: 1, and as many as there is room for]",
        ),
        Option(
            ["--gpus-per-actor"],
            group=HelpGroup.SHARING,
            type=FiniteRange(MIN_GPU, 1),
            help="With --engine ray: GPUs that each actor asks for. [default: 1 where the cluster "
            "has GPUs]",
        ),
        Option(
            ["--add"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="Add views, levels or a second teacher to the cache at --out.",
        ),
        Option(
            ["--append"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="Append the pictures of --images to the cache at --out; all else is as there.",
        ),
        Option(
            ["--strict"],
            group=HelpGroup.CHECKS,
            is_flag=True,
            help="Stop at the first picture that cannot be used.",
        ),
        Option(
            ["--dry-run"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Say what would be written, whether the disk has room, and the hours by the pace "
            "of one batch; write nothing.",
        ),
        Option(
            ["--json", "as_json"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Print the summary as JSON.",
        ),
    ]
