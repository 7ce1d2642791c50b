"""JSON that others wrote is read within bounds: of a size, not nested deeply, of numbers alone that
JSON has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

FILE_BYTES = 64 << 20
DEPTH = 64  # of lists and objects; none of ours has more than 8


def read_file(path: Path, most_bytes: int = FILE_BYTES) -> Any:
    """Read the value in a JSON file. Raises OSError where the file cannot be read, and ValueError
    with a reason in one line where it is too large or what `parse` refuses."""
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes >> 20} MiB")
    return parse(data)


def parse(text: str | bytes) -> Any:
    """Parse a JSON text; what is no JSON, has NaN or infinities, or is nested deeply is a
    ValueError with a reason in one line.

    >>> parse(b'{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse("[NaN]")
    Traceback (most recent call last):
    ValueError: it holds NaN, which is no number of JSON
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
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


def _check_depth(value: Any) -> None:
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
