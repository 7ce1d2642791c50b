"""A run of several processes speaks with one voice: that of a command at a terminal, or of a Python
call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from featcache.catalog.account import Begun
from featcache.console.text import print_facts, say
from featcache.errors import STOPPED, StoppedError, one_line
from featcache.runtime import signals
from student.training.progress_bar import Display, shown


@dataclass(frozen=True)
class Voice:
    """Says what happens while a run is made: lines for the user, and the steps."""

    tell: Callable[[str], None]
    display: Display
    ends_process: bool = False  # a stopped run ends the processes that do not speak by their status


TERMINAL = Voice(say, shown, ends_process=True)


@dataclass(frozen=True)
class Console:
    """The first process of a run speaks, all others say nothing."""

    speaks: bool
    voice: Voice = TERMINAL
    # it is made before all else: what a run costs is counted from here
    begun: Begun = field(default_factory=Begun, repr=False)

    def say(self, text: str) -> None:
        if self.speaks:
            self.voice.tell(one_line(text))

    def stopped(self, error: StoppedError) -> StoppedError | SystemExit:
        """Return what a run that was stopped raises: one line, by one process of a command."""
        self.end()
        return error if self.speaks or not self.voice.ends_process else SystemExit(STOPPED)

    def end(self) -> None:
        """Let nothing take its last line and status from a command that has stopped or failed."""
        if self.voice.ends_process:
            signals.ignore_notices()

    @contextlib.contextmanager
    def notes_of_one(self) -> Iterator[None]:
        """Keep the notes of a logger, as on pictures, to the process that speaks."""
        logger = logging.getLogger("featcache")
        before = logger.level
        if not self.speaks:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


@dataclass(frozen=True)
class Told:
    """Holds what a run has found, as plain JSON and as text, and whether this process says it."""

    facts: dict[str, Any]
    text: str
    speaks: bool

    def print(self, as_json: bool) -> None:
        if self.speaks:
            print_facts(self.facts, as_json, self.text)
