"""`featcache pack` packs pictures into webdataset tar shards, or into one FFCV `.beton`."""

from __future__ import annotations

from pathlib import Path

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import SEED, LocalPath, PicturesText
from featcache.console.text import echo
from featcache.errors import UsageError, counted
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source


@click.command(
    cls=Command,
    section=Section.MAKE,
    short_help="Pack pictures into tar shards, or into one FFCV file.",
    epilog="Examples:\n"
    "  featcache pack photos packed --shard-size 1000\n"
    "  featcache pack imagenet/train shards --shard-size 1000 \\\n"
    "    --name train --resize 256\n"
    "  featcache pack 'old-{000000..000009}.tar' reshuffled \\\n"
    "    --shard-size 500 --seed 1\n"
    "  featcache pack imagenet/train train.beton",
)
@click.argument("src", type=PicturesText())
@click.argument("out", type=LocalPath())
@option("--shard-size", group=HelpGroup.INPUT, type=int, help="Pictures a shard; needed for tars.")
@option(
    "--seed",
    group=HelpGroup.RUNNING,
    type=SEED,
    default=0,
    show_default=True,
    help="Of the shuffled order.",
)
@option(
    "--resize",
    "resize_px",
    group=HelpGroup.INPUT,
    type=int,
    metavar="PX",
    help="Shorter side to PX pixels; never enlarges.",
)
@option(
    "--name",
    "prefix",
    group=HelpGroup.INPUT,
    metavar="PREFIX",
    help="Shards are PREFIX-NNNNNN.tar.  [default: pictures]",
)
def command(
    src: str,
    out: Path,
    shard_size: int | None,
    seed: int,
    resize_px: int | None,
    prefix: str | None,
) -> None:
    """Pack the pictures of SRC into webdataset tar shards in OUT, or into one FFCV file OUT.beton,
    in a seeded shuffled order.

    SRC is what --images of extract is: a folder (class folders become labels), webdataset tars, a
    tar of tars, parquet or a .beton; parts such as #labels=FILE.csv may follow. Bytes are kept as
    they are, unless --resize makes a picture smaller: JPEG and WebP are then encoded
    again at quality 95, all else without loss. In a .beton, pictures that are no grey or RGB JPEG
    are stored as their pixels.
    """
    is_beton = out.suffix == ".beton"
    _check_options(out, shard_size, prefix, is_beton)
    source = open_source(src)
    labels = (
        "no labels"
        if source.labels is None
        else counted(len(set(source.labels.tolist())), "class", "classes")
    )
    if is_beton:
        written = _pack_beton(source, out, seed, resize_px)
    else:
        written = _pack_tars(source, out, shard_size or 0, seed, resize_px, prefix)
    echo(f"{counted(len(source), 'picture')} ({labels}) in {written}")


def _check_options(out: Path, shard_size: int | None, prefix: str | None, is_beton: bool) -> None:
    """Refuse options that belong to tars alone, and tars without the one they need."""
    if not is_beton and shard_size is None:
        raise UsageError(
            f"packing into {str(out)!r}: --shard-size N is needed for tars; give 1000, or name "
            "OUT.beton"
        )
    for name, value in {"--shard-size": shard_size, "--name": prefix}.items() if is_beton else ():
        if value is not None:
            raise UsageError(
                f"{name} {value}: {out.name} is one file without shards; leave {name} out"
            )


def _pack_beton(source: Source, out: Path, seed: int, resize_px: int | None) -> str:
    from featcache.maintenance import pack_beton  # imports torch, as pack_tars does

    raw = pack_beton.pack(source, out, seed=seed, resize_px=resize_px)
    return f"{out}: {len(source) - raw} JPEGs as they are, {raw} as pixels"


def _pack_tars(
    source: Source,
    out: Path,
    shard_size: int,
    seed: int,
    resize_px: int | None,
    prefix: str | None,
) -> str:
    from featcache.maintenance import pack_tars

    name = prefix or pack_tars.PREFIX
    shards = pack_tars.pack(source, out, shard_size, seed=seed, resize_px=resize_px, prefix=name)
    return f"{counted(len(shards), 'shard')}: {shards[0]} ... {shards[-1].name}"
