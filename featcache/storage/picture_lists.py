"""The pictures of a cache are one list, or several where some were appended (`extract --append`).

`identity.pictures` is the list that the cache was begun with, `identity.appended` those that came
later, in order. So an identity without its last lists is the one that the cache had before, and its
ids of then follow from it. The shards of a list begin a shard of their own: what was there before
keeps its shards, rows and names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from featcache.storage.json_file import digest
from featcache.storage.keys_digest import keys_digest

APPENDED = "appended"
SOURCES = "appended"  # of provenance: where the pictures of the later lists were
PictureList = Mapping[str, Any]  # count, keys_digest


def list_of(keys: Sequence[str]) -> dict[str, Any]:
    """Return what an identity says of a list of pictures."""
    return {"count": len(keys), "keys_digest": keys_digest(keys)}


def lists(identity: Mapping[str, Any]) -> list[PictureList]:
    """Return the lists of an identity, in order."""
    return [identity["pictures"], *identity.get(APPENDED, ())]


def fields(of: Sequence[PictureList]) -> dict[str, Any]:
    """Return the fields of an identity that hold these lists; nothing of appending where there is
    one."""
    first, *later = (dict(each) for each in of)
    return {"pictures": first, **({APPENDED: later} if later else {})}


def count(identity: Mapping[str, Any]) -> int:
    """Count the pictures of all lists."""
    return sum(each["count"] for each in lists(identity))


def shards(of: Sequence[PictureList], rows_per_shard: int) -> list[dict[str, Any]]:
    """Return the shards of lists: `name`, `first` picture and `count`, numbered through.

    >>> [tuple(s.values()) for s in shards([{"count": 3}, {"count": 1}], 2)]
    [('000000', 0, 2), ('000001', 2, 1), ('000002', 3, 1)]
    """
    ranges = [
        (first, min(rows_per_shard, end - first))
        for begin, end in _bounds(of)
        for first in range(begin, end, rows_per_shard)
    ]
    return [{"name": f"{i:06d}", "first": first, "count": n} for i, (first, n) in enumerate(ranges)]


def _bounds(of: Sequence[PictureList]) -> Iterator[tuple[int, int]]:
    ends = list(accumulate(each["count"] for each in of))
    return zip([0, *ends], ends, strict=False)


def find_run(of: Sequence[PictureList], keys: Sequence[str]) -> range | None:
    """Return which consecutive lists these keys are, in order; None where they are none."""
    bounds = list(_bounds(of))
    for first, (begin, _) in enumerate(bounds):
        for last in range(first, len(bounds)):
            if bounds[last][1] - begin == len(keys):
                chosen = range(first, last + 1)
                if match(of[first : last + 1], keys):
                    return chosen
    return None


def match(of: Sequence[PictureList], keys: Sequence[str]) -> bool:
    """Tell whether keys are those of lists, one after the other."""
    return sum(each["count"] for each in of) == len(keys) and all(
        keys_digest(keys[begin:end]) == each["keys_digest"]
        for each, (begin, end) in zip(of, _bounds(of), strict=True)
    )


def before(identity: Mapping[str, Any], lists: int) -> dict[str, Any]:
    """Return the identity that a cache had with its first `lists` lists."""
    own = {key: value for key, value in identity.items() if key != APPENDED}
    later = identity.get(APPENDED, [])[: lists - 1]
    return {**own, **({APPENDED: later} if later else {})}


def ids(identity: Mapping[str, Any]) -> list[str]:
    """Return the ids of a cache: its own first, then those that it had before pictures were
    appended, the latest first."""
    number = len(lists(identity))
    return [digest(before(identity, n))[:16] for n in range(number, 0, -1)]


def lists_at(identity: Mapping[str, Any], earlier: Mapping[str, Any]) -> int | None:
    """Return how many lists a cache had when its identity was `earlier`; None where it never
    was."""
    n = len(earlier.get(APPENDED, ())) + 1
    return n if before(identity, n) == earlier and n <= len(lists(identity)) else None


def is_computed(shards_listed: Iterable[Mapping[str, Any]], identity: Mapping[str, Any]) -> bool:
    """Tell whether shards are those that follow from the lists of an identity."""
    return list(shards_listed) == shards(lists(identity), identity["rows_per_shard"])
