"""Pieces of far files are kept in a folder, up to a limit: fetched ahead of an order that is known,
and dropped behind it.

What is fetched together lies in one segment, a file of bytes with an index beside it, which is
written last:

    DIR/HOST-PID-NONCE.data     the pieces, one after the other
    DIR/HOST-PID-NONCE.json     {"files": [...], "pieces": [[file, offset, bytes], ...]}

While there is room all are kept, for the next epoch too. Then the oldest segment goes first whose
pieces have been read. What a process left that has ended is taken over by the next one. Nothing is
synced: whoever reads compares checksums, and what is lost is fetched again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.storage.owner import is_alive, is_here, is_writer, writer_id

_GROUP_BYTES = 64 << 20  # that are fetched ahead together
_MOST_INDEX_BYTES = 64 << 20
_FOR_NOTHING = 0.03  # of what is fetched, between pieces that one request reads


class Piece(NamedTuple):
    """Names bytes of a far file; the file's name holds its version."""

    file: str
    offset: int
    bytes: int


@dataclass(eq=False)
class _Segment:
    data: Path
    bytes: int
    pieces: list[Piece] = field(default_factory=list)
    unread: set[Piece] = field(default_factory=set)
    is_dropped: bool = False

    @property
    def index(self) -> Path:
        return self.data.with_suffix(".json")


class Stage:
    """Keeps pieces in `folder`, at most `limit` bytes of them; safe in several threads. Several
    processes may share the folder, each with a limit of its own."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.RLock()
        self._segments: dict[_Segment, None] = {}  # the oldest first
        self._places: dict[Piece, tuple[_Segment, int]] = {}
        self.bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._take_over()

    # ---- reading

    def holds(self, piece: Piece) -> bool:
        with self._lock:
            return piece in self._places

    def read(self, piece: Piece) -> bytes | None:
        """Return a piece, which may be dropped from now on; None where it is not held."""
        with self._lock:
            found = self._places.get(piece)
            if found is None:
                return None
            segment, position = found
            segment.unread.discard(piece)
        data = _pread(segment.data, piece.bytes, position)
        if len(data) < piece.bytes:  # dropped in this moment, cut by somebody, or of a broken disk
            with self._lock:
                self._drop(segment)
            return None
        return data

    def distrust(self, pieces: Sequence[Piece]) -> bool:
        """Drop the segments of pieces that are not as they were; False where none is held."""
        with self._lock:
            found = {self._places[piece][0] for piece in pieces if piece in self._places}
            for segment in found:
                self._drop(segment)
        return bool(found)

    # ---- writing

    def make_room(self, pieces: Sequence[Piece]) -> bool:
        """Drop what has been read, oldest first, until these pieces, with their index, are within
        the limit; False where they are not."""
        return self._make_room(_segment_bytes(pieces))

    def _make_room(self, count: int) -> bool:
        with self._lock:
            for segment in list(self._segments):
                if self.bytes + count <= self.limit:
                    break
                if not segment.unread:
                    self._drop(segment)
            return self.bytes + count <= self.limit

    def keep(self, pieces: Sequence[Piece], data: Sequence[Any]) -> bool:
        """Keep pieces that were fetched together, until they are read and their room is wanted;
        False where there is no room."""
        index = _index(pieces)
        count = sum(piece.bytes for piece in pieces) + len(index)
        with self._lock:
            if not pieces or not self._make_room(count):
                return False
            path = self.folder / f"{writer_id()}.data"
            try:
                with path.open("xb") as file:
                    file.writelines(data)
                path.with_suffix(".json").write_bytes(index)
                self._add(path, pieces, count)
            except OSError as error:
                for each in (path, path.with_suffix(".json")):
                    each.unlink(missing_ok=True)
                raise UserError(
                    f"--stage {str(self.folder)!r}: {error.strerror}; give another folder, or a "
                    "smaller --stage-limit"
                ) from error
        return True

    def _add(self, path: Path, pieces: Sequence[Piece], count: int) -> None:
        segment = _Segment(path, count)
        self._segments[segment] = None
        self.bytes += count
        position = 0
        for piece in pieces:
            if piece not in self._places:
                self._places[piece] = (segment, position)
                segment.pieces.append(piece)
                segment.unread.add(piece)
            position += piece.bytes

    def _drop(self, segment: _Segment) -> None:
        if segment.is_dropped:  # by another reader of it
            return
        segment.is_dropped = True
        del self._segments[segment]
        self.bytes -= segment.bytes
        for piece in segment.pieces:
            del self._places[piece]
        for path in (segment.index, segment.data):
            path.unlink(missing_ok=True)

    # ---- what others left

    def _take_over(self) -> None:
        """Take over the segments of processes of this machine that have ended; remove their
        unfinished ones, and what is beyond the limit."""
        for data in sorted(self.folder.glob("*.data")):
            owner = data.stem
            if not is_writer(owner) or not is_here(owner) or is_alive(owner):
                continue
            own = self.folder / f"{writer_id()}.data"
            with contextlib.suppress(OSError):  # another process was faster
                data.rename(own)
                self._adopt(own, data.with_suffix(".json"))

    def _adopt(self, data: Path, index: Path) -> None:
        pieces = list(_read_index(index, data.stat().st_size))
        count = _segment_bytes(pieces)
        index.unlink(missing_ok=True)
        if not pieces or self.bytes + count > self.limit:
            data.unlink()
            return
        data.with_suffix(".json").write_bytes(_index(pieces))
        self._add(data, pieces, count)
        for segment in self._segments:
            segment.unread.clear()  # which of them are wanted again is not known


def _pread(path: Path, count: int, position: int) -> bytes:
    """Read a piece; what there is of it, nothing where there is no file. One open a read: some
    microseconds, and no descriptor for each of thousands of segments."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(fd, count, position)
    except OSError:
        return b""
    finally:
        os.close(fd)


def groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces into groups of some bytes, which are in memory at a time."""
    group: list[Piece] = []
    count = 0
    for piece in pieces:
        if group and count + piece.bytes > _GROUP_BYTES:
            yield group
            group, count = [], 0
        group.append(piece)
        count += piece.bytes
    if group:
        yield group


def joined_gap(pieces: Sequence[Piece]) -> int:
    """Return the largest gap between pieces that one request may read across, so that what is
    fetched for nothing stays below a share of all pieces: small gaps of all files come first.

    >>> joined_gap([Piece("f", 0, 1000), Piece("f", 1020, 1000), Piece("f", 9000, 1)])
    20
    """
    files: dict[str, list[Piece]] = {}
    for piece in pieces:
        files.setdefault(piece.file, []).append(piece)
    gaps = np.sort(np.concatenate([_gaps(each) for each in files.values()]))
    fits = np.cumsum(gaps) <= _FOR_NOTHING * sum(piece.bytes for piece in pieces)
    fits[:-1] &= gaps[1:] != gaps[:-1]  # of gaps of one size all are joined, or none
    return int(gaps[fits][-1]) if fits.any() else 0


def _gaps(pieces: Sequence[Piece]) -> npt.NDArray[np.int64]:
    """Return the gaps between neighbours of a file, 0 where they touch."""
    bounds = np.array(sorted((piece.offset, piece.offset + piece.bytes) for piece in pieces))
    ends = np.maximum.accumulate(bounds[:, 1])
    return np.maximum(bounds[1:, 0] - ends[:-1], 0)


def _index(pieces: Sequence[Piece]) -> bytes:
    numbers: dict[str, int] = {}
    rows = [
        [numbers.setdefault(piece.file, len(numbers)), piece.offset, piece.bytes]
        for piece in pieces
    ]
    return json.dumps({"files": list(numbers), "pieces": rows}).encode()


def _segment_bytes(pieces: Sequence[Piece]) -> int:
    """Return the bytes that pieces take together, with their index."""
    return sum(piece.bytes for piece in pieces) + len(_index(pieces))


def _read_index(path: Path, size: int) -> Iterator[Piece]:
    """Yield the pieces of a segment of so many bytes; nothing where the index is not theirs."""
    try:
        if path.stat().st_size > _MOST_INDEX_BYTES:
            return
        found = json.loads(path.read_text())
        files = [str(name) for name in found["files"]]
        pieces = [Piece(files[int(f)], int(o), int(n)) for f, o, n in found["pieces"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return
    sound = all(piece.offset >= 0 and piece.bytes > 0 for piece in pieces)
    if sound and sum(piece.bytes for piece in pieces) == size:
        yield from pieces
