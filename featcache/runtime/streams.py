"""Standard streams take whatever is written to them, closed ones and those of a C locale too."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TextIO


def prepare() -> None:
    """Open closed standard streams on the null device, and escape what an encoding lacks.

    A closed descriptor would be that of the next file opened: what a library writes to stderr
    would then lie in a cache.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if _is_closed(number):
            _open_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_broken(stream: TextIO) -> bool:
    """Return whether nobody reads a stream any more, which is a pipe."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file, as in a test
        return False


def silence(stream: TextIO) -> None:
    """Let what a stream still holds, and all that is written to it from now on, go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False


def _open_null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)
