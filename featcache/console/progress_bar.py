"""Progress bars: tqdm at a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click


class WaitingNote:
    """Says so once each time the number of shards changes that other processes hold."""

    def __init__(self) -> None:
        self._told = 0

    def __call__(self, shards: int) -> None:
        if shards != self._told:
            click.echo(f"note: waiting for {shards} shards that other processes work on", err=True)
        self._told = shards


def eta(left: float, rate: float) -> str:
    """The time that is left of so much work, at so much of it a second.

    >>> eta(7200, 2.0), eta(10**6, 1.0)
    ('ETA 01:00:00', 'ETA 11.6 days')
    """
    seconds = left / max(rate, 1e-9)
    return "ETA " + (
        time.strftime("%H:%M:%S", time.gmtime(seconds))
        if seconds < 86400
        else f"{seconds / 86400:.1f} days"
    )


LOG_EVERY_S = 30.0  # between two lines of progress where stderr is no terminal


class ProgressBar:
    """A progress bar at a terminal, a line now and then elsewhere: `bar(done, total)`."""

    def __init__(
        self, what: str, unit: str, text: Callable[[int, int], str] = lambda done, total: ""
    ) -> None:
        self.what, self.unit, self.text = what, unit, text
        self._bar: Any = None
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        import sys
        import time

        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(
                total=total, desc=self.what, unit=self.unit, dynamic_ncols=True
            )
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if note := self.text(done, total):
                self._bar.set_postfix_str(note)
        elif time.monotonic() - self._last >= LOG_EVERY_S:
            if self._last:
                note = self.text(done, total)
                click.echo(
                    f"{self.what}: {done} of {total} {self.unit}{', ' * bool(note)}{note}", err=True
                )
            self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
