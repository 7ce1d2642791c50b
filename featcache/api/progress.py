"""A call tells how far it is by a callback, and what a person should know by a logger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from featcache.errors import one_line

NOTE = "note: "


@dataclass(frozen=True)
class Progress:
    """Says how far a call is: `done` of `total` pictures, steps, epochs or fits of a `stage`.

    `rate` is of what is counted, a second, and `loss` that of the newest step whose loss is known;
    None where there is none.
    """

    stage: str
    done: int
    total: int
    rate: float | None = None
    loss: float | None = None


# Called in the thread of the caller; what it raises ends the work in order.
ProgressCallback = Callable[[Progress], object]


def ignore(progress: Progress) -> None:
    """Take no notice."""


def log_to(name: str) -> Callable[[str], None]:
    """Return what logs a line for the user: notes as warnings, all else as information."""
    logger = logging.getLogger(name)

    def say(text: str) -> None:
        line = one_line(text)
        level = logging.WARNING if line.startswith(NOTE) else logging.INFO
        logger.log(level, "%s", line.removeprefix(NOTE))

    return say
