"""Pictures of an FFCV `.beton` are read as its own bytes, for the one decoder of every source.

The layout is read by FFCV's Reader (header, field descriptors, one metadata row a sample,
allocation table), the bytes by preads. JPEGs come as they were written; pictures that are stored as
pixels (FFCV's mode `raw`) come as PPM, a header before the very same bytes. FFCV is imported when
such a file is opened, and never before.

    header | field descriptors | metadata (n rows) | pages of data ...
           | allocation table (sample, offset, bytes)

n pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError, counted, one_line
from featcache.pictures import classes
from featcache.pictures.classes import check_labels, read_classes
from featcache.pictures.regular_file import read_range
from featcache.pictures.stamps import stamp_files

I64 = npt.NDArray[np.int64]
INSTALL = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++, then pip install ffcv"
JPG, RAW = 0, 1  # ffcv.fields.rgb_image.IMAGE_MODES
_KEY_BYTES = 4096  # read at once where keys lie together
_LEAST_ROW_BYTES = 8  # of a sample: one number
_SAMPLED = 64  # pictures whose bytes go into the digest of a file without keys


def import_ffcv(name: str) -> Any:
    """Import a module of FFCV, which sets the threads of torch to one, for the whole process: they
    are set back."""
    import torch

    threads = torch.get_num_threads()
    try:
        return import_module(f"ffcv.{name}")
    except ImportError as error:
        raise UserError(
            f"FFCV's .beton files need the package ffcv, not to be had: {error}; {INSTALL}"
        ) from error
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class BetonSource:
    """Pictures of a `.beton` in its order; the int field `label` (or the only int field there is)
    holds the labels."""

    spec: str
    keys: list[str] = field(repr=False)
    ranges: I64 = field(repr=False)  # (n, 2): byte offset, bytes
    modes: npt.NDArray[np.uint8] = field(repr=False)  # (n,): JPG or RAW
    sizes: npt.NDArray[np.int32] = field(repr=False)  # (n, 2): height, width
    label_values: I64 | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        data = self.stored(index)
        if self.modes[index] == JPG:
            return data
        height, width = self.sizes[index].tolist()
        return b"P6\n%d %d\n255\n" % (width, height) + data

    def stored(self, index: int) -> bytes:
        """Read the bytes of the file: a JPEG, or the pixels, as `modes` says."""
        offset, size = self.ranges[index].tolist()
        return read_range(self.spec, offset, size)

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them."""
        ranges = self.ranges[np.asarray(rows, np.int64)]
        return stamp_files((self.keys[row] for row in rows), [self.spec], ranges)

    @cached_property
    def labels(self) -> I64 | None:
        if self.label_values is not None and self.label_values.min() < 0:
            raise UserError(
                f"labels of {self.spec}: {self.label_values.min()} is given, numbers from 0 on are "
                "allowed; write the file again"
            )
        if self.label_values is None:
            return None
        return check_labels(self.spec, self.label_values, self.classes)

    @cached_property
    def classes(self) -> list[str] | None:
        """Names of the classes, from the file of that name beside it."""
        if self.label_values is None:
            return None
        return read_classes(Path(f"{self.spec}.{classes.NAME}"))


def open_beton(spec: str) -> BetonSource:
    """Open the pictures of a `.beton`. Keys are the field `key` (bytes or JSON), or without one a
    digest of the file and the picture's number."""
    if not Path(spec).is_file():
        what = "is no regular file" if Path(spec).exists() else "does not exist"
        raise UserError(
            f"no pictures found: {spec!r} {what}; give an FFCV .beton, a folder, or webdataset tars"
        )
    reader = _reader(spec)
    names = reader.metadata.dtype.names
    columns = {
        name: reader.metadata[column] for name, column in zip(reader.handlers, names, strict=True)
    }
    image = columns[_image_field(spec, reader)]
    ranges = _ranges(spec, reader, image)
    sizes = np.stack([image["height"], image["width"]], 1).astype(np.int32)
    keys = (
        list(_keys(spec, reader, columns["key"]))
        if "key" in columns
        else _numbered(spec, reader, ranges)
    )
    if "" in keys:
        raise UserError(
            f"pictures {spec!r}: the key of picture {keys.index('')} is empty; write the file again"
        )
    return BetonSource(spec, keys, ranges, image["mode"].copy(), sizes, _labels(reader, columns))


