"""A call says its notes to the logger "student", and its steps to a callback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from featcache.api.progress import Progress, ProgressCallback, ignore, log_to
from student.setup.console import Voice
from student.training.progress_bar import Steps

say = log_to("student")


class _Steps:
    """Calls back after each step, in the process that speaks."""

    def __init__(self, total: int, callback: ProgressCallback) -> None:
        self.total, self.callback = total, callback
        self._row: dict[str, Any] = {}

    def update_with(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        self._row = rows[-1] if rows else self._row
        loss, rate = self._row.get("loss"), self._row.get("images_per_s")
        self.callback(Progress("train", step, self.total, rate, loss))

    def stopping(self) -> None:
        """Say nothing: the error that ends the call will."""


def voice(progress: ProgressCallback | None) -> Voice:
    """Return the voice of a call with this callback."""

    @contextlib.contextmanager
    def display(total: int, first: int, steps_per_epoch: int, speaks: bool) -> Iterator[Steps]:
        yield _Steps(total, (progress or ignore) if speaks else ignore)

    return Voice(say, display)
