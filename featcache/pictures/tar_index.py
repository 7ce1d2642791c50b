"""The members of a tar are found: where the bytes of each lie, through links, sparse maps, and what
follows an end mark.

Headers are parsed by Python's tarfile. It stops in silence at what it can't read, and reads as many
bytes as a header asks for; here each is an error.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

from featcache.errors import UserError
from featcache.pictures.passed_over import (
    AFTER_END,
    LONE_ZEROS,
    NO_MEMBER,
    ODD_MEMBER,
    Tally,
)
from featcache.pictures.source import ALLOWED, SUFFIXES
from featcache.pictures.tar_files import TarFiles

BLOCK = tarfile.BLOCKSIZE
_MOST_HEADER_BYTES = 16 << 20  # of one member: names, PAX records, a sparse map
_CHUNK = 1 << 20
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip

Segments = tuple[tuple[int, int], ...]  # (place in the content, bytes) of a sparse member's data


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # of its content
    size: int
    segments: Segments | None  # None: the content lies there as it is


class _Link(NamedTuple):
    name: str
    target: str  # the name of a member


def read_members(
    files: TarFiles, path: str, tally: Tally, inner: Member | None = None
) -> list[Member]:
    """List the files of a tar, links as what they lead to, in the order of the tar; of a tar within
    it, the member `inner`, with offsets in the file at `path`. Raises UserError where it is
    damaged, cut off, or no tar."""
    name = path if inner is None else f"{path}/{inner.name[:200]}"
    try:
        with files.open(path) as file:
            if inner is None:
                return _resolved([*_entries(name, file, tally)], tally)
            found = _resolved([*_entries(name, _Window(file, inner), tally)], tally)
            return [each._replace(offset=each.offset + inner.offset) for each in found]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"reading {name!r} as a tar failed: {error}"
            f"{_compressed(files, path, inner.offset if inner else 0)}; allowed is {ALLOWED}"
        ) from error
    # tarfile lets through what int(), decode() and unpacking raise on forged headers
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise _damaged(name, f"a header that cannot be read ({str(e)[:80]})") from e


def _compressed(files: TarFiles, path: str, offset: int) -> str:
    """Say that a tar is compressed, where its first bytes tell."""
    try:
        with files.open(path) as file:
            file.seek(offset)
            head = file.read(8)
    except OSError:
        return ""
    kinds = [kind for magic, kind in _MAGIC.items() if head.startswith(magic)]
    return (
        f" (it is {kinds[0]}-compressed: pictures are read by their place in the tar, so "
        "decompress it)"
        if kinds
        else ""
    )


def _damaged(path: str, why: str) -> UserError:
    return UserError(f"{path!r} is damaged: {why}; fetch or pack it again")


# ------------------------------------------------------------ headers


class _Bytes(Protocol):
    """A file, or a part of one, as headers are read from it."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, at: int, /) -> int: ...
    def tell(self) -> int: ...


class _Window:
    """A member as a file of its own: what reads it sees nothing beyond its end."""

    def __init__(self, file: IO[bytes], member: Member) -> None:
        self._file, self._start, self._size, self._at = file, member.offset, member.size, 0

    def seek(self, at: int, /) -> int:
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int, /) -> bytes:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(size, self._size - self._at)))
        self._at += len(data)
        return data


class _Headers:
    """The file as tarfile sees it: headers only, so that a forged size reads no gigabytes."""

    def __init__(self, file: _Bytes) -> None:
        self._file, self.left = file, _MOST_HEADER_BYTES
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(
                f"a header of {size} bytes; at most {_MOST_HEADER_BYTES} are allowed"
            )
        return self._file.read(size)


