"""Pictures of parquet files are read by row, as Hugging Face's `datasets` stores them.

A column of pictures is the `Image` feature of `datasets`, struct{bytes, path}, or plain binary.
Keys are the paths in it less their last suffix, where every picture has one, they differ, and none
leads out; else all keys are FILE/ROW, of the file's name and the row's number (train-0/00000017).
So the same pictures have the same keys in a folder, and adding files can change what keys are.

Pages of parquet are decoded in row groups. One is decoded at a time, and those that were read last
are kept, up to GROUP_BYTES: pictures in order cost nothing, in random order each may cost a group.

n pictures.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures.given_labels import GivenLabels
from featcache.pictures.parquet_columns import Columns, read_column, read_columns
from featcache.pictures.parquet_groups import GROUP_BYTES, ParquetFile, RowGroups, open_file
from featcache.pictures.parquet_labels import read_labels
from featcache.pictures.passed_over import PassedOver, Tally
from featcache.pictures.source import PictureError
from featcache.pictures.spec import Spec
from featcache.pictures.stamps import stamp_files

I64 = npt.NDArray[np.int64]
_LONGEST_KEY = 1024


@dataclass(frozen=True)
class ParquetSource:
    """Pictures of parquet files, in the order of files and rows."""

    spec: str
    files: list[ParquetFile] = field(repr=False)
    columns: Columns
    keys: list[str] = field(repr=False)
    groups: RowGroups = field(repr=False, compare=False)
    passed_over: tuple[PassedOver, ...] = ()
    given: GivenLabels | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _starts(self) -> I64:
        """The index (files + 1,) of each file's first picture."""
        return np.cumsum([0, *(file.rows for file in self.files)], dtype=np.int64)

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, index, "right")) - 1
        return file, index - int(self._starts[file])

    def read(self, index: int) -> bytes:
        file, row = self._place(range(len(self))[index])
        data = self.groups.read(self.files[file], self.columns.data, row)
        if data is None:
            raise PictureError("its row holds no bytes; pictures outside of parquet are not read")
        return data

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them."""
        places = np.array([self._place(row) for row in rows], np.int64).reshape(-1, 2)
        used = [self.files[file].path for file in np.unique(places[:, 0])]
        return stamp_files((self.keys[row] for row in rows), used, places)

    @cached_property
    def _named(self) -> tuple[list[str] | None, I64 | None]:
        if self.given is not None:
            return self.given.names, self.given.numbers
        return read_labels(self.spec, self.files, self.columns)

    @property
    def classes(self) -> list[str] | None:
        return self._named[0]

    @property
    def labels(self) -> I64 | None:
        return self._named[1]


def is_parquet(name: str) -> bool:
    """Return whether a file is one by its name."""
    return name.lower().endswith(".parquet")


def open_parquet(spec: Spec, paths: Sequence[str], tally: Tally | None = None) -> ParquetSource:
    """Open parquet files of one schema. Raises UserError where they are damaged, have no column of
    pictures or several, or refer to pictures outside; UsageError without pyarrow."""
    spec.check_kind("parquet")
    files = [open_file(path) for path in paths]
    # a part of the spec that `labels` of a table takes names no column here
    label = spec.label_column if spec.labels is None else None
    columns = read_columns(spec.path, files, spec.image_column, label)
    if not sum(file.rows for file in files):
        raise UserError(
            f"no pictures found in {spec.path!r}: its {len(files)} parquet files have no rows; "
            "write them again, or give others"
        )
    _check_inside(files[0], columns)
    keys = _by_path(files, columns) or list(_by_row(spec.path, files))
    rows = () if tally is None else tally.rows
    return ParquetSource(spec.path, files, columns, keys, RowGroups(GROUP_BYTES), rows)


def _check_inside(file: ParquetFile, columns: Columns) -> None:
    """Raise UserError where the first picture of a file is a path to another file."""
    if columns.path is None or not file.rows:
        return
    data, path = (next(read_column(file, name)) for name in (columns.data, columns.path))
    if data is None and path is not None:
        raise UserError(
            f"{file.path!r}: the picture {path[:200]!r} has no bytes in it, only a path to another "
            "file; pictures outside are not read: write it again with them in it (map "
            "`datasets.table.embed_table_storage` over the set first), or give their folder"
        )


def _by_path(files: Sequence[ParquetFile], columns: Columns) -> list[str] | None:
    """Return the paths as keys; None where one is missing, unsafe, or not unique."""
    keys, seen, usable = list[str](), set[str](), columns.path is not None
    for file in files if columns.path is not None else ():
        for path in read_column(file, columns.path or ""):
            key = None if path is None else _safe(path)
            usable = usable and key is not None and key not in seen
            if usable and key is not None:
                seen.add(key)
                keys.append(key)
    return keys if usable else None


def _safe(path: str) -> str | None:
    """Return the key of a path; None where it is no name below the source."""
    key = posixpath.splitext(path)[0]
    parts = key.split("/")
    is_text = key.isprintable() and "\\" not in key and len(key) <= _LONGEST_KEY
    return key if is_text and not {"", ".", ".."} & {*parts} else None


def _by_row(spec: str, files: Sequence[ParquetFile]) -> Iterator[str]:
    stems = [PurePosixPath(file.path).stem for file in files]
    if len(set(stems)) < len(stems):
        double = next(stem for stem in stems if stems.count(stem) > 1)
        first, second = [files[i].path for i, stem in enumerate(stems) if stem == double][:2]
        raise UserError(
            f"pictures {spec!r}: {first[-300:]!r} and {second[-300:]!r} have one name, and "
            "keys are FILE/ROW where paths in them are not unique; rename one of them"
        )
    for stem, file in zip(stems, files, strict=True):
        yield from (f"{stem}/{row:08d}" for row in range(file.rows))
