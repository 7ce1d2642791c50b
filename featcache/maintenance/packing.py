"""Pictures are read ahead by threads for packing; tars and .beton refuse the same sizes and list
classes in the same way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from featcache.errors import UsageError
from featcache.extraction.rendering import prefetch
from featcache.pictures.source import Source


def check_resize(resize_px: int | None) -> None:
    """Raise UsageError for a shorter side without a pixel."""
    if resize_px is not None and resize_px < 1:
        raise UsageError(
            f"--resize {resize_px}: the shorter side has 1 pixel or more; give 256, or leave it out"
        )


def classes_json(source: Source) -> bytes:
    """Return the names of the classes, a line each; null where the source does not name them."""
    return (json.dumps(source.classes, ensure_ascii=False, indent=0) + "\n").encode()


@contextlib.contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool for `read_ahead`; after an error, or Ctrl-C, it reads no further picture."""
    with ThreadPoolExecutor() as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_ahead(
    pool: ThreadPoolExecutor,
    work: Callable[[int], Any],
    rows: Sequence[int],
    window: int,
    label: str,
) -> Iterator[Any]:
    """Yield work(row) in the order of the rows, at most `window` of them in memory, under a
    progress bar at a terminal."""
    futures = prefetch(pool, work, rows, window)
    # disable=None: shown only on a terminal
    for _, future in tqdm(futures, total=len(rows), unit="picture", desc=label, disable=None):
        yield future.result()
