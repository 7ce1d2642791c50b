"""The files of a cache in an object store, as who has mounted it at a folder looks at them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, UserError
from featcache.objects.client import COALESCE_BYTES, Client, Facts
from featcache.objects.parallel import in_parallel
from featcache.objects.url import ObjectUrl
from featcache.storage import json_file, manifest
from featcache.storage.files import Held
from featcache.storage.kept_files import KeptFiles, replaced
from featcache.storage.object_lease import LeaseTable, ObjectLease
from featcache.storage.object_listing import list_objects
from featcache.storage.object_names import (
    describes,
    is_of_shard,
    is_record,
    lease_of,
    record_of,
)
from featcache.storage.owner import writer_id
from featcache.storage.posix_io import read_error
from featcache.storage.stage import Piece, Stage, groups, joined_gap
from featcache.storage.store import SHARDS, STORES

RECORD = "record.json"  # in the folder of a shard, until it is published
STALE_S = 90.0  # of a lease that nobody renews
_AT_ONCE = 16  # requests in flight
_UPLOADS_AT_ONCE = 2  # files, each in some parts at once


class Mount:
    """Answers for the files of a cache in an object store: see files.Files. `folder` is this
    process's own; what describes the cache is kept beside it for others."""

    may_be_far = True

    def __init__(self, url: ObjectUrl, folder: Path, requests: Client) -> None:
        self.url, self.folder, self._requests = url, folder, requests
        self._root = f"{folder}/"
        self.objects: dict[str, Facts] = {}
        self.leases: dict[str, Facts] = {}
        self.others: list[str] = []  # objects that are no cache's
        self.card: Facts | None = None
        self.kept = KeptFiles(folder.parent / "kept")
        self._here: dict[str, Facts] = {}  # what describes the cache, as it lies in the folder
        self._listed_names: frozenset[str] = frozenset()
        self.lease_table = LeaseTable(requests, STALE_S)
        self._held: list[ObjectLease] = []
        self.stage: Stage | None = None

    def use(self, requests: Client) -> None:
        """Make requests by another client from now on: credentials may be others."""
        self._requests = self.lease_table.requests = requests

    # ---- what describes the cache

    def refresh(self) -> None:
        """List the objects, and bring what describes the cache where it has changed."""
        found = list_objects(self._requests, self.url)
        self.objects, self.leases = found.objects, found.leases
        self.others, self.card = found.others, found.card
        for name in set(self._described()) - self.objects.keys():
            if self._look(name) is None:  # and not only that the list is behind
                self._forget(name)
        if not self.objects:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._listed_names = frozenset(self.objects)
        self.kept.look()
        changed = [name for name in self.objects if describes(name) and self._is_other(name)]
        for name in filter(is_record, changed):  # with what was brought of another shard
            self._forget_shard(name)
        manifests = [name for name in changed if name.rpartition("/")[2] == manifest.NAME]
        in_parallel(self._bring_small, manifests, _AT_ONCE)
        others = [name for name in changed if name not in manifests and self._is_wanted(name)]
        in_parallel(self._bring_small, others, _AT_ONCE)
        self.kept.sweep(facts for name, facts in self.objects.items() if describes(name))

    def _described(self) -> Iterator[str]:
        """Yield the names of what describes the cache here."""
        for path in _files_below(self.folder):
            if describes(name := self._name(path)):
                yield name

    def _is_other(self, name: str) -> bool:
        here = self._here.get(name)
        same = here is not None and here.e_tag == self.objects[name].e_tag
        return not same or not (self.folder / name).is_file()

    def _is_wanted(self, name: str) -> bool:
        """Return whether a file belongs to the cache: weights may lie beside one."""
        if not name.endswith(".safetensors") or SHARDS in name.split("/"):
            return True
        folder, _, file = name.rpartition("/")
        try:
            return file in manifest.read(self.folder / folder)["files"]
        except UserError:  # which is told by who reads it
            return True

    def _bring_small(self, name: str) -> None:
        facts, path = self.objects[name], self.folder / name
        if facts.bytes > json_file.LARGEST_BYTES:
            raise UserError(
                f"{self.url.join(name)} has {facts.bytes} bytes, and no cache has such a file; "
                "give the URL of a cache"
            )
        data = None
        try:
            with replaced(self.folder / name) as temporary:
                if not self.kept.link(facts, temporary):
                    data = self._requests.read(facts.path)
                    temporary.write_bytes(data)
        except FileNotFoundError:  # gone since it was listed
            self.objects.pop(name, None)
            self._forget(name)
            return
        self._here[name] = facts
        if data is not None:
            self.kept.keep(facts, data, path)

    def _forget(self, name: str) -> None:
        """Remove a file that describes something, with the rows that it describes."""
        (self.folder / name).unlink(missing_ok=True)
        self._here.pop(name, None)
        if is_record(name):
            self._forget_shard(name)

    def _forget_shard(self, record: str) -> None:
        for store in STORES:
            shutil.rmtree((self.folder / record).with_suffix(f".{store}"), ignore_errors=True)

    # ---- files.Files

    def holds_others(self) -> bool:
        return bool(self.others)

    def address(self, folder: Path) -> str:
        return str(self.url.join(self._name(folder)) if folder != self.folder else self.url)

    def size(self, path: str) -> int:
        facts = self._known(self._name(path))
        if facts is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return facts.bytes

    def is_far(self, path: str) -> bool:
        return not Path(path).is_file()

    def bring(self, paths: Iterable[str]) -> None:
        """Bring whole files; one that the object store lacks is left for who looks at it."""
        far = [path for path in paths if self.is_far(path)]
        there = [path for path in far if self._known(self._name(path))]
        in_parallel(self._bring, there, _AT_ONCE)

    def _bring(self, path: str) -> None:
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError), replaced(self.folder / name) as temporary:
            self._requests.download(self.object_name(name), temporary, self.size(path))

    def drop(self, paths: Iterable[str]) -> None:
        """Remove files of shards that were brought."""
        for path in paths:
            if is_of_shard(self._name(path)):
                Path(path).unlink(missing_ok=True)

    def read_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Any]:
        name, stage = self._name(path), self.stage
        if stage is None:
            return self._fetched(name, starts, lengths)
        pieces = self._pieces(name, starts, lengths)
        found = [stage.read(piece) for piece in pieces]
        lacking = [i for i, data in enumerate(found) if data is None]
        fetched = self._fetched(name, [starts[i] for i in lacking], [lengths[i] for i in lacking])
        for i, data in zip(lacking, fetched, strict=True):
            found[i] = data
        return found

    def distrust(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> bool:
        if self.stage is None:
            return False
        return self.stage.distrust(self._pieces(self._name(path), starts, lengths))

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> bool:
        stage, done = self.stage, True
        if stage is None:
            raise UsageError("what is read ahead needs a stage: give the cache one by set_stage")
        lacking: dict[Piece, str] = {}
        for path, *where in wanted:
            (piece,) = self._pieces(self._name(path), *([each] for each in where))
            if not stage.holds(piece):
                lacking[piece] = self._name(path)
        for group in groups(list(lacking)):
            room = stage.make_room(group)
            done = room and self._stage(stage, group, lacking) and done
            if not done:
                break
        return done

    def set_stage(self, folder: Path, limit: int | None, shares: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        whole = shutil.disk_usage(folder).free // 2 if limit is None else limit
        self.stage = Stage(folder, whole // shares)

    def _stage(self, stage: Stage, group: Sequence[Piece], names: Mapping[Piece, str]) -> bool:
        """Fetch pieces of several files at once, and keep them."""
        by_name: dict[str, list[Piece]] = {}
        for piece in group:
            by_name.setdefault(names[piece], []).append(piece)
        data: dict[Piece, Any] = {}
        gap = joined_gap(group)

        def get(name: str) -> None:
            pieces = by_name[name]
            starts, lengths = [each.offset for each in pieces], [each.bytes for each in pieces]
            found = self._fetched(name, starts, lengths, gap)
            data.update(zip(pieces, found, strict=True))

        in_parallel(get, list(by_name), _AT_ONCE)
        return stage.keep(group, [data[piece] for piece in group])

    def _fetched(
        self,
        name: str,
        starts: Sequence[int],
        lengths: Sequence[int],
        coalesce: int = COALESCE_BYTES,
    ) -> list[Any]:
        if not starts:
            return []
        try:
            return self._requests.read_ranges(self.object_name(name), starts, lengths, coalesce)
        except FileNotFoundError as error:
            missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise read_error(str(self.folder / name), missing) from error

    def _pieces(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[Piece]:
        facts = self.objects.get(name)
        file = f"{self.object_name(name)}@{facts.e_tag if facts else ''}"
        return [Piece(file, *each) for each in zip(starts, lengths, strict=True)]

    def publish(self, folder: Path, final: Path, record: Path) -> bool:
        """Upload a shard under its lease, then its record where there is none yet: the shard is
        complete by it. Nothing of it stays here but the record, of whoever was faster. Raises
        UserError where another has taken the lease over."""
        name, data = self._name(record), (folder / RECORD).read_bytes()
        if self._look(name) is None:
            below = [path.relative_to(folder).as_posix() for path in _files_below(folder)]
            pairs = {f"{self._name(final)}/{each}": folder / each for each in below}
            pairs.pop(f"{self._name(final)}/{RECORD}")

            def upload(each: str) -> None:
                self._check_held(name)
                self._upload(each, pairs[each])

            in_parallel(upload, list(pairs), _UPLOADS_AT_ONCE)
            self._check_held(name)
            if self._requests.create(self.object_name(name), data) is not None:
                self._mend(f"{self._name(final)}/", pairs)
        self._bring_looked_up(name)
        shutil.rmtree(folder, ignore_errors=True)
        return True

    def _mend(self, start: str, pairs: Mapping[str, Path]) -> None:
        """Upload again what somebody wrote over whose lease was taken: the record is this one's."""
        there = {facts.path: facts.e_tag for facts in self._requests.list(self.object_name(start))}
        for each, path in pairs.items():
            own = self.objects[each].e_tag
            if there.get(self.object_name(each), own) != own:
                self._upload(each, path)

    def _check_held(self, record: str) -> None:
        wanted = self.object_name(lease_of(record))
        if any(lease.name == wanted and lease.lost for lease in self._held):
            raise UserError(
                f"{self.url.join(record)}: another process has taken this shard over, since this "
                "one did not answer for 90 seconds; run the same command again"
            )

    def changed(self, path: Path) -> None:
        name = self._name(path)
        if not describes(name):  # what is only here, such as a temporary file
            return
        file = name.rpartition("/")[2]
        if file == manifest.NAME and name not in self.objects:  # of two, who was faster
            self._requests.create(self.object_name(name), path.read_bytes())
            self._bring_looked_up(name)
        elif path.is_file():
            if file == manifest.COPY and name not in self.objects:  # of the manifest that is there
                whole = path.parent.parent / manifest.NAME
                path.write_bytes((whole if whole.is_file() else path).read_bytes())
            self._upload(name, path)
            self._here[name] = self.objects[name]
        else:
            self._requests.delete([self.object_name(name)])
            self.objects.pop(name, None)
            self._here.pop(name, None)

    def create(self, path: Path, data: bytes) -> bool | None:
        name = self._name(path)
        absent = self._requests.create(self.object_name(name), data) is not None
        self.look(path)
        return absent

    def look(self, path: Path) -> None:
        if not path.is_file():
            self._bring_looked_up(self._name(path))

    def hold(self, path: Path, owner: str) -> Held | None:
        lease = self.lease_table.acquire(self.object_name(self._name(path)), owner)
        if lease is not None:
            self._held = [each for each in self._held if not each.lost] + [lease]
        return lease

    def clear_lease(self, path: Path, owner: str) -> None:
        name = self._name(path)
        if name in self.leases or record_of(name) not in self._listed_names:
            self.lease_table.clear(self.object_name(name), owner)
            self.leases.pop(name, None)

    def release_all(self) -> None:
        for lease in self._held:
            with contextlib.suppress(UserError):  # the store is down, and it goes stale
                lease.release()

    def store_time(self) -> float:
        """Return the time by the store's own clock, as unix seconds."""
        name = self.object_name(f"{SHARDS}/.{writer_id()}.tmp")
        self._requests.put(name, b"")
        try:
            facts = self._requests.facts(name)
        finally:
            self._requests.delete([name])
        return facts.modified if facts is not None else time.time()

    def exists(self, name: str) -> bool:
        return self._look(name) is not None

    def read_start(self, name: str, count: int) -> bytes:
        """Return the first bytes of an object; fewer where it is shorter."""
        facts = self._requests.facts(self.object_name(name))
        if facts is None or not facts.bytes:
            return b""
        return self._requests.read_range(facts.path, 0, min(count, facts.bytes), facts.e_tag)

    def put(self, name: str, data: bytes) -> None:
        """Write an object beside those of the cache, such as its card."""
        self._requests.put(self.object_name(name), data)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, and what is here of them."""
        self._requests.delete([self.object_name(name) for name in names])
        for name in names:
            self._forget(name)
            self.objects.pop(name, None)
            self.leases.pop(name, None)

    def _upload(self, name: str, path: Path) -> None:
        e_tag = self._requests.put(self.object_name(name), path)
        self.objects[name] = Facts(self.object_name(name), path.stat().st_size, e_tag, time.time())

    def _bring_looked_up(self, name: str) -> None:
        """Bring a file as it lies in the object store now, where it does."""
        if self._look(name) is not None:
            self._bring_small(name)

    def _known(self, name: str) -> Facts | None:
        """Return what the listing says of an object, which may be behind; else what the object
        store says of it."""
        return self.objects.get(name) or self._look(name)

    def _look(self, name: str) -> Facts | None:
        """Ask the object store itself, where another may have written."""
        found = self._requests.facts(self.object_name(name))
        if found is not None:
            self.objects[name] = found
        return found

    # ---- names and files

    def _name(self, path: str | Path) -> str:
        return str(path)[len(self._root) :]

    def object_name(self, name: str) -> str:
        return f"{self.url.path}/{name}" if self.url.path else name


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
