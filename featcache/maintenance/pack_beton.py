"""Pictures are packed into one FFCV `.beton`, in a seeded shuffled order.

FFCV's own writer takes arrays and encodes them again, so that no picture would keep its pixels.
Here a grey or RGB JPEG goes in as the bytes it is (FFCV's mode `jpg`), and any other picture as its
RGB pixels (mode `raw`), which FFCV's own decoders read alike; the layout, its tables and its pages
are written by FFCV. Fields: `image`; `label`, where SRC has labels; `key`. The keys lie side by
side in pages of their own, so that a file is opened without reading pictures.

The same pictures give the same bytes: one thread writes, in an order that is a function of seed and
number of pictures.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from featcache import rng
from featcache.errors import UserError, counted
from featcache.maintenance.packing import check_resize, classes_json, read_ahead, reading_threads
from featcache.pictures.beton import JPG, RAW, import_ffcv, open_beton
from featcache.pictures.decode import decode, opened, orientation
from featcache.pictures.picture_bytes import read_picture
from featcache.pictures.source import PictureError, Source
from featcache.storage.json_file import sync_folder, write_file

_LOG = logging.getLogger(__name__)
LARGEST_PX = 65535  # FFCV keeps sides in 16 bits
_PAGE_BYTES = 8 << 20  # FFCV's own; larger where a picture does not fit
_AHEAD = 256  # pictures read before they are written, and at most so many bytes of them
_AHEAD_BYTES = 256 << 20
# more than a JPEG's header takes: a resized one is smaller than its pixels and this
_SPARE_BYTES = 64 << 10


class Item(NamedTuple):
    """One picture as it goes into the file."""

    mode: int  # JPG or RAW
    height: int
    width: int
    data: bytes


def pack(source: Source, out: Path, *, seed: int, resize_px: int | None = None) -> int:
    """Write OUT, and OUT.classes.json where SRC names its classes; return how many pictures are
    stored as pixels."""
    if out.exists():
        raise UserError(
            f"packing into {str(out)!r}: it is there already and is never overwritten; give "
            "another OUT"
        )
    check_resize(resize_px)
    work = out.with_name(f".{out.name}.packing")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.open("xb").close()
    except FileExistsError as error:
        raise UserError(
            f"packing into {str(out)!r}: {work.name} is there, so another run is at work or was "
            f"killed; wait for it, or remove {str(work)!r} and run again"
        ) from error
    try:
        order = rng.permutation(len(source), seed, 0).tolist()
        _write(source, work, order, resize_px)
        raw = _count_raw(source, work, order)
        if source.classes is not None:
            write_file(out.with_name(f"{out.name}.classes.json"), classes_json(source))
        work.rename(out)
        sync_folder(out.parent)
    finally:
        work.unlink(missing_ok=True)
    return raw


def _write(source: Source, work: Path, order: list[int], resize_px: int | None) -> None:
    """The whole file, synced; what FFCV's writer does, in one process, so that an error is an error
    and not a hang."""
    with reading_threads() as pool:
        sizes = read_ahead(
            pool, partial(_largest_bytes, source, resize_px), order, _AHEAD, "looking"
        )
        page = max(_PAGE_BYTES, 1 << (max(sizes) - 1).bit_length())
        writer, columns = _open_writer(work, len(order), source.labels is not None, page)
        if source.labels is not None:
            columns["label"][:] = source.labels[order]
        allocator = import_ffcv("memory_allocator").MemoryAllocator(
            str(work), writer.data_region_start, page
        )
        keys = [source.keys[row].encode() for row in order]
        window = max(2, min(_AHEAD, _AHEAD_BYTES // page))
        lost: list[int] = []
        read = partial(item, source, resize_px, lost=lost)
        items = read_ahead(pool, read, order, window, "packing")
        writer.finalize(_write_data(allocator, columns["key"], keys, columns["image"], items))
    if lost:
        _LOG.warning(
            "%s stored as pixels, without the EXIF orientation; pack into tars where it should be "
            "kept",
            counted(len(lost), "picture is", "pictures are"),
        )
    with work.open("rb") as file:
        os.fsync(file.fileno())


def _open_writer(
    work: Path, samples: int, is_labelled: bool, page_bytes: int
) -> tuple[Any, dict[str, Any]]:
    """FFCV's DatasetWriter of so many samples, and the columns of its metadata by field."""
    fields = import_ffcv("fields")
    kinds = {"image": fields.RGBImageField(write_mode="jpg")}
    kinds |= {"label": fields.IntField()} if is_labelled else {}
    kinds |= {"key": fields.BytesField()}
    writer = import_ffcv("writer").DatasetWriter(
        str(work), kinds, page_size=page_bytes, num_workers=1
    )
    writer.num_samples = samples
    writer.prepare()
    # FFCV keeps the table in shared memory for its processes; in a container /dev/shm is often too
    # small for it.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    table = np.zeros(samples, writer.metadata_type)
    writer.metadata_sm = SimpleNamespace(buf=table.view(np.uint8))
    columns = (table[name] for name in writer.metadata_type.names)
    return writer, dict(zip(kinds, columns, strict=True))


