"""A lease says which process works on a shard, so that several processes share the work.

They only save work: a result is right without them, since the loser of a race for a shard discards
its own. A lease is a small file that its holder touches; one that nobody has touched for a while,
or whose process is gone, is taken over.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path

from featcache.errors import UserError
from featcache.storage import commit, json_file
from featcache.storage.files import Held, files_of
from featcache.storage.own_folder import linked_folder, own_shards
from featcache.storage.owner import is_alive, is_here, is_own, is_writer, writer_id
from featcache.storage.store import SHARDS

# without a touch; several times the interval, since clocks of a shared file system are coarse
STALE_S = 90.0
TOUCH_S = 15.0
_MOST_BYTES = 1024  # of a lease, which holds HOST-PID-NONCE; a host's name has 64 at most


class Lease:
    """Holds one shard until `release`; a thread keeps the lease fresh."""

    def __init__(self, path: Path, held: Held) -> None:
        self.path, self._held = path, held
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="featcache-lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._done.wait(TOUCH_S):
            # taken over, or the folder is gone: the work itself will tell
            with contextlib.suppress(OSError):
                os.utime(self.path)
            with contextlib.suppress(UserError):
                self._held.renew()

    def release(self) -> None:
        self._done.set()
        self._thread.join()
        self._held.release()
        self.path.unlink(missing_ok=True)


def lease_path(cache: Path, shard: str) -> Path:
    return cache / SHARDS / f"{shard}.lease"


def acquire(cache: Path, shard: str) -> Lease | None:
    """Take the lease of a shard, or None while somebody else holds it."""
    own_shards(cache)
    path, own = lease_path(cache, shard), writer_id()
    probe = path.with_name(f".{path.name}.{own}.tmp")
    try:
        probe.write_text(own)
    except FileNotFoundError as error:
        raise commit.cache_gone_error(cache) from error
    try:
        if not json_file.link_or_create(probe, path) and not (
            is_stale(path, probe.stat().st_mtime) and _replace(path, probe)
        ):
            return None
    finally:
        probe.unlink(missing_ok=True)
    try:
        held = files_of(path).hold(path, own)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if held is None:
        path.unlink(missing_ok=True)
        return None
    return Lease(path, held)


def _replace(path: Path, probe: Path) -> bool:
    """Take over. Two may do so at once; then both work, and one of them discards."""
    probe.replace(path)
    return True


def abort(cache: Path) -> None:
    """Remove the leases of this process, whatever it was doing when it was interrupted."""
    files_of(cache).release_all()
    for path in [] if linked_folder(cache) else (cache / SHARDS).glob("*.lease"):
        with contextlib.suppress(OSError):
            if path.is_file() and is_own(_read(path)):
                path.unlink()


def clear_stale(cache: Path, shard: str) -> None:
    """Remove what a dead holder left of a shard that is complete."""
    own_shards(cache)
    path = lease_path(cache, shard)
    if path.is_file() and not is_held(cache, shard):
        path.unlink(missing_ok=True)
    files_of(path).clear_lease(path, writer_id())


def is_stale(path: Path, now: float) -> bool:
    """Return whether a lease's holder is gone; `now` by the file system's own clock."""
    if not _is_lease(path):
        raise UserError(
            f"{str(path)!r} is no lease, which is a plain file of a few words; move it away and "
            "run the same command again"
        )
    try:
        owner, touched = _read(path), path.stat().st_mtime
    except OSError:  # released in this moment: the next round will see
        return False
    if is_here(owner):
        return not is_alive(owner)
    # a time to come is of a clock that was set back since
    return not -STALE_S <= now - touched <= STALE_S


def _is_lease(path: Path) -> bool:
    """Whether a file can be a lease, or is gone in this moment."""
    try:
        facts = path.lstat()
    except OSError:
        return True
    return stat.S_ISREG(facts.st_mode) and facts.st_size <= _MOST_BYTES


def _read(path: Path) -> str:
    """Who holds a lease; a few letters more than it may have, of another file."""
    with path.open(errors="replace") as file:
        return file.read(_MOST_BYTES + 1)


def is_of_writer(path: Path) -> bool:
    """Return whether a file is a lease that a writer of ours left."""
    try:
        return not path.is_symlink() and _is_lease(path) and is_writer(_read(path))
    except OSError:
        return False


def is_held(cache: Path, shard: str) -> bool:
    """Return whether somebody works on a shard."""
    own_shards(cache)
    path = lease_path(cache, shard)
    probe = path.with_name(f".{path.name}.{writer_id()}.tmp")
    probe.touch()
    try:
        return path.is_file() and not is_stale(path, probe.stat().st_mtime)
    finally:
        probe.unlink(missing_ok=True)
