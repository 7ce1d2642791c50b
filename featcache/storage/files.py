"""The files of a cache lie in a folder, or in an object store that a folder stands for.

All that knows a cache as a folder works on both. What a folder that stands for an object store does
not hold, the rows of shards above all, is asked for here: `files_of(path)` says how to look at a
file, to bring it whole, or to read pieces of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from featcache.errors import UsageError


class Held(Protocol):
    """Holds a lease, and says whether it was lost."""

    @property
    def lost(self) -> bool: ...
    def renew(self) -> None: ...
    def release(self) -> None: ...


class Files(Protocol):
    """Looks at files and reads them, by the paths that they have, or would have, in the folder."""

    may_be_far: bool  # whether some files are not at their paths

    def address(self, folder: Path) -> str:
        """Return what names a folder in any process: itself, or a URL."""
        ...

    def holds_others(self) -> bool:
        """Return whether there is more, elsewhere, than what a folder here shows."""
        ...

    def size(self, path: str) -> int:
        """Return the bytes of a regular file; OSError where there is none."""
        ...

    def bring(self, paths: Iterable[str]) -> None:
        """Make these files lie whole at their paths."""
        ...

    def drop(self, paths: Iterable[str]) -> None:
        """Remove what `bring` brought, where it can be brought again."""
        ...

    def is_far(self, path: str) -> bool:
        """Return whether the file is not at its path, and is read by `read_ranges`."""
        ...

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Any]:
        """Return the bytes of each piece as a buffer."""
        ...

    def distrust(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Forget what `fetch` kept of these pieces; False where it kept nothing."""
        ...

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> bool:
        """Fetch pieces (path, start, length) that `read_ranges` will be asked for; False where
        there is no room for all of them."""
        ...

    def set_stage(self, folder: Path, limit: int | None, shares: int) -> None:
        """Keep what `fetch` fetches in a folder."""
        ...

    def publish(self, folder: Path, final: Path, record: Path) -> bool:
        """Take the folder of a shard that is complete, and is to become `final`, and make the
        record in it `record`; False where two renames do that."""
        ...

    def changed(self, path: Path) -> None:
        """Take a file beside the shards that was written, or removed."""
        ...

    def create(self, path: Path, data: bytes) -> bool | None:
        """Write a file beside the shards where there is none; returns whether it was absent, None
        where the file system is asked for that."""
        ...

    def look(self, path: Path) -> None:
        """Bring a file beside the shards that others may have written."""
        ...

    def hold(self, path: Path, owner: str) -> Held | None:
        """Take the lease that has this path, beyond this machine; None while another holds it."""
        ...

    def clear_lease(self, path: Path, owner: str) -> None:
        """Remove what a dead holder left of a shard that is complete."""
        ...

    def release_all(self) -> None:
        """Release all that this process holds."""
        ...


class HeldHere:
    """A file of this machine is lease enough: see Held."""

    lost = False

    def renew(self) -> None:
        return None

    def release(self) -> None:
        return None


_HELD_HERE = HeldHere()


class LocalFiles:
    """A plain folder: see Files."""

    may_be_far = False

    def address(self, folder: Path) -> str:
        return str(folder)

    def holds_others(self) -> bool:
        return False

    def size(self, path: str) -> int:
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "is no regular file")
        return status.st_size

    def bring(self, paths: Iterable[str]) -> None:
        return None

    def drop(self, paths: Iterable[str]) -> None:
        return None

    def is_far(self, path: str) -> bool:
        return False

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Any]:
        raise AssertionError(f"{path} is here: nothing is far")

    def distrust(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> bool:
        return False

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> bool:
        return True

    def set_stage(self, folder: Path, limit: int | None, shares: int) -> None:
        raise UsageError("a stage is for rows in an object store, and these are here: leave it out")

    def publish(self, folder: Path, final: Path, record: Path) -> bool:
        return False

    def changed(self, path: Path) -> None:
        return None

    def create(self, path: Path, data: bytes) -> bool | None:
        return None

    def look(self, path: Path) -> None:
        return None

    def hold(self, path: Path, owner: str) -> Held | None:
        return _HELD_HERE

    def clear_lease(self, path: Path, owner: str) -> None:
        return None

    def release_all(self) -> None:
        return None


_LOCAL = LocalFiles()
_mounted: dict[str, Files] = {}  # folder, with a slash at its end


def mount(folder: str, files: Files) -> None:
    """Let `files` answer for all below an absolute folder, in this process."""
    _mounted[f"{folder}/"] = files


def files_of(path: str | os.PathLike[str]) -> Files:
    """Return who answers for a path."""
    if _mounted:
        text = f"{os.fspath(path)}/"
        for folder, files in _mounted.items():
            if text.startswith(folder):
                return files
    return _LOCAL


def address(path: str | os.PathLike[str]) -> str:
    """Return what names a cache in any folder and any process: its absolute path, links as they
    are, or its URL."""
    whole = os.path.abspath(path)  # noqa: PTH100 (links are left as they are)
    return files_of(whole).address(Path(whole))