# ------------------------------------------------------------ layout


def _reader(spec: str) -> Any:
    """FFCV's Reader of a file that is one and is whole; numpy would read less than there should be
    without a word."""
    types, size = import_ffcv("types"), Path(spec).stat().st_size
    if size < types.HeaderType.itemsize:
        raise UserError(
            f"{spec!r} is no FFCV file: it has {size} bytes; give one that FFCV's DatasetWriter "
            "wrote"
        )
    header = np.fromfile(spec, types.HeaderType, 1)[0]
    tables = types.HeaderType.itemsize + int(header["num_fields"]) * types.FieldDescType.itemsize
    if header["version"] != types.CURRENT_VERSION or not header["num_fields"]:
        raise UserError(
            f"{spec!r} is no FFCV file of version {types.CURRENT_VERSION}: it begins with version "
            f"{header['version']} and {header['num_fields']} fields; give one that FFCV's "
            "DatasetWriter wrote"
        )
    if not header["num_samples"]:
        raise UserError(
            f"no pictures found in {spec!r}: it has no samples; pack it again from pictures"
        )
    if not header["alloc_table_ptr"] or not tables <= header["alloc_table_ptr"] <= size:
        raise _cut(
            spec,
            f"{size} bytes, its table of allocations should begin at {header['alloc_table_ptr']}",
        )
    if int(header["num_samples"]) * _LEAST_ROW_BYTES > size:  # numpy would make room for them all
        raise _cut(spec, f"{size} bytes, for {counted(header['num_samples'], 'sample')}")
    reader_type = import_ffcv("reader").Reader
    try:
        with np.errstate(all="ignore"):  # sizes of arrays that nobody reads
            reader = reader_type(spec)
    except Exception as error:  # whatever FFCV raises at these bytes, the bytes are at fault
        reason = one_line(str(error))[:200] or type(error).__name__
        raise UserError(
            f"{spec!r} cannot be read as an FFCV file: {reason}; fields of FFCV's own kinds are "
            "allowed: write the file again"
        ) from error
    if len(reader.handlers) < int(header["num_fields"]):
        raise UserError(
            f"{spec!r} has two fields of one name among {', '.join(reader.handlers)[:200]}; write "
            "the file again"
        )
    if len(reader.metadata) < reader.num_samples or (size - int(header["alloc_table_ptr"])) % _item(
        reader
    ):
        raise _cut(spec, "a table of it is not whole")
    return reader


def _item(reader: Any) -> int:
    return int(reader.alloc_table.dtype.itemsize)


def _cut(spec: str, why: str) -> UserError:
    return UserError(
        f"{spec!r} is cut off, or its writer was stopped: {why}; fetch or write it again"
    )


def _image_field(spec: str, reader: Any) -> str:
    """The name of the pictures' field: `image`, or the only one of its kind."""
    kind = import_ffcv("fields").RGBImageField
    names = [name for name, handler in reader.handlers.items() if isinstance(handler, kind)]
    if len(names) == 1 or "image" in names:
        return "image" if "image" in names else names[0]
    raise UserError(
        f"pictures {spec!r}: {len(names)} of its fields {', '.join(reader.handlers)} are "
        "RGBImageFields; one, or one named image, is needed: write the file again"
    )


def _ranges(spec: str, reader: Any, image: npt.NDArray[Any]) -> I64:
    """(n, 2) offset and bytes of the pictures, found in the allocation table by offset."""
    table = reader.alloc_table[reader.alloc_table["size"] > 0]
    table = table[np.argsort(table["ptr"], kind="stable")]
    at = np.minimum(np.searchsorted(table["ptr"], image["data_ptr"]), max(len(table) - 1, 0))
    if not len(table) or (table["ptr"][at] != image["data_ptr"]).any():
        raise _cut(spec, "its table of allocations lacks pictures")
    sizes, end = table["size"][at], reader.header["alloc_table_ptr"]
    if not _lie_within(image["data_ptr"], sizes, end):
        raise _cut(spec, "pictures lie beyond its data")
    ranges = np.stack([image["data_ptr"], sizes], 1).astype(np.int64)
    pixels = image["height"].astype(np.int64) * image["width"] * 3
    for i in np.flatnonzero(
        (image["mode"] > RAW) | ((image["mode"] == RAW) & (ranges[:, 1] != pixels))
    )[:1].tolist():
        raise UserError(
            f"picture {i} of {spec!r}: mode {image['mode'][i]}, {image['height'][i]} x "
            f"{image['width'][i]} pixels and {ranges[i, 1]} bytes do not agree; write the file "
            "again"
        )
    return ranges


