"""Pack pictures into one FFCV `.beton`: `python -m pipelines.pack_images SRC OUT.beton`.

FFCV's own writer takes arrays and encodes them again, so that no picture would keep its pixels.
Here a grey or RGB JPEG goes in as the bytes it is (FFCV's mode `jpg`), and any other picture as its
RGB pixels (mode `raw`), which FFCV's own decoders read alike; the layout, its tables and its pages
are written by FFCV. Fields: `image`; `label`, where SRC has labels; `key`. The keys lie side by
side in pages of their own, so that a file is opened without reading pictures.

The same pictures give the same bytes: one thread writes, in an order that is a function of seed and
number of pictures.
"""

from __future__ import annotations

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.extraction.rendering import prefetch
from featcache.pictures.beton import JPG, RAW, import_ffcv, open_beton
from featcache.pictures.decode import decode
from featcache.pictures.source import PictureError, Source
from featcache.storage.json_file import sync_folder, write_file
from pipelines.pack_images import picture_of

LARGEST_PX = 65535  # FFCV keeps sides in 16 bits
_PAGE_BYTES = 8 << 20  # FFCV's own; larger where a picture does not fit
_AHEAD_BYTES = 256 << 20  # of pictures that wait for their turn
# more than a JPEG's header takes: a resized one is smaller than its pixels and this
_SPARE_BYTES = 64 << 10


class Item(NamedTuple):
    """One picture as it goes into the file."""

    mode: int  # JPG or RAW
    height: int
    width: int
    data: bytes


def pack(source: Source, out: Path, *, seed: int, resize_px: int | None = None) -> int:
    """Write OUT, and OUT.classes.json where SRC names its classes; returns how many pictures are
    stored as pixels."""
    _check(out, resize_px)
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
        raw = _write(source, work, rng.permutation(len(source), seed, 0).tolist(), resize_px)
        if source.classes is not None:
            text = json.dumps(source.classes, ensure_ascii=False, indent=0) + "\n"
            write_file(out.with_name(f"{out.name}.classes.json"), text.encode())
        work.rename(out)
        sync_folder(out.parent)
    finally:
        work.unlink(missing_ok=True)
    return raw


def _check(out: Path, resize_px: int | None) -> None:
    if out.exists():
        raise UserError(
            f"packing into {str(out)!r}: it is there already and is never overwritten; give "
            "another OUT"
        )
    if resize_px is not None and resize_px < 1:
        raise UsageError(
            f"--resize {resize_px}: the shorter side has 1 pixel or more; give 256, or leave it out"
        )


def _write(source: Source, work: Path, order: list[int], resize_px: int | None) -> int:
    """The whole file, synced; what FFCV's writer does, in one process, so that an error is an error
    and not a hang."""
    fields, labels = import_ffcv("fields"), source.labels
    columns = {"image": fields.RGBImageField(write_mode="jpg")}
    columns |= {} if labels is None else {"label": fields.IntField()}
    columns |= {"key": fields.BytesField()}
    with ThreadPoolExecutor() as pool:
        largest = max(
            _each(pool, partial(_largest_bytes, source, resize_px), order, 256, "looking")
        )
        page = max(_PAGE_BYTES, 1 << (largest - 1).bit_length())
        writer = import_ffcv("writer").DatasetWriter(
            str(work), columns, page_size=page, num_workers=1
        )
        writer.num_samples = len(order)
        writer.prepare()
        # FFCV keeps the table in shared memory for its processes; in a container /dev/shm is often
        # too small for it.
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
        table = np.zeros(len(order), writer.metadata_type)
        writer.metadata_sm = SimpleNamespace(buf=table.view(np.uint8))
        column = dict(
            zip(columns, (table[name] for name in writer.metadata_type.names), strict=True)
        )
        if labels is not None:
            column["label"][:] = labels[order]
        allocator = import_ffcv("memory_allocator").MemoryAllocator(
            str(work), writer.data_region_start, page
        )
        keys = [source.keys[row].encode() for row in order]
        items = _each(
            pool,
            partial(item, source, resize_px),
            order,
            max(2, min(256, _AHEAD_BYTES // page)),
            "packing",
        )
        writer.finalize(_write_data(allocator, column["key"], keys, column["image"], items))
    with work.open("rb") as file:
        os.fsync(file.fileno())
    # whole, before it gets its name: FFCV's writer does not look at short writes
    written = open_beton(str(work))
    assert written.keys == [source.keys[row] for row in order]
    return int((written.modes == RAW).sum())


def _each(pool: ThreadPoolExecutor, work: Any, rows: list[int], window: int, what: str) -> Any:
    """work(row) in the order of the rows, `window` at a time under way."""
    futures = prefetch(pool, work, rows, window)
    # None: on a terminal
    for _, future in tqdm(futures, total=len(rows), unit="picture", desc=what, disable=None):
        yield future.result()


def _write_data(
    allocator: Any, key_column: Any, keys: list[bytes], image_column: Any, items: Any
) -> list[Any]:
    """Keys, then pictures, into pages; returns (sample, offset, bytes) of each."""
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


# ------------------------------------------------------------ one picture


def item(source: Source, resize_px: int | None, row: int) -> Item:
    """A grey or RGB JPEG as it is, any other picture as its pixels by the one decoder."""
    _, data = picture_of(source, resize_px, row)
    try:
        with Image.open(io.BytesIO(data)) as picture:  # reads the header
            if picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB"):
                return Item(JPG, picture.height, picture.width, data)
        pixels = np.asarray(decode(data))
    except (PictureError, OSError, Image.DecompressionBombError) as error:
        raise _unusable(source, row, str(error)) from error
    return Item(RAW, len(pixels), pixels.shape[1], pixels.tobytes())


def _largest_bytes(source: Source, resize_px: int | None, row: int) -> int:
    """At most so many bytes are stored of a picture; from its header alone."""
    data = source.read(row)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            is_jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
        "pixels of pictures that are no JPEG: mend it or take it out, or pack into tars "
        "(extraction lists what it cannot read)"
    )
