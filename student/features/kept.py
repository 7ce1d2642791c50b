"""Features are kept below `$FEATCACHE_HOME/features/`, so that the next protocol reads no picture.

A folder is named by a digest of everything its numbers depend on: the encoder's weights, the
pictures (keys, sizes and times of their files), the crop, and what is kept of a picture. It is
written under a temporary name and renamed: complete or absent. One that is damaged is made again.

n pictures; a row is what is kept of one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from fastcrc.crc32 import iscsi as crc32c

from featcache.catalog import kept_features
from featcache.catalog.kept_features import ABOUT, DATA, KIND, About
from featcache.errors import UserError
from featcache.runtime.meter import meter
from featcache.storage import json_file
from featcache.storage.owner import writer_id

Rows = npt.NDArray[Any]
VERIFIED_BYTES = 1 << 30  # of larger files the size alone is checked: reading them takes minutes
_LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes rows in the order of the pictures; those between that do not come were skipped."""

    def add(self, first: Sequence[int], values: Rows) -> None: ...
    def finish(self, skipped: Sequence[int]) -> Rows: ...


class InMemory:
    """Holds rows until the evaluation has ended."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.rows = np.zeros(shape, dtype)

    def add(self, first: Sequence[int], values: Rows) -> None:
        self.rows[np.asarray(first)] = values

    def finish(self, skipped: Sequence[int]) -> Rows:
        return self.rows


class OnDisk:
    """Writes rows (n, ...) one after the other to a folder that `finish` gives its name."""

    def __init__(
        self, of: Mapping[str, Any], shape: tuple[int, ...], dtype: str, encoder: str, pictures: str
    ) -> None:
        self.of, self.shape, self.dtype = dict(of), shape, np.dtype(dtype)
        self.names = {"encoder": encoder[:4096], "pictures": pictures[:4096]}
        self.folder = kept_features.folder()
        self.temporary = self.folder / f".{json_file.digest(self.of)}.{writer_id()}.tmp"
        _own_folder(self.folder)
        _refuse_strange(self.folder / json_file.digest(self.of))
        with _told(self.folder):
            self.temporary.mkdir()
            self.file = (self.temporary / DATA).open("xb")
        self.crc, self.bytes, self.next = 0, 0, 0
        self.write(_header(shape, self.dtype.str))

    def write(self, data: bytes) -> None:
        with _told(self.folder):
            self.file.write(data)
        self.crc = crc32c(data, self.crc)
        self.bytes += len(data)
        meter.count("bytes_written", len(data))

    def add(self, first: Sequence[int], values: Rows) -> None:
        rows, values = np.asarray(first), np.ascontiguousarray(values, self.dtype)
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, part in zip(np.split(rows, ends), np.split(values, ends), strict=True):
            self._fill(int(start[0]))
            self.write(part.tobytes())
            self.next = int(start[-1]) + 1

    def _fill(self, row: int) -> None:
        """Write zeros for the pictures before `row` that were skipped."""
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        for _ in range(self.next, row):
            self.write(bytes(size))

    def finish(self, skipped: Sequence[int]) -> Rows:
        self._fill(self.shape[0])
        with _told(self.folder):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        about = {
            "kind": KIND,
            "of": self.of,
            **self.names,
            "count": self.shape[0],
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "skipped": [int(row) for row in skipped],
            "bytes": self.bytes,
            "crc32c": self.crc,
        }
        with _told(self.folder):
            json_file.write_json(self.temporary / ABOUT, about)
        path = self.folder / json_file.digest(self.of)
        with contextlib.suppress(OSError):  # somebody else was first: the same numbers
            self.temporary.rename(path)
            json_file.sync_folder(self.folder)
        self.discard()
        return _mapped(path, kept_features.read(path))

    def discard(self) -> None:
        """Remove what is not complete."""
        with contextlib.suppress(OSError):  # it writes what it holds, and the disk may be full
            self.file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a UserError that says what helps."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot keep features in {str(folder)!r}: {error.strerror}; make room, set "
            "FEATCACHE_HOME to another disk, or run with --no-keep"
        ) from error


def _header(shape: Sequence[int], dtype: str) -> bytes:
    """Return what a .npy file of such rows begins with."""
    head = {"descr": dtype, "fortran_order": False, "shape": tuple(shape)}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, head)
    return out.getvalue()


def _own_folder(path: Path) -> None:
    """Make the folder of kept features; a link in its place is not followed."""
    if path.is_symlink():
        raise UserError(
            f"{str(path)!r} is a link, and features are kept below FEATCACHE_HOME alone; put the "
            "folder itself there, or run with --no-keep"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot keep features in {str(path)!r}: {error.strerror}; set FEATCACHE_HOME to a "
            "folder that can be written, or run with --no-keep"
        ) from error


def _refuse_strange(path: Path) -> None:
    """Refuse a link, or a file, in the place of a folder of ours."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(
            f"{str(path)!r} is no folder, and features are kept there; move it away, or run with "
            "--no-keep"
        )


