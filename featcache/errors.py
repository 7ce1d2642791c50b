"""Errors that a user can cause are one line each, which a command prints.

A `UserError` is one line with four parts: what failed, what was given, what is allowed, what to do
next. Commands print that line and exit; nobody sees a traceback for a mistake of their own.
Anything else that reaches the top is a defect of ours and keeps its traceback.

Names of files, and what stands in caches and runs, are strangers' text: `printable` shows their
control characters, which a terminal would otherwise carry out, and `command_line` quotes them.
"""

from __future__ import annotations

import difflib
import errno
import re
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

WORK_FAILED = 1  # the command was right, the work could not be done
COMMAND_WRONG = 2  # the command itself cannot be meant
# it was asked to stop, and the same command goes on: sysexits.h's EX_TEMPFAIL, for a scheduler
STOPPED = 75
_LINE = 4000  # characters of a message; a list of all known names has some 2,000


def printable(text: str, keep: str = "\n\t") -> str:
    """Return the text as a terminal may get it: control characters, those that turn the direction
    of writing or cannot be seen, line separators and bytes that are no text are escaped as `repr`
    does; those in `keep` stay, and so do the spaces of all languages.

    >>> print(printable("a\\x1b[31m \\u202etxt.exe\\x9b \\udc80 naïve"))
    a\\x1b[31m \\u202etxt.exe\\x9b \\udc80 naïve
    """
    text = _told(text)
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or _is_harmless(char) else repr(char)[1:-1] for char in text
    )


_told_as: dict[str, str] = {}  # folder -> the place that it stands for


def tell_as(folder: str, name: str) -> None:
    """Let all that is printed name a place for a folder that stands for it here."""
    _told_as[folder] = name


def _told(text: str) -> str:
    for folder, name in _told_as.items():
        text = text.replace(folder, name)
    return text


def _is_harmless(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def one_line(text: str) -> str:
    """Return `printable` text in one line: lines are joined by spaces."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()), keep="")


def command_line(*words: object) -> str:
    """Return the command line that a shell takes for these words, fit to be printed: unprintable
    characters stand as the bytes that they are in UTF-8, as bash and zsh read them.

    >>> print(command_line("rm", "my cache", "\\x1b'"))
    rm 'my cache' $'\\x1b\\x27'

    A path is no option, whatever it begins with.
    """
    texts = (
        f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word)
        for word in words
    )
    return " ".join(map(_shell_word, texts))


def _shell_word(word: str) -> str:
    word = _told(word)
    if printable(word, keep="") == word:
        return shlex.quote(word)  # noqa: TID251
    return "$'" + "".join(map(_shell_char, word)) + "'"


def _shell_char(char: str) -> str:
    if _is_harmless(char) and char not in "\\'":
        return char
    # the bytes of a file's name that is no text; of other surrogates, which no name holds, a mark
    escape = "surrogateescape" if "\udc80" <= char <= "\udcff" else "replace"
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", escape))


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with what it counts.

    >>> counted(1, "view"), counted(0, "view"), counted(2, "picture is", "pictures are")
    ('1 view', '0 views', '2 pictures are')
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def listed(names: Iterable[object], one: str, many: str) -> str:
    """Write names into the sentence that is right for as many.

    >>> listed([8], "level {} is", "levels {} are"), listed([8, 9], "level {} is", "levels {} are")
    ('level 8 is', 'levels 8, 9 are')
    """
    words = [str(name) for name in names]
    return (one if len(words) == 1 else many).format(", ".join(words))


class UserError(Exception):
    """Gives one line to the person at the keyboard; `exit_status` is 1 (the work failed) or 2 (the
    command was wrong)."""

    exit_status = WORK_FAILED

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(one_line(message)))


def _shortened(line: str) -> str:
    """Leave out the middle of a line that nobody could read: a value in a file may have any
    length."""
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} ... {line[-_LINE // 2 :]}"


class UsageError(UserError):
    """The command cannot be meant as given: an unknown name, an impossible combination."""

    exit_status = COMMAND_WRONG


class StoppedError(UserError):
    """A piece of work was asked to stop, and did so in order."""

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


def short(value: object) -> str:
    """Show what was found in a file in a few words, without its control characters.

    >>> short("a\\x1b[0m"), short(10**50), short("x" * 100)[-8:]
    ("'a\\\\x1b[0m'", 'a huge number', 'xxxx ...')
    """
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a huge number"  # which Python may refuse to write out
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def near(given: str, known: Iterable[str]) -> str:
    """Return the tail of an 'unknown name' message: near names first, then all that are known.

    >>> near("clip-b61", ["clip-b16", "dino-b16", "synthetic"])
    'did you mean clip-b16? known: clip-b16, dino-b16, synthetic'
    """
    names = sorted(known)
    close = difflib.get_close_matches(given[:200], names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
