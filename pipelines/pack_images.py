"""Pack pictures into webdataset tar shards, in a seeded shuffled order; or into one FFCV `.beton`
(`pack_beton`).

    python -m pipelines.pack_images SRC OUT --shard-size N
    python -m pipelines.pack_images SRC OUT.beton

SRC is whatever `pictures.open_source` opens; a shard holds KEY.EXT with the picture's own bytes
and, where the source is labelled, KEY.cls with the class as a decimal number. The names of the
classes go to OUT/classes.json. The same pictures give the same bytes: times and owners are fixed,
the order is a function of seed and number of pictures.

Shards grow in a hidden folder of OUT and are moved out of it, synced, when the last one is whole: a
run that fails leaves no shard behind, and one that is killed leaves only that folder.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
from PIL import Image
from tqdm import tqdm

from featcache import rng
from featcache.console.entry import entry
from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.pictures.folder import FolderSource
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError, Source
from featcache.pictures.tars import escape
from featcache.storage.json_file import sync_folder

# First bytes -> suffix, for pictures that come without a file name of their own (members of tars).
MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"P5": ".pgm",
    b"P6": ".ppm",
}
# every other format that we write is lossless
QUALITY = {"JPEG": {"quality": 95}, "WEBP": {"quality": 95}}
PREFIX = "pictures"
AHEAD = 256  # pictures read (and resized) before their turn; bounds the memory


def pack(
    source: Source,
    out: Path,
    shard_size: int,
    *,
    seed: int,
    resize_px: int | None = None,
    prefix: str = PREFIX,
) -> list[Path]:
    """Write the shards OUT/PREFIX-000000.tar ... and OUT/classes.json; returns the shards."""
    _check(out, shard_size, resize_px, prefix)
    classes = _classes_text(source, out)
    work = out / f".{prefix}.packing"
    try:
        work.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"packing into {str(out)!r}: {work.name} is there, so another run is at work or was "
            "killed; one run at a time may write these shards: wait for it, or remove "
            f"{str(work)!r} and run again"
        ) from error
    try:
        names = _write_shards(source, work, shard_size, seed, resize_px, prefix)
        for name in names:
            (work / name).rename(out / name)
        _write_synced(out / "classes.json", classes)
    finally:
        shutil.rmtree(work)
    return [out / name for name in names]


def _check(out: Path, shard_size: int, resize_px: int | None, prefix: str) -> None:
    """Refuse what cannot be packed before the first byte is written."""
    if shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}: a shard holds 1 picture or more; give 1000")
    if resize_px is not None and resize_px < 1:
        raise UsageError(
            f"--resize {resize_px}: the shorter side has 1 pixel or more; give 256, or leave it out"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", prefix):
        raise UsageError(
            f"--name {prefix!r}: letters, digits, '_', '-' and '.' are allowed; give a name such "
            "as train"
        )
    if out.exists() and not out.is_dir():
        raise UserError(
            f"packing into {str(out)!r}: it is a file, a folder is needed; give another OUT"
        )
    there = sorted(out.glob(f"{prefix}-*.tar"))
    if there:
        raise UserError(
            f"packing into {str(out)!r}: it holds {len(there)} shards already ({there[0].name} "
            "...), which are never overwritten; give another OUT or --name, or remove them"
        )


def _classes_text(source: Source, out: Path) -> str:
    """The JSON of the class names (null where SRC does not name them); shards that share OUT must
    agree on it."""
    text = json.dumps(source.classes, ensure_ascii=False, indent=0) + "\n"
    path = out / "classes.json"
    if path.exists() and path.read_text() != text:
        raise UserError(
            f"packing into {str(out)!r}: its classes.json names other classes than "
            f"{source.spec!r}, so a label would mean two things; shards of one folder share their "
            "classes: give another OUT"
        )
    return text


def _write_shards(
    source: Source, work: Path, shard_size: int, seed: int, resize_px: int | None, prefix: str
) -> list[str]:
    """Every shard in `work`, synced; returns their names."""
    order = rng.permutation(len(source), seed, 0).tolist()
    labels = source.labels
    names = [f"{prefix}-{number:06d}.tar" for number in range(-(-len(order) // shard_size))]
    # None: only on a terminal
    bar = tqdm(total=len(order), unit="picture", desc="packing", disable=None)
    with bar, ThreadPoolExecutor() as pool:
        pictures = _ahead(pool, partial(picture_of, source, resize_px), order)
        rows = iter(zip(order, pictures, strict=True))
        for name in names:
            with tarfile.open(work / name, "w", format=tarfile.PAX_FORMAT) as tar:
                for row, (suffix, data) in islice(rows, shard_size):
                    stem = escape(source.keys[row])
                    _add(tar, stem + suffix, data)
                    if labels is not None:
                        _add(tar, stem + ".cls", str(int(labels[row])).encode())
                    bar.update()
            _sync(work / name)
    return names


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], rows: Sequence[int]
) -> Iterator[Any]:
    """work(row) in the order of the rows, computed by threads at most AHEAD rows before its
    turn."""
    for start in range(0, len(rows), AHEAD):
        yield from pool.map(work, rows[start : start + AHEAD])


def picture_of(source: Source, resize_px: int | None, row: int) -> tuple[str, bytes]:
    """Suffix and bytes of one picture as they are packed."""
    data = source.read(row)
    suffix = (
        Path(source.files[row]).suffix.lower() if isinstance(source, FolderSource) else _sniff(data)
    )
    if resize_px is None:
        return suffix, data
    try:
        return suffix, resized(data, resize_px)
    except PictureError as error:
        raise UserError(
            f"resizing {source.keys[row]!r} of {source.spec}: {error}; every picture must decode: "
            "repair it, take it out, or pack without --resize (extraction lists what it cannot "
            "read)"
        ) from error


def _sniff(data: bytes) -> str:
    """The suffix that these bytes deserve; unknown ones stay a picture (.jpg), for extraction to
    report."""
    return next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), ".jpg")


def resized(data: bytes, shorter_px: int) -> bytes:
    """The picture with its shorter side at `shorter_px`, in its own format; the same bytes where it
    is no larger.

    Pixels go through the one decoder (no EXIF transpose, named conversions to RGB); grey stays
    grey.
    """
    picture = decode(data)
    width, height = picture.size
    scale = shorter_px / min(width, height)
    if scale >= 1:
        return data
    with Image.open(io.BytesIO(data)) as original:
        kind, grey = original.format or "PNG", original.mode == "L"
    size = (max(shorter_px, round(width * scale)), max(shorter_px, round(height * scale)))
    small = (picture.convert("L") if grey else picture).resize(size, Image.Resampling.BICUBIC)
    kind = "JPEG" if kind == "MPO" else kind  # a camera's JPEG with a second picture behind it
    encoded = io.BytesIO()
    try:
        small.save(encoded, kind, **QUALITY.get(kind, {}))
    except (KeyError, OSError) as error:
        raise PictureError(f"its format {kind} cannot be written") from error
    return encoded.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One member with nothing in its header but name and size (mode 0644, time 0, owner 0 without a
    name)."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_synced(path: Path, text: str) -> None:
    """Under a temporary name, synced, renamed; the folder is synced too, and with it the shards'
    new names."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


