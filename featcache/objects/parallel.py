"""Requests are made several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")


def in_parallel(work: Callable[[Given], None], given: Sequence[Given], most: int) -> None:
    """Do work for each, at most so many at a time. Raises the first error; nothing more is begun
    then."""
    if len(given) < 2:
        for each in given:
            work(each)
        return
    with ThreadPoolExecutor(most, "featcache-objects") as pool:
        waiting = [pool.submit(work, each) for each in given]
        try:
            for done in waiting:
                done.result()
        finally:
            for done in waiting:
                done.cancel()
