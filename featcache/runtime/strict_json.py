"""JSON that others wrote is read within bounds: of a size, not nested deeply, of numbers alone that
JSON has."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

FILE_BYTES = 64 << 20
DEPTH = 64  # of lists and objects; none of ours has more than 8


def read_file(path: Path, most_bytes: int = FILE_BYTES) -> Any:
    """Read the value in a JSON file. Raises OSError where the file cannot be read, and ValueError
    with a reason in one line where it is no regular file (a pipe would be waited for), too large,
    or what `parse` refuses."""
    return parse(read_bytes(path, most_bytes))


def read_bytes(path: Path, most_bytes: int = FILE_BYTES) -> bytes:
    """Read a file that others wrote, of text as well. Raises as `read_file` does, but for what is
    in it."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        data = file.read(most_bytes + 1) if status.st_size <= most_bytes else b""
    if max(status.st_size, len(data)) > most_bytes:
        raise ValueError(f"it has more than {_size(most_bytes)}")
    return data


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >> 20 else f"{count >> 10} KiB"


def parse(text: str | bytes) -> Any:
    """Parse a JSON text; what is no JSON, has NaN or infinities, names a value twice, or is
    nested deeply is a ValueError with a reason in one line.

    >>> parse(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse("[NaN]")
    Traceback (most recent call last):
    ValueError: it holds NaN, which is no number of JSON
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_depth(value)
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object; any other value is a ValueError."""
    return as_object(parse(text))


def as_object(value: Any) -> dict[str, Any]:
    """Return the value where it is a JSON object; ValueError where it is another."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_KINDS.get(type(value), 'a number')}, no object")
    return value


_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, of which Python would keep the last of two values without a word."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {twice[:60]!r} twice")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"it holds the number {text[:20]}, which is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 40:  # hashes of 128 bits fit
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def check_depth(value: Any) -> None:
    """Raise ValueError where lists and objects are nested more than DEPTH deep."""
    level = [value]
    for _ in range(DEPTH):
        level = [
            part
            for each in level
            if isinstance(each, list | dict)
            for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} deep")
