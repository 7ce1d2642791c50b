"""The pictures of a shard are chosen from what is extracted, where nobody says how many.

A shard is the unit of resuming, sharing and repair, and its features are one file. So few of them
waste what was done before a stop, and many are many files. The choice is a pure function of
pictures, views and bytes a view, and never of processes or devices: it is part of a cache's
identity, which all who work on it must find alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from featcache.extraction.plan import Plan

AUTO = "auto"
MOST, LEAST = 1024, 64
SHARDS = 16  # of a small source, so that as many processes can share it
FILE_BYTES = 1 << 30


def auto_rows(pictures: int, views: int, view_bytes: int) -> int:
    """Return the pictures of a shard: 1,024, or what fills 1 GiB, or a sixteenth of all pictures,
    whichever is least, but at least 64.

    >>> auto_rows(1_281_167, 1, 200_000), auto_rows(1_281_167, 4, 1_500_000), auto_rows(5_000, 1, 9)
    (1024, 178, 313)
    >>> auto_rows(600, 4, 1_500_000), auto_rows(1_281_167, 4, 12_000_000)
    (64, 64)
    """
    filling = FILE_BYTES // max(views * view_bytes, 1)
    return max(LEAST, min(MOST, filling, -(-pictures // SHARDS)))


def with_auto_rows(plans: Sequence[Plan]) -> list[Plan]:
    """Return plans of one pass with the shards that the first one's sizes choose: the cache is the
    same one, whatever is extracted beside it."""
    first = plans[0]
    return with_rows(plans, auto_rows(len(first.source), first.views, first.view_bytes))


def with_rows(plans: Sequence[Plan], rows: int) -> list[Plan]:
    """Return plans of one pass with so many pictures a shard."""
    return [replace(plan, rows_per_shard=rows) for plan in plans]
