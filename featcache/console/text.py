"""Commands print sizes, tables, and facts as JSON or as text, all in one form; what they print
comes from here, so that no stranger's text reaches a terminal raw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from featcache.errors import printable
from featcache.runtime import streams

_copy: Callable[[str], None] | None = None  # gets the lines of stderr as well


def copy_lines_to(copy: Callable[[str], None] | None) -> None:
    """Let what is printed on stderr go to a log as well, or no longer."""
    global _copy
    _copy = copy


def is_copied() -> bool:
    """Tell whether there is a log."""
    return _copy is not None


def log(text: str) -> None:
    """Write lines to the log alone, where there is one."""
    if _copy is not None:
        _copy(printable(text))


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text on stdout, or on stderr, with control characters escaped. Work goes on where
    stderr takes nothing, as when its disk is full."""
    if err:
        log(text)
    try:
        click.echo(printable(text), err=err, nl=nl)  # noqa: TID251
    except OSError:
        if not err:
            raise
        streams.silence(sys.stderr)


def say(text: str) -> None:
    """Print a note, or another line about the work, on stderr."""
    echo(text, err=True)


def confirm(question: str) -> bool:
    """Ask on stderr for a yes or no."""
    return click.confirm(printable(question), err=True)  # noqa: TID251


def print_facts(facts: Any, as_json: bool, text: str, indent: int | None = None) -> None:
    """Print the facts as JSON, or the text that says them."""
    echo(format_json(facts, indent) if as_json else text)


def join_lines(lines: Iterable[str]) -> str:
    """Join texts to lines, none of which becomes two by what a stranger wrote into it.

    >>> print(join_lines(["name: a\\nerror: b", "end"]))
    name: a\\nerror: b
    end
    """
    return "\n".join(printable(line, keep="") for line in lines)


def format_json(facts: Any, indent: int | None = None) -> str:
    """Write JSON in printable ASCII alone.

    >>> print(format_json({"name": "a\\x7f\\u202e"}))
    {"name": "a\\u007f\\u202e"}
    """
    return json.dumps(facts, indent=indent).replace("\x7f", "\\u007f")


def format_bytes(count: float) -> str:
    """Write a number of bytes for people.

    >>> format_bytes(999), format_bytes(1_512_960), format_bytes(1.94e12)
    ('999 B', '1.5 MB', '1.94 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 0 if unit == "B" else 1) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_seconds(seconds: float) -> str:
    """Write seconds as a person reads them.

    >>> format_seconds(0), format_seconds(0.25), format_seconds(119.6), format_seconds(5400)
    ('0 s', '0.25 s', '120 s', '1.5 h')
    """
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def format_table(
    rows: Sequence[Sequence[str]], right: Iterable[int] = (), markdown: bool = False
) -> str:
    """Lay out columns as wide as they need; those numbered in `right` are set to the right. The
    first row is the head, which Markdown rules off. A row is one line, whatever its cells hold.

    >>> print(format_table([("", "GB"), ("rows", "7")], right=[1], markdown=True))
    |      | GB |
    | ---- | -: |
    | rows |  7 |
    """
    rows = [[printable(cell, keep="") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    flush = set(right)
    padded = [
        [
            cell.rjust(w) if i in flush else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * (w - 1) + (":" if i in flush else "-") for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])


def first_paragraph(docstring: str | None) -> str:
    """Join the first paragraph of a docstring to one line.

    >>> first_paragraph("One sentence over\\n    two lines.\\n\\n    More of it.")
    'One sentence over two lines.'
    """
    return " ".join((docstring or "").strip().partition("\n\n")[0].split())
