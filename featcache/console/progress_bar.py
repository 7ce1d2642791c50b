"""Progress is shown by tqdm at a terminal, and by a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from featcache.console import log_file
from featcache.console.text import is_copied, log, say
from featcache.errors import counted, printable


class WaitingNote:
    """Prints a note whenever the number of shards that other processes hold has changed."""

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self._say = say
        self._told = 0

    def __call__(self, shards: int) -> None:
        if shards != self._told:
            self._say(f"note: waiting for {counted(shards, 'shard')} that other processes work on")
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


# tqdm's own, less its rate
_WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LOG_EVERY_S = 30.0  # between two lines of progress where stderr is no terminal


class ProgressBar:
    """Shows how much of some work is done: a bar at a terminal, a line now and then elsewhere.

        bar = ProgressBar("verify", "shards")
        bar(done, total)  # any number of times
        bar.close()

    `text` gives what stands behind the bar, asked for only where it is shown; empty keeps what
    stood there before. `first` was done by an earlier command, and no rate counts it. A text that
    is `rated` has a rate of its own, in another unit, and takes the place of the bar's. Nothing is
    shown unless `enabled`. A line begins with the time, in UTC; work of less than half a minute has
    none, and other work has one of its end.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        text: Callable[[int, int], str] = lambda done, total: "",
        *,
        first: int = 0,
        rated: bool = False,
        smoothing: float = 0.3,
        enabled: bool = True,
    ) -> None:
        self.what, self.unit, self.text = what, unit, text
        self.first, self.smoothing, self.enabled = first, smoothing, enabled
        self.rated = rated
        self._started = time.monotonic()
        self._bar: Any = None
        self._last: float | None = None  # when a line was due
        self._untold: tuple[int, int] | None = None  # what came after the last line
        self._spoke = False

    def __call__(self, done: int, total: int) -> None:
        at_terminal = sys.stderr.isatty()
        if self.enabled and at_terminal:
            self._show(done, total)
        if self.enabled and (not at_terminal or is_copied()):
            self._untold = done, total
            if self._last is None:
                self._last = time.monotonic()
            elif time.monotonic() - self._last >= LOG_EVERY_S:
                self._say(done, total)

    def _say(self, done: int, total: int) -> None:
        self._last, self._untold, self._spoke = time.monotonic(), None, True
        line = ", ".join([f"{self.what}: {done} of {total} {self.unit}", *self._about(done, total)])
        tell = log if sys.stderr.isatty() else say  # beside the bar, to a --log-file alone
        tell(f"{log_file.stamp()} {line}")

    def _about(self, done: int, total: int) -> list[str]:
        """Write rate, time left and text, by the pace since this work began: what was done before
        says nothing."""
        rate = (done - self.first) / max(time.monotonic() - self._started, 1e-9)
        pace = [] if self.rated else [f"{rate:,.{1 if rate < 10 else 0}f} {self.unit}/s"]
        left = [eta(total - done, rate)]
        note = [text] if (text := self.text(done, total)) else []
        known = rate > 0  # of none nothing is said
        return [*note, *left * known] if self.rated else [*(pace + left) * known, *note]

    def _show(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=total, desc=printable(self.what), unit=self.unit, initial=self.first,
                dynamic_ncols=True, smoothing=self.smoothing,
                bar_format=_WITHOUT_RATE if self.rated else None,
            )  # fmt: skip
        self._bar.total = total
        if note := self.text(done, total):
            self._bar.set_postfix_str(printable(note), refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._spoke and self._untold is not None:
            self._say(*self._untold)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
