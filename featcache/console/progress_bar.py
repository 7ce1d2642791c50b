"""Progress is shown by tqdm at a terminal, and by a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from featcache.console.text import echo, say
from featcache.errors import printable


class WaitingNote:
    """Prints a note whenever the number of shards that other processes hold has changed."""

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self._say = say
        self._told = 0

    def __call__(self, shards: int) -> None:
        if shards != self._told:
            self._say(f"note: waiting for {shards} shards that other processes work on")
        self._told = shards


def eta(left: float, rate: float) -> str:
    """Write the time that `left` units of work take at `rate` units a second.

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
    """Shows how much of some work is done: a bar at a terminal, a line now and then elsewhere.

        bar = ProgressBar("verify", "shards")
        bar(done, total)  # any number of times
        bar.close()

    `text` gives what stands behind the bar, asked for only where it is shown; empty keeps what
    stood there before. `first` was done by an earlier command. Without `lines` nothing is shown but
    at a terminal, and nothing at all unless `enabled`.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        text: Callable[[int, int], str] = lambda done, total: "",
        *,
        first: int = 0,
        smoothing: float = 0.3,
        lines: bool = True,
        enabled: bool = True,
    ) -> None:
        self.what, self.unit, self.text = what, unit, text
        self.first, self.smoothing, self.lines, self.enabled = first, smoothing, lines, enabled
        self._bar: Any = None
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        if self.enabled and sys.stderr.isatty():
            self._show(done, total)
        elif self.enabled and self.lines and time.monotonic() - self._last >= LOG_EVERY_S:
            if self._last:
                note = self.text(done, total)
                echo(
                    f"{self.what}: {done} of {total} {self.unit}{', ' * bool(note)}{note}", err=True
                )
            self._last = time.monotonic()

    def _show(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=total, desc=printable(self.what), unit=self.unit, initial=self.first,
                dynamic_ncols=True, smoothing=self.smoothing,
            )  # fmt: skip
        self._bar.total = total
        if note := self.text(done, total):
            self._bar.set_postfix_str(printable(note), refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