def _entries(path: str, file: _Bytes, tally: Tally) -> Iterator[Member | _Link]:
    """Yield files and links of a tar, and of tars appended to it (`cat a.tar b.tar`)."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        headers = _Headers(file)
        # surrogates keep a name that is not UTF-8 apart from others, whatever the locale
        tar = tarfile.TarFile(
            fileobj=headers,  # type: ignore[arg-type]  # all that reading asks for
            mode="r",
            encoding="utf-8",
            errors="surrogateescape",
        )
        at = start
        while (info := tar.next()) is not None:
            vars(tar)["members"].clear()  # it keeps a list of all
            if tar.offset <= at or info.size < 0:
                raise _damaged(path, f"a size of {info.size} bytes in a header")
            at, headers.left = tar.offset, _MOST_HEADER_BYTES
            if (entry := _entry(path, info, tar.offset - info.offset_data, tally)) is not None:
                yield entry
        start = _after_end(path, file, tar.offset, tally)


def _after_end(path: str, file: _Bytes, end: int, tally: Tally) -> int | None:
    """Return where the next tar begins behind the end mark at `end`; None where nothing follows.
    Raises UserError where no end mark is there, or what follows shows a lost header."""
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise UserError(
            f"{path!r} is cut off: it has no end mark after its last member; fetch or pack it again"
        )
    if block.strip(b"\0"):
        raise _damaged(path, f"what stands at byte {end} is no header of a member")
    start = _next_data(file, end + BLOCK)
    if start is None:
        return None
    zeros = (start - end) // BLOCK
    file.seek(start)
    if _is_header(file.read(BLOCK)):
        if zeros == 1:
            tally.add(LONE_ZEROS, path)
        return start
    if zeros == 1 or _finds_header(file, start):
        raise _damaged(
            path,
            f"zeros stand at byte {end}, where a member or the end mark should be, and other data "
            "follows",
        )
    tally.add(AFTER_END, path)
    return None


def _next_data(file: _Bytes, at: int) -> int | None:
    """Return the first block from `at` on that is not all zeros."""
    file.seek(at)
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _finds_header(file: _Bytes, at: int) -> bool:
    """Whether a member's header lies anywhere from `at` on."""
    file.seek(at)
    before = b""
    while chunk := file.read(_CHUNK):
        data = before + chunk
        place = data.find(b"ustar")
        while place >= 0:
            if place >= 257 and _is_header(data[place - 257 : place - 257 + BLOCK]):
                return True
            place = data.find(b"ustar", place + 1)
        before = data[-2 * BLOCK :]
    return False


# ------------------------------------------------------------ members


def _entry(path: str, info: tarfile.TarInfo, room: int, tally: Tally) -> Member | _Link | None:
    """What a header says: a file, whose content has `room` bytes in the tar, or a link."""
    if info.issym() or info.islnk():
        # a symbolic link counts from its own folder
        folder = posixpath.dirname(info.name) if info.issym() else ""
        return _Link(info.name, posixpath.normpath(posixpath.join(folder, info.linkname)))
    is_odd = info.sparse is None and any(key.startswith("GNU.sparse.") for key in info.pax_headers)
    if info.isfile() and not is_odd:
        segments = None if info.sparse is None else _segments(path, info)
        stored = info.size if segments is None else sum(count for _, count in segments)
        if stored > room:
            raise _damaged(path, f"{info.name[:100]!r} has more bytes than the tar holds of it")
        return Member(info.name, info.offset_data, info.size, segments)
    if not info.isdir() and posixpath.splitext(info.name)[1].lower() in SUFFIXES:
        tally.add(ODD_MEMBER, info.name)
    return None


def _segments(path: str, info: tarfile.TarInfo) -> Segments:
    # typeshed knows no sparse maps
    pairs: Any = info.sparse
    found = tuple((int(begin), int(count)) for begin, count in pairs if count)
    if info.size >= 1 << 62 or any(
        begin < 0 or count < 0 or begin + count > info.size for begin, count in found
    ):
        raise _damaged(path, f"the sparse map of {info.name[:100]!r} does not fit its size")
    return found


def _resolved(entries: list[Member | _Link], tally: Tally) -> list[Member]:
    """Return the files, and the links to files under their own names."""
    links = {posixpath.normpath(each.name): each for each in entries if isinstance(each, _Link)}
    if not links:
        return [each for each in entries if isinstance(each, Member)]
    files = {posixpath.normpath(each.name): each for each in entries if isinstance(each, Member)}
    members = []
    for each in entries:
        file = each if isinstance(each, Member) else files.get(_follow(each.target, links))
        if file is None:
            tally.add(NO_MEMBER, each.name)
        else:
            members.append(file._replace(name=each.name))
    return members


def _follow(name: str, links: dict[str, _Link]) -> str:
    """The end of a chain of links; of a circle one of its links, which is no file."""
    seen: set[str] = set()
    while name in links and name not in seen:
        seen.add(name)
        name = links[name].target
    return name
