"""What commands share in talking to people: sizes, tables, JSON or text, and the pictures a command works on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from featcache.errors import UsageError
from featcache.pictures import open_source as images

LOG_EVERY_S = 30.0  # between two lines of progress where stderr is no terminal


def given_images(spec: str | None) -> str:
    """--images, or FEATCACHE_IMAGES, or one line that says what may be given."""
    spec = spec or os.environ.get("FEATCACHE_IMAGES")
    if not spec:
        raise UsageError(f"no pictures given: --images SRC is {images.ALLOWED}; FEATCACHE_IMAGES sets a default")
    return spec


def facts_or_text(facts: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(facts) if as_json else text)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(999), size(1_512_960), size(1.94e12)
    ('999 B', '1.5 MB', '1.94 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 0 if unit == "B" else 1) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns as wide as they need; those numbered in `right` are set to the right. The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    flush = set(right)
    lines = [
        "  ".join(
            cell.rjust(w) if i in flush else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


class Bar:
    """A progress bar at a terminal, a line now and then elsewhere: `bar(done, total)`."""

    def __init__(self, what: str, unit: str, text: Callable[[int, int], str] = lambda done, total: "") -> None:
        self.what, self.unit, self.text = what, unit, text
        self._bar: Any = None
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        import sys
        import time

        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=total, desc=self.what, unit=self.unit, dynamic_ncols=True)
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if note := self.text(done, total):
                self._bar.set_postfix_str(note)
        elif time.monotonic() - self._last >= LOG_EVERY_S:
            if self._last:
                note = self.text(done, total)
                click.echo(f"{self.what}: {done} of {total} {self.unit}{', ' * bool(note)}{note}", err=True)
            self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
