"""Parquet files are opened, and their row groups decoded, in bounded memory.

A footer is believed in nothing that costs memory: rows are counted, and bytes as they are decoded.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import UsageError, UserError, counted, one_line
from featcache.pictures.regular_file import open_regular
from featcache.pictures.source import PictureError

GROUP_BYTES = 512 << 20  # of pictures in a row group, and of the groups that are kept
_BATCH_ROWS = 64


@dataclass(frozen=True)
class ParquetFile:
    """A file with its footer; row groups begin at the rows `starts` (groups + 1,)."""

    path: str
    schema: Any = field(repr=False)  # Arrow's
    metadata: Any = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)
    most_group_bytes: int  # of all columns, as the footer tells

    @property
    def rows(self) -> int:
        return int(self.starts[-1])


def import_parquet() -> Any:
    """Import `pyarrow.parquet`; UsageError says how it is installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "pictures in a .parquet file need pyarrow; run `pip install pyarrow` (or `pip install "
            "'featcache[parquet]'`), or give a folder or tars"
        ) from error
    return pyarrow.parquet


def open_file(path: str) -> ParquetFile:
    """Read the footer of a file. Raises UserError where it is damaged, or no parquet."""
    import_parquet()
    try:
        fd = open_regular(path)
        size = os.fstat(fd).st_size
        os.close(fd)
        with _opened(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        # nothing is asked of columns: at a forged one Arrow ends the whole process
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        counts = [group.num_rows for group in groups]
        most = max((group.total_byte_size for group in groups), default=0)
    except Exception as error:  # whatever Arrow raises at these bytes, the bytes are at fault
        raise _unreadable(path, error) from error
    # a picture of less than a byte is none; a list of so many keys would fill memory
    if any(not 0 <= count <= size for count in counts) or sum(counts) > size:
        raise UserError(
            f"{path!r} is damaged: its footer tells of {counted(sum(counts), 'row')} in "
            f"{size} bytes; fetch "
            "or write it again"
        )
    return ParquetFile(path, schema, metadata, np.cumsum([0, *counts], dtype=np.int64), most)


def _opened(path: str, metadata: Any = None) -> Any:
    return import_parquet().ParquetFile(path, metadata=metadata)


def _unreadable(path: str, error: Exception) -> UserError:
    if isinstance(error, MemoryError):
        raise error
    reason = one_line(str(error))[:200] or type(error).__name__
    return UserError(
        f"reading {path!r} as parquet failed: {reason}; a whole parquet file is needed: fetch or "
        "write it again"
    )


def batches(file: ParquetFile, column: str, group: int, most_bytes: int) -> Iterator[Any]:
    """Decode a column of a row group, some rows at a time, as Arrow arrays; of a struct the one
    field that `column` names. Raises UserError where it cannot be, or has more than `most_bytes`
    or other rows than the footer tells."""
    rows = done_bytes = 0
    count = int(file.starts[group + 1] - file.starts[group])
    try:
        with _opened(file.path, file.metadata) as opened:
            for batch in opened.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False
            ):
                rows, done_bytes = rows + len(batch), done_bytes + batch.nbytes
                if done_bytes > most_bytes or rows > count:
                    raise ValueError(
                        f"row group {group} has more than {most_bytes} bytes, or rows than the "
                        "footer tells"
                    )
                yield _innermost(batch.column(0))
        if rows < count:
            raise ValueError(f"row group {group} has {counted(rows, 'row')} of {count}")
    except GeneratorExit:
        raise
    except Exception as error:  # as in `open_file`
        raise _unreadable(file.path, error) from error


def _innermost(array: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(array, [0]) if pa.types.is_struct(array.type) else array


def _joined(arrays: Iterator[Any]) -> Any:
    import pyarrow as pa

    return pa.chunked_array([*arrays])


class RowGroups:
    """Gives pictures by row, keeping the row groups that were read last; safe in threads, and in
    the processes of a loader, each of which has its own."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._reset()

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._kept: OrderedDict[tuple[str, str, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[RowGroups], tuple[int]]:
        return RowGroups, (self.most_bytes,)

    def read(self, file: ParquetFile, column: str, row: int) -> bytes | None:
        """Read the bytes of a row; None where it has none. Raises PictureError where its row group
        cannot be decoded."""
        group = int(np.searchsorted(file.starts, row, "right")) - 1
        pictures = self._group(file, column, group)
        data: bytes | None = pictures[row - int(file.starts[group])].as_py()
        return data

    def _group(self, file: ParquetFile, column: str, group: int) -> Any:
        if self._pid != os.getpid():  # a fork may have taken the lock along, locked
            self._reset()
        with self._lock:
            key = (file.path, column, group)
            if key not in self._kept:
                try:
                    self._kept[key] = _joined(batches(file, column, group, self.most_bytes))
                except UserError as error:
                    raise PictureError(str(error)) from error
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and self._bytes() > self.most_bytes:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _bytes(self) -> int:
        return sum(pictures.nbytes for pictures in self._kept.values())
