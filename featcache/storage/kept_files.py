"""Small files that describe caches in an object store are kept on this machine by name and ETag, so
that the next process that opens a cache asks for nothing that it knows.

    ~/.cache/featcache/objects/CACHE/kept/DIGEST.CRC   a file, by name, ETag and bytes
    ~/.cache/featcache/objects/CACHE/HOST-PID-NONCE/   the folder that one process works in

Files in a process's own folder are links to those that are kept. Nothing here is ever written in
place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastcrc.crc32 import iscsi as crc32c

from featcache.objects.client import Facts
from featcache.storage.owner import is_alive, is_here, is_writer, writer_id


class KeptFiles:
    """Keeps files of one cache in a folder that processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[str, str] = {}  # of files, by digest

    def look(self) -> None:
        """See what is kept now."""
        try:
            self._names = {name.partition(".")[0]: name for name in os.listdir(self.folder)}  # noqa: PTH208
        except OSError:
            self._names = {}

    def link(self, facts: Facts, path: Path) -> bool:
        """Let a kept file be at a path too, where nothing is; False where it is not kept, or is not
        as it was written: a machine may have lost power."""
        name = self._names.get(_digest(facts))
        if name is None:
            return False
        kept = self.folder / name
        try:
            data = kept.read_bytes() if kept.stat().st_size == facts.bytes else b""
            if len(data) != facts.bytes or name != _name(facts, data):
                kept.unlink(missing_ok=True)
                return False
            os.link(kept, path)
        except OSError:
            return False
        return True

    def keep(self, facts: Facts, data: bytes, path: Path) -> None:
        """Keep a file that was brought. On a file system without links none is kept."""
        if len(data) != facts.bytes:  # of a version that came since
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.link(path, self.folder / _name(facts, data))

    def sweep(self, current: Iterable[Facts]) -> None:
        """Remove what is of other versions."""
        digests = set(map(_digest, current))
        for digest, name in self._names.items():
            if digest not in digests:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)


def _digest(facts: Facts) -> str:
    told = f"{facts.path}\0{facts.e_tag}\0{facts.bytes}".encode(errors="surrogateescape")
    return hashlib.blake2b(told, digest_size=16).hexdigest()


def _name(facts: Facts, data: bytes) -> str:
    return f"{_digest(facts)}.{crc32c(data):08x}"


def sweep_processes(folder: Path) -> None:
    """Remove the folders of processes of this machine that have ended."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if is_writer(path.name) and is_here(path.name) and not is_alive(path.name):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write a file at, which is then renamed. Nothing is synced: what is lost is
    brought again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{writer_id()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
