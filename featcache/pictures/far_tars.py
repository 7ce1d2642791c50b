"""Pictures of webdataset tars in an object store: `s3://bucket/train-{000..146}.tar`.

Headers of members are read by small ranges the first time, and kept on this machine
(`far_headers`). Pictures are read by ranges, ahead of time where they are read in their order
(`far_reader`). Each request asks for the version that was listed.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, TypeVar, cast

from featcache.errors import UserError
from featcache.objects.client import Client, Facts, client
from featcache.objects.url import ObjectUrl, parse
from featcache.pictures import far_headers
from featcache.pictures.far_headers import FarFile, Pieces
from featcache.pictures.far_reader import ReadAhead
from featcache.pictures.patterns import expand_braces
from featcache.pictures.regular_file import check_size
from featcache.pictures.spec import Spec
from featcache.pictures.stamps import Told
from featcache.pictures.tars import TarSource, open_tars

_AT_ONCE = 16  # requests
Result = TypeVar("Result")


def open_far_tars(spec: Spec) -> TarSource:
    """Open the tars that a URL, a brace pattern or a glob names. Raises UserError where one does
    not exist, and where there is none."""
    spec.check_kind("tars")
    found = dict(_expand(spec.path))
    files = FarTars({str(url): (url, facts) for url, facts in found.items()})
    return open_tars(spec.path, [*files.facts], member=spec.image_member, files=files)


class FarTars:
    """Tars in an object store, by their URLs: see tar_files.TarFiles."""

    def __init__(self, facts: dict[str, tuple[ObjectUrl, Facts]]) -> None:
        self.facts = facts
        self._ahead = ReadAhead(self._read)
        self._kept = lru_cache(2)(self._load)
        self._open: dict[str, Pieces] = {}  # of tars whose headers are read now

    def __reduce__(self) -> tuple[type[FarTars], tuple[dict[str, tuple[ObjectUrl, Facts]]]]:
        return FarTars, (self.facts,)  # for workers, with connections of their own

    def open(self, path: str) -> IO[bytes]:
        def read(start: int, count: int) -> bytes:
            return self._read(path, start, count)

        return cast(IO[bytes], FarFile(read, self.facts[path][1].bytes, self._open[path]))

    def map(self, work: Callable[[str], Result], paths: Sequence[str]) -> Iterator[Result]:
        with ThreadPoolExecutor(_AT_ONCE, "featcache-tars") as pool:
            waiting = [pool.submit(self._indexed, work, path) for path in paths]
            try:
                yield from (each.result() for each in waiting)
            finally:
                for each in waiting:  # after an error nothing more is begun
                    each.cancel()

    def _indexed(self, work: Callable[[str], Result], path: str) -> Result:
        """Do work that opens a tar, and keep the headers that it reads."""
        pieces = self._open[path] = self._load(path) or Pieces()
        try:
            done = work(path)
        finally:
            del self._open[path]
        far_headers.keep(path, self.facts[path][1], pieces)
        return done

    def read(
        self, path: str, offset: int, size: int, segments: Sequence[tuple[int, int]] | None = None
    ) -> bytes:
        check_size(size)
        if segments is None:
            return self._member(path, offset, size)
        out = bytearray(size)
        for begin, count in segments:
            out[begin : begin + count] = self._member(path, offset, count)
            offset += count
        return bytes(out)

    def told(self, path: str) -> Told:
        _, facts = self.facts[path]
        return facts.bytes, facts.e_tag

    def _member(self, path: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        if size <= far_headers.KEPT_AFTER:  # a label, behind its header
            kept = self._kept(path)
            data = kept.find(offset, size) if kept is not None else None
            if data is not None:
                return data
        return self._ahead.read(path, offset, size, self.facts[path][1].bytes)

    def _load(self, path: str) -> Pieces | None:
        return far_headers.load(path, self.facts[path][1])

    def _read(self, path: str, start: int, count: int) -> bytes:
        url, facts = self.facts[path]
        return client(url).read_range(url.path, start, count, facts.e_tag)


def _expand(text: str) -> Iterator[tuple[ObjectUrl, Facts]]:
    """Yield the objects that a URL with braces and globs names."""
    urls = [parse(each) for each in expand_braces(text)]
    with ThreadPoolExecutor(_AT_ONCE, "featcache-tars") as pool:
        for found in pool.map(_look, urls):
            yield from found


def _look(url: ObjectUrl) -> Iterable[tuple[ObjectUrl, Facts]]:
    requests = client(url)
    if glob.has_magic(url.path):
        found = list(_matches(requests, url))
    else:
        facts = requests.facts(url.path) if url.path else None
        found = [(url, facts)] if facts is not None else []
    if not found:
        raise UserError(
            f"no pictures found: there is no {url}; pictures in an object store are read from "
            "tars: s3://bucket/train-{000..146}.tar"
        )
    return found


def _matches(requests: Client, url: ObjectUrl) -> Iterator[tuple[ObjectUrl, Facts]]:
    """Yield the objects that a glob matches, by name; no part of it matches a slash."""
    parts = url.path.split("/")
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    start = "/".join([*parts[:plain], ""])
    for facts in sorted(requests.list(start), key=lambda facts: facts.path):
        names = facts.path.split("/")
        if len(names) == len(parts) and all(
            fnmatch.fnmatchcase(name, part) for name, part in zip(names, parts, strict=True)
        ):
            yield requests.place(facts.path), facts