def _write_data(
    allocator: Any, key_column: Any, keys: list[bytes], image_column: Any, items: Iterable[Item]
) -> list[Any]:
    """Write keys, then pictures, into pages; return (sample, offset, bytes) of each."""
    allocator.__enter__()  # FFCV's gives nothing back
    try:
        for i, key in enumerate(keys):
            key_column["ptr"][i] = _put(allocator, i, key)
            key_column["size"][i] = len(key)
        allocator.flush_page()
        # pictures begin a page
        of_keys, allocator.allocations, allocator.my_page = allocator.allocations, [], -1
        for i, each in enumerate(items):
            for name in ("mode", "height", "width"):
                image_column[name][i] = getattr(each, name)
            image_column["data_ptr"][i] = _put(allocator, i, each.data)
        allocator.flush_page()
    finally:
        allocator.fp.close()
    return [*of_keys, *allocator.allocations]


def _put(allocator: Any, sample: int, data: bytes) -> int:
    allocator.set_current_sample(sample)
    offset, memory = allocator.malloc(len(data))
    memory[:] = np.frombuffer(data, np.uint8)
    return int(offset)


def _count_raw(source: Source, work: Path, order: list[int]) -> int:
    """Count the pictures of a written file that are pixels. Opening it checks that it is whole,
    before it gets its name: FFCV's writer does not look at short writes."""
    written = open_beton(str(work))
    assert written.keys == [source.keys[row] for row in order]
    return int((written.modes == RAW).sum())


# ------------------------------------------------------------ one picture


def item(source: Source, resize_px: int | None, row: int, lost: list[int] | None = None) -> Item:
    """Return a grey or RGB JPEG as it is, any other picture as its pixels by the one decoder; those
    whose pixels state an EXIF orientation no more are added to `lost`."""
    _, data = read_picture(source, resize_px, row)
    try:
        with opened(data) as picture:  # reads the header
            if _keeps_bytes(picture):
                return Item(JPG, picture.height, picture.width, data)
        decoded = decode(data)
    except PictureError as error:
        raise _unusable(source, row, str(error)) from error
    if lost is not None and orientation(decoded) != 1:
        lost.append(row)
    pixels = np.asarray(decoded)
    return Item(RAW, len(pixels), pixels.shape[1], pixels.tobytes())


def _keeps_bytes(picture: Image.Image) -> bool:
    """Whether FFCV's decoders give the pixels that ours gives: of grey and RGB JPEGs they do."""
    return picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB")


def _largest_bytes(source: Source, resize_px: int | None, row: int) -> int:
    """At most so many bytes are stored of a picture; from its header alone."""
    try:
        data = source.read(row)
        with opened(data) as picture:
            (width, height), is_jpeg = picture.size, _keeps_bytes(picture)
    except PictureError as error:
        raise _unusable(source, row, str(error)) from error
    if max(width, height) > LARGEST_PX:
        raise _unusable(
            source, row, f"{width} x {height} pixels, FFCV stores sides of up to {LARGEST_PX}"
        )
    scale = min(1.0, (resize_px or LARGEST_PX) / min(width, height))
    pixels = 3 * (int(width * scale) + 1) * (int(height * scale) + 1) + _SPARE_BYTES
    return len(data) if is_jpeg and scale == 1 else pixels


def _unusable(source: Source, row: int, why: str) -> UserError:
    return UserError(
        f"packing {source.keys[row]!r} of {source.spec}: {why}; a .beton holds sizes, and the "
        "pixels of pictures that are no JPEG: fix it or take it out, or pack into tars "
        "(extraction lists what it cannot read)"
    )
