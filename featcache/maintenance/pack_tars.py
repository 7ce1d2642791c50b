"""Pictures are packed into webdataset tar shards, in a seeded shuffled order.

A shard holds KEY.EXT with the picture's own bytes and, where the source is labelled, KEY.cls with
the class as a decimal number. The names of the classes go to OUT/classes.json. The same pictures
give the same bytes: times and owners are fixed, the order is a function of seed and number of
pictures.

Shards grow in a hidden folder of OUT and are moved out of it, synced, when the last one is whole: a
run that fails leaves no shard behind, and one that is killed leaves only that folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from webdataset import TarWriter

from featcache import rng
from featcache.errors import UsageError, UserError, counted
from featcache.maintenance.packing import check_resize, classes_json, read_ahead, reading_threads
from featcache.pictures.picture_bytes import read_picture
from featcache.pictures.source import Source
from featcache.pictures.tars import escape
from featcache.storage.json_file import write_file

PREFIX = "pictures"
_MOST = 10**9  # pictures of a shard
_AHEAD = 256  # pictures read (and resized) before they are written; bounds the memory
# mtime and owner would differ from run to run; a compressed tar could not be read by offset
_FIXED = {
    "mtime": 0, "user": "", "group": "", "mode": 0o644, "compress": False, "encoder": False,
    "format": "PAX_FORMAT",
}  # fmt: skip

Member = tuple[str, str, bytes]  # stem, suffix with its dot, content


def pack(
    source: Source,
    out: Path,
    shard_size: int,
    *,
    seed: int,
    resize_px: int | None = None,
    prefix: str = PREFIX,
) -> list[Path]:
    """Write the shards OUT/PREFIX-000000.tar ... and OUT/classes.json; return the shards."""
    _check(out, shard_size, resize_px, prefix)
    classes = _check_classes(source, out)
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
        write_file(out / "classes.json", classes)  # syncs the folder, and with it the shards' names
    finally:
        shutil.rmtree(work)
    return [out / name for name in names]


def _check(out: Path, shard_size: int, resize_px: int | None, prefix: str) -> None:
    """Refuse what cannot be packed before the first byte is written."""
    if not 1 <= shard_size <= _MOST:
        raise UsageError(
            f"--shard-size {shard_size}: a shard holds 1 picture or more, at most {_MOST}; "
            "give 1000"
        )
    check_resize(resize_px)
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
            f"packing into {str(out)!r}: it holds {counted(len(there), 'shard')} "
            f"already ({there[0].name} "
            "...), which are never overwritten; give another OUT or --name, or remove them"
        )


def _check_classes(source: Source, out: Path) -> bytes:
    """The content of classes.json; shards that share OUT must agree on it."""
    content = classes_json(source)
    path = out / "classes.json"
    if path.exists() and path.read_bytes() != content:
        raise UserError(
            f"packing into {str(out)!r}: its classes.json names other classes than "
            f"{source.spec!r}, so a label would mean two things; shards of one folder share their "
            "classes: give another OUT"
        )
    return content


def _write_shards(
    source: Source, work: Path, shard_size: int, seed: int, resize_px: int | None, prefix: str
) -> list[str]:
    """Write every shard into the folder `work`, synced; return their names."""
    order = rng.permutation(len(source), seed, 0).tolist()
    names = [f"{prefix}-{number:06d}.tar" for number in range(-(-len(order) // shard_size))]
    with reading_threads() as pool:
        read = partial(_members, source, source.labels, resize_px)
        samples = read_ahead(pool, read, order, _AHEAD, "packing")
        for name in names:
            _write_shard(work / name, islice(samples, shard_size))
    return names


def _members(
    source: Source, labels: npt.NDArray[np.int64] | None, resize_px: int | None, row: int
) -> list[Member]:
    """A picture, and its label where there is one."""
    stem = escape(source.keys[row])
    picture = (stem, *read_picture(source, resize_px, row))
    if labels is None:
        return [picture]
    return [picture, (stem, ".cls", str(int(labels[row])).encode())]


def _write_shard(path: Path, samples: Iterable[list[Member]]) -> None:
    with path.open("xb") as file:
        with TarWriter(file, **_FIXED) as tar:
            for members in samples:
                # one at a time: TarWriter would sort the label of a sample before its picture
                for stem, suffix, data in members:
                    tar.write({"__key__": stem, suffix.removeprefix("."): data})
        file.flush()
        os.fsync(file.fileno())
