"""Pictures that were renamed or moved are found in a cache by the bytes of their files.

n pictures of a source, r rows of a cache, D bytes of a digest.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from featcache.errors import IdentityError, UserError, counted
from featcache.pictures.file_digest import DIGEST_BYTES, file_digest
from featcache.pictures.source import PictureError, Source
from featcache.reading.cache import Cache
from featcache.reading.join import I64
from featcache.views import pixel_path
from featcache.views.renamed_source import RenamedSource

FIELD = "file_digest"
_ROWS = 1 << 16  # whose digests are read at once
_READ_AHEAD = 4  # files a thread

Progress = Callable[[int, int], None]  # pictures read, of how many


def rename(
    cache: Cache,
    source: Source,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> RenamedSource:
    """Return the pictures of a source under the keys that the cache has of their content, in the
    order of its rows. Every file is read, once.

    Pictures that cannot be decoded are left out, as many as the cache has in quarantine: those have
    no row. Raises UserError where the cache keeps no digests, IdentityError where it does not know
    a picture's content, or has it less often than the source.
    """
    if FIELD not in cache.fields:
        raise UserError(
            f"cache {str(cache.path)!r} holds no digests of its pictures' files, so that they are "
            "found by their keys alone: match by key, or extract again"
        )
    rows = _rows(cache, source, list(_digests(source, workers, progress)))
    known = rows >= 0
    strange = np.flatnonzero(~known).tolist()
    _check_unusable(cache, source, strange)
    order = np.flatnonzero(known)[np.argsort(rows[known])]
    names = [cache.keys[row] for row in rows[order].tolist()]
    return RenamedSource(source, names, order, tuple(source.keys[at] for at in strange))


def _digests(source: Source, workers: int, progress: Progress) -> Iterator[bytes]:
    """Yield the digest of each file, in order."""
    with ThreadPoolExecutor(workers) as pool:
        futures = deque(
            pool.submit(_digest, source, at)
            for at in range(min(len(source), workers * _READ_AHEAD))
        )
        for at in range(len(source)):
            digest = futures.popleft().result()
            if (following := at + 1 + len(futures)) < len(source):
                futures.append(pool.submit(_digest, source, following))
            progress(at + 1, len(source))
            yield digest


def _digest(source: Source, index: int) -> bytes:
    try:
        return file_digest(source.read(index))
    except (PictureError, OSError) as error:
        raise UserError(
            f"picture {source.keys[index]!r} cannot be read: {error}; fix this and run again"
        ) from error


def _rows(cache: Cache, source: Source, digests: list[bytes]) -> I64:
    """Return the row (n,) of each picture, -1 where its content is not known. Of equal ones the row
    of the same key comes first, then those that are left, in order."""
    rows_of = defaultdict[bytes, list[int]](list)
    wanted = set(digests)
    for first in range(0, len(cache), _ROWS):
        numbers = np.arange(first, min(first + _ROWS, len(cache)))
        stored: npt.NDArray[np.uint8] = cache.read(numbers, 0, (FIELD,))[FIELD]
        for row, digest in enumerate(stored.reshape(-1, DIGEST_BYTES), first):
            if (own := digest.tobytes()) in wanted:
                rows_of[own].append(row)
    found = np.full(len(digests), -1, np.int64)
    for at, row in enumerate(cache.keys.find(source.keys).tolist()):
        if row in rows_of[digests[at]]:
            rows_of[digests[at]].remove(row)
            found[at] = row
    taken = {digests[at] for at in np.flatnonzero(found >= 0).tolist()}
    for at in np.flatnonzero(found < 0).tolist():
        if left := rows_of[digests[at]]:
            found[at] = left.pop(0)
            taken.add(digests[at])
        elif digests[at] in taken:
            raise IdentityError(
                f"picture {source.keys[at]!r} of {source.spec!r} has the content of another one "
                f"there, which cache {str(cache.path)!r} has less often; take the copy out"
            )
    return found


def _check_unusable(cache: Cache, source: Source, strange: list[int]) -> None:
    """Raise IdentityError for a picture whose content is not known, unless it cannot be decoded:
    then the extraction put it aside."""
    changed = []
    for at in strange:
        try:
            pixel_path.decode_picture(source, at)
        except PictureError:
            continue
        changed.append(source.keys[at])
    if not changed and len(strange) > len(cache.quarantined):
        raise IdentityError(
            f"{len(strange)} of {counted(len(source), 'picture')} of {source.spec!r} cannot be "
            f"decoded, the first is {source.keys[strange[0]]!r}, and cache {str(cache.path)!r} has "
            f"{len(cache.quarantined)} in quarantine; fix them, or take them out"
        )
    if changed:
        raise IdentityError(
            f"{len(changed)} of {counted(len(source), 'picture')} of {source.spec!r} have a "
            f"content that cache {str(cache.path)!r} does not know, the first is {changed[0]!r}; "
            "files that were written again have other bytes: give those of the extraction, or "
            "extract these"
        )