def _lie_within(offsets: npt.NDArray[Any], sizes: npt.NDArray[Any], end: Any) -> bool:
    """Whether all ranges (n,) of unsigned numbers end at `end` or before; sums may overflow."""
    return bool(((offsets <= end) & (sizes <= end - np.minimum(offsets, end))).all())


# ------------------------------------------------------------ keys and labels


def _keys(spec: str, reader: Any, column: npt.NDArray[Any]) -> Iterator[str]:
    """The keys in order; read in the order of the file, where ours lie side by side."""
    # By the number in the file: FFCV's reader makes a BytesField of a JSONField.
    number = reader.field_descriptors["type_id"][reader.field_names.index("key")]
    kind = import_ffcv("types").TYPE_ID_HANDLER[int(number)].__name__
    if kind not in ("BytesField", "JSONField"):
        raise UserError(
            f"pictures {spec!r}: field key is {kind}, BytesField or JSONField is allowed; write it "
            "again"
        )
    end = np.uint64(Path(spec).stat().st_size)
    if not _lie_within(column["ptr"], column["size"], end):
        raise _cut(spec, "keys lie beyond its end")
    if column["size"].astype(np.float64).sum() > end:  # forged ones may all be the same bytes
        raise UserError(f"keys of {spec!r} are longer than the file; write the file again")
    keys = [""] * len(column)
    for i, data in _spans(spec, column["ptr"].astype(np.int64), column["size"].astype(np.int64)):
        try:
            text = data.rstrip(b"\0").decode(errors="surrogateescape")
            keys[i] = str(json.loads(text)) if kind == "JSONField" else text
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"key of picture {i} of {spec!r} is no JSON: {str(error)[:100]}; write the file "
                "again"
            ) from error
    yield from keys


def _spans(spec: str, offsets: I64, sizes: I64) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each span, in the order of the file, with one pread for those that lie
    together."""
    start, window = 0, b""
    with Path(spec).open("rb", buffering=0) as file:
        for i in np.argsort(offsets, kind="stable").tolist():
            low, size = int(offsets[i]), int(sizes[i])
            if not start <= low <= low + size <= start + len(window):
                start, window = low, os.pread(file.fileno(), max(size, _KEY_BYTES), low)
            if low + size > start + len(window):
                raise _cut(spec, f"the key of picture {i} lies beyond its end")
            yield i, window[low - start : low - start + size]


def _numbered(spec: str, reader: Any, ranges: I64) -> list[str]:
    """Keys of a file that has none: DIGEST/NUMBER. The digest is of its tables and of some of its
    pictures' bytes, not of all, which would take minutes at every opening."""
    hasher = hashlib.blake2b(digest_size=8)
    for table in (reader.field_descriptors, reader.metadata, reader.alloc_table):
        hasher.update(np.ascontiguousarray(table).tobytes())
    chosen = ranges[
        np.arange(min(len(ranges), _SAMPLED)) * len(ranges) // min(len(ranges), _SAMPLED)
    ]
    for _, data in _spans(spec, chosen[:, 0], chosen[:, 1]):
        hasher.update(data)
    return [f"{hasher.hexdigest()}/{i:08d}" for i in range(len(ranges))]


def _labels(reader: Any, columns: dict[str, npt.NDArray[Any]]) -> I64 | None:
    kind = import_ffcv("fields").IntField
    names = [name for name, handler in reader.handlers.items() if isinstance(handler, kind)]
    name = "label" if "label" in names else names[0] if len(names) == 1 else None
    return None if name is None else columns[name].astype(np.int64)
