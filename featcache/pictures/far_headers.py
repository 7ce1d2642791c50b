"""The headers of a tar in an object store are read by small ranges, and kept in a file of this
machine: the next time the tar is opened without a request.

    ~/.cache/featcache/objects/tars/DIGEST.headers     a line of JSON, then the bytes, compressed
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import json
import logging
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastcrc.crc32 import iscsi as crc32c

from featcache.errors import short
from featcache.objects.cache_folder import cache_folder
from featcache.objects.client import Facts

_WINDOW_BYTES = 16 << 10  # of one request: a header, and often the next ones
_BEFORE_BYTES = 1024  # the reader looks at the byte before a header
KEPT_AFTER = 64  # bytes after each piece that is read, where a small member lies: a label
MOST_BYTES = 256 << 20  # that are kept of one tar
_MOST_LINE = 64 << 20
_LOG = logging.getLogger(__name__)


@dataclass
class Pieces:
    """Holds pieces of a file, by where they begin."""

    starts: list[int] = field(default_factory=list)
    data: list[bytearray] = field(default_factory=list)
    added: int = 0  # bytes
    is_full: bool = False

    def find(self, at: int, size: int) -> bytes | None:
        """Return bytes that lie in one piece."""
        i = bisect.bisect_right(self.starts, at) - 1
        if i < 0:
            return None
        low = at - self.starts[i]
        found = self.data[i][low : low + size]
        return bytes(found) if len(found) == size else None

    def add(self, at: int, piece: bytes) -> None:
        """Add a piece; what overlaps its neighbour is joined with it. What is too much is left
        out."""
        self.added += len(piece)
        self.is_full = self.is_full or self.added > MOST_BYTES
        if self.is_full:
            return
        i = bisect.bisect_right(self.starts, at)
        if i and at <= self.starts[i - 1] + len(self.data[i - 1]):
            low = at - self.starts[i - 1]
            self.data[i - 1][low : low + len(piece)] = piece
        else:
            self.starts.insert(i, at)
            self.data.insert(i, bytearray(piece))


class FarFile(io.RawIOBase):
    """A tar of `size` bytes as a file whose headers are read: by ranges, but for what `kept`
    holds. What is read is added there."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, kept: Pieces) -> None:
        super().__init__()
        self._read, self._size, self.kept = read, size, kept
        self._at, self._window, self._window_at = 0, b"", 0
        self.requests = 0

    def seek(self, at: int, whence: int = 0, /) -> int:
        assert whence == 0, "headers are read by their places"
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        count = max(0, min(size, self._size - self._at))
        data = self.kept.find(self._at, count) if count else b""
        if data is None:
            data = self._fetched(count)
        self._at += len(data)
        return data

    def _fetched(self, count: int) -> bytes:
        low = self._at - self._window_at
        if not 0 <= low <= low + count <= len(self._window):
            self._window_at = max(0, self._at - _BEFORE_BYTES)
            wanted = max(_WINDOW_BYTES, self._at + count - self._window_at)
            wanted = min(wanted, self._size - self._window_at)
            self._window = self._read(self._window_at, wanted)
            self.requests += 1
            low = self._at - self._window_at
        self.kept.add(self._at, self._window[low : low + count + KEPT_AFTER])
        return self._window[low : low + count]


def _path(url: str, facts: Facts) -> Path:
    told = f"{url}\0{facts.e_tag}\0{facts.bytes}".encode(errors="surrogateescape")
    return cache_folder() / "tars" / f"{hashlib.blake2b(told, digest_size=12).hexdigest()}.headers"


def load(url: str, facts: Facts) -> Pieces | None:
    """Return the headers that were kept of a tar; None where there are none, or they are not as
    they were written."""
    try:
        with _path(url, facts).open("rb") as file:
            head = json.loads(file.readline(_MOST_LINE))
            packed = file.read(MOST_BYTES)
        lengths = [int(each) for each in head["lengths"]]
        starts = [int(each) for each in head["starts"]]
        unpack = zlib.decompressobj()
        data = unpack.decompress(packed, MOST_BYTES)
        sound = (
            (head["url"], head["e_tag"], head["bytes"]) == (url, facts.e_tag, facts.bytes)
            and crc32c(data) == head["crc32c"]
            and len(starts) == len(lengths)
            and min(lengths, default=0) >= 0
            and sum(lengths) == len(data)
            and starts == sorted(starts)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zlib.error):
        return None
    return Pieces(starts, list(_cut(data, lengths))) if sound else None


def _cut(data: bytes, lengths: list[int]) -> Iterator[bytearray]:
    at = 0
    for length in lengths:
        yield bytearray(data[at : at + length])
        at += length


def keep(url: str, facts: Facts, pieces: Pieces) -> None:
    """Keep the headers of a tar where some were read. Where that fails it is told, and they are
    read again."""
    if not pieces.added:
        return
    if pieces.is_full:
        _LOG.warning(
            "the headers of %s are more than %d bytes, and are read again next time; smaller tars "
            "open without that", short(url), MOST_BYTES,
        )  # fmt: skip
        return
    data = b"".join(pieces.data)
    head = {
        "url": url,
        "e_tag": facts.e_tag,
        "bytes": facts.bytes,
        "crc32c": crc32c(data),
        "starts": pieces.starts,
        "lengths": [len(each) for each in pieces.data],
    }
    path = _path(url, facts)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(json.dumps(head).encode() + b"\n" + zlib.compress(data, 6))
        temporary.replace(path)
    except OSError as error:
        _LOG.warning(
            "the headers of %s cannot be kept in %s: %s; they are read again next time",
            short(url), short(str(path.parent)), error.strerror,
        )  # fmt: skip
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