@click.command()
@click.argument("src")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shard-size", type=int, help="Pictures a shard; needed for tars.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the shuffled order."
)
@click.option(
    "--resize",
    "resize_px",
    type=int,
    metavar="PX",
    help="Shorter side to PX pixels; never enlarges.",
)
@click.option(
    "--name", "prefix", metavar="PREFIX", help="Shards are PREFIX-NNNNNN.tar.  [default: pictures]"
)
def cli(
    src: str,
    out: Path,
    shard_size: int | None,
    seed: int,
    resize_px: int | None,
    prefix: str | None,
) -> None:
    """Pack the pictures of SRC into webdataset tar shards in OUT, or into one FFCV file OUT.beton,
    in a seeded shuffled order.

    SRC is a folder of pictures (class folders become labels), webdataset tars or a .beton. Bytes
    are kept as they are, unless --resize makes a picture smaller: it is then re-encoded in its own
    format (JPEG and WebP at quality 95). In a .beton, pictures that are no grey or RGB JPEG are
    stored as their pixels.

    \b
    Examples:
      python -m pipelines.pack_images photos packed --shard-size 1000
      python -m pipelines.pack_images imagenet/train shards --shard-size 1000 \\
        --name train --resize 256
      python -m pipelines.pack_images 'old-{000000..000009}.tar' reshuffled \\
        --shard-size 500 --seed 1
      python -m pipelines.pack_images imagenet/train train.beton
    """
    is_beton = out.suffix == ".beton"
    _check_kind(out, shard_size, prefix, is_beton)
    source = open_source(src)
    labels = "no labels" if source.labels is None else f"{len(set(source.labels.tolist()))} classes"
    if is_beton:
        from pipelines import pack_beton

        raw = pack_beton.pack(source, out, seed=seed, resize_px=resize_px)
        click.echo(
            f"{len(source)} pictures ({labels}) in {out}: {len(source) - raw} JPEGs as they are, "
            f"{raw} as pixels"
        )
        return
    shards = pack(
        source, out, shard_size or 0, seed=seed, resize_px=resize_px, prefix=prefix or PREFIX
    )
    click.echo(
        f"{len(source)} pictures ({labels}) in {len(shards)} shards: {shards[0]} ... "
        f"{shards[-1].name}"
    )


def _check_kind(out: Path, shard_size: int | None, prefix: str | None, is_beton: bool) -> None:
    """Options that belong to tars alone."""
    if not is_beton and shard_size is None:
        raise UsageError(
            f"packing into {str(out)!r}: --shard-size N is needed for tars; give 1000, or name "
            "OUT.beton"
        )
    for option, value in {"--shard-size": shard_size, "--name": prefix}.items() if is_beton else ():
        if value is not None:
            raise UsageError(
                f"{option} {value}: {out.name} is one file without shards; leave {option} out"
            )


def main() -> None:
    entry(cli)


if __name__ == "__main__":
    main()
