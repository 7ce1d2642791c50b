"""Tars lie on this machine, or in an object store: `TarFiles` says how they are opened and read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Protocol, TypeVar

from featcache.pictures.regular_file import open_regular, read_range
from featcache.pictures.stamps import Told, told_of_file

Result = TypeVar("Result")


class TarFiles(Protocol):
    """Opens and reads tars, by the texts that name them; safe in threads."""

    def open(self, path: str) -> IO[bytes]:
        """Open a tar whose headers will be read. OSError where it is none that can be read."""
        ...

    def map(self, work: Callable[[str], Result], paths: Sequence[str]) -> Iterable[Result]:
        """Yield what `work` returns of each tar, in their order."""
        ...

    def read(
        self, path: str, offset: int, size: int, segments: Sequence[tuple[int, int]] | None = None
    ) -> bytes:
        """Read a member: see regular_file.read_range."""
        ...

    def told(self, path: str) -> Told:
        """Return what changes when the tar does; OSError where it is gone."""
        ...


class LocalTars:
    """Tars of this machine: see TarFiles."""

    def open(self, path: str) -> IO[bytes]:
        return os.fdopen(open_regular(path), "rb")

    def map(self, work: Callable[[str], Result], paths: Sequence[str]) -> Iterator[Result]:
        return map(work, paths)

    def read(
        self, path: str, offset: int, size: int, segments: Sequence[tuple[int, int]] | None = None
    ) -> bytes:
        return read_range(path, offset, size, segments)

    def told(self, path: str) -> Told:
        return told_of_file(path)