def is_there(of: Mapping[str, Any]) -> bool:
    """Tell whether there is a folder of these features, whole or damaged."""
    path = _path(of)
    return not path.parent.is_symlink() and not path.is_symlink() and path.is_dir()


def _path(of: Mapping[str, Any]) -> Path:
    return kept_features.folder() / json_file.digest(dict(of))


def find(
    of: Mapping[str, Any], shape: tuple[int, ...], dtype: str
) -> tuple[Rows, list[int]] | None:
    """Return kept rows of a shape and dtype, mapped from their file, and which of them were
    skipped; None where they are not kept. Damaged ones are removed, and a note says so."""
    path = _path(of)
    if not is_there(of):
        return None
    try:
        about = kept_features.read(path)
        rows = _mapped(path, about)
        if (rows.shape, about.dtype) != (shape, dtype):
            raise UserError(f"{str(path)!r} has {rows.shape} {about.dtype}, {shape} is needed")
        if any(row >= about.count for row in about.skipped):
            raise UserError(f"{str(path)!r} names pictures that were skipped and are not there")
    except (UserError, OSError, ValueError) as error:
        _LOG.warning("features are made again: %s", error)
        _remove(path)
        return None
    with contextlib.suppress(OSError):  # when it was used last, for `featcache gc`
        os.utime(path / ABOUT)
    return rows, about.skipped


def _mapped(path: Path, about: About) -> Rows:
    """Map the rows of a folder. Raises UserError unless they are what about.json says.

    The header is compared, not parsed: one that is ours has one form.
    """
    data, shape, head = path / DATA, tuple(about.shape), _header(about.shape, about.dtype)
    if data.is_symlink() or not data.is_file() or data.stat().st_size != about.bytes:
        raise UserError(f"{str(data)!r} has not the size that {ABOUT} says")
    size = math.prod(shape) * np.dtype(about.dtype).itemsize
    with data.open("rb") as file:
        if not size or about.bytes != len(head) + size or file.read(len(head)) != head:
            raise UserError(f"{str(data)!r} has not the shape that {ABOUT} says")
    rows: Rows = np.memmap(data, about.dtype, "r", len(head), shape)
    if about.bytes <= VERIFIED_BYTES:
        if crc32c(data.read_bytes()) != about.crc32c:
            raise UserError(f"{str(data)!r} is damaged: its checksum is another")
        if not np.isfinite(rows).all():
            raise UserError(f"{str(data)!r} is damaged: it holds what is no finite number")
    return rows


def _remove(path: Path) -> None:
    """Remove damaged features, unless something else lies in their folder."""
    if kept_features.foreign(path):
        raise UserError(
            f"{str(path)!r} holds what is none of its files; move that away, or run with --no-keep"
        )
    shutil.rmtree(path)
