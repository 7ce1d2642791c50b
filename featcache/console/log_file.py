"""`--log-file FILE` keeps the lines of stderr, each with its time in UTC, in a file as well.

Every line is one write to a file that is opened for it, so that a log may be moved away while work
goes on. Of the processes of a run the first alone writes.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import click

from featcache.catalog import home
from featcache.console import text
from featcache.console.option import HelpGroup, Option
from featcache.console.params import LocalPath
from featcache.errors import UserError

_STAMP = "%Y-%m-%dT%H:%M:%SZ"
_STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def stamp() -> str:
    """Return the time as the lines of a log have it."""
    return time.strftime(_STAMP, time.gmtime())


def option() -> Option:
    """Return the option that begins a log for the rest of the command."""
    return Option(
        ["--log-file"],
        group=HelpGroup.RUNNING,
        type=LocalPath(),
        expose_value=False,
        callback=_begin,
        help="Append what goes to stderr to this file too: notes, errors, progress twice a minute.",
    )


class LogFile:
    """Appends lines to a file; one that can no longer be written is said once and given up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, lines: str) -> None:
        try:
            self.append(lines)
        except OSError as error:
            text.copy_lines_to(None)
            text.say(f"note: --log-file {str(self.path)!r} ends here: {error.strerror}")

    def append(self, lines: str) -> None:
        now = stamp()
        stamped = [
            line if _STAMPED.match(line) else f"{now} {line}" for line in lines.split("\n") if line
        ]
        home.append_to(home.open_lines(self.path), "".join(f"{line}\n" for line in stamped))


def _begin(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    text.copy_lines_to(None)
    if path is None or ctx.resilient_parsing or os.environ.get("RANK", "0") != "0":
        return
    log = LogFile(path)
    try:
        log.append(f"$ {ctx.command_path}")
    except OSError as error:
        raise UserError(
            f"--log-file {str(path)!r}: {error.strerror}; a file in a folder that is there, or one "
            "that is not there yet, is needed"
        ) from error
    text.copy_lines_to(log)
