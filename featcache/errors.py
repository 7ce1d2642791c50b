"""Errors that a user can cause are one line each, which a command prints.

A `UserError` is one line with four parts: what failed, what was given, what is allowed, what to do
next. Commands print that line and exit; nobody sees a traceback for a mistake of their own.
Anything else that reaches the top is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

WORK_FAILED = 1  # the command was right, the work could not be done
COMMAND_WRONG = 2  # the command itself cannot be meant
# training was asked to stop and can go on: sysexits.h's EX_TEMPFAIL, which a scheduler may requeue
STOPPED = 75


class UserError(Exception):
    """Gives one line to the person at the keyboard; `exit_status` is 1 (the work failed) or 2 (the
    command was wrong)."""

    exit_status = WORK_FAILED

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UsageError(UserError):
    """The command cannot be meant as given: an unknown name, an impossible combination."""

    exit_status = COMMAND_WRONG


class StoppedError(UserError):
    """Training was asked to stop, and did so in order."""

    exit_status = STOPPED


class UnreadableError(UserError):
    """The machine does not give a file's bytes: nothing is known of the file itself, and no repair
    would help."""


# Of the machine or its file system, not of the file; a bad sector (EIO) is the file's own.
_MACHINE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)


def raise_if_unreadable(path: object, error: OSError) -> None:
    """Raise UnreadableError for an error of the machine or its file system; any other is left to
    the caller."""
    if error.errno in _MACHINE_ERRORS:
        raise UnreadableError(
            f"{str(path)!r}: {error.strerror}; fix this and run the same command again"
        ) from error


class IdentityError(UserError):
    """Two things that must be the same (weights, pixels, pictures) are not."""


def near(given: str, known: Iterable[str]) -> str:
    """Return the tail of an 'unknown name' message: near names first, then all that are known.

    >>> near("clip-b61", ["clip-b16", "dino-b16", "synthetic"])
    'did you mean clip-b16? known: clip-b16, dino-b16, synthetic'
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
