"""A file of named values is TOML or YAML by its suffix, else JSON, and read strictly: it names no
type, refers to no other part, and holds nothing that JSON cannot.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from pathlib import Path
from typing import Any

from featcache.runtime import strict_json, strict_yaml
from featcache.runtime.strict_yaml import WrittenFloat

FILE_BYTES = 64 << 10  # of YAML and TOML, which are written by hand
_DOTS = 256  # in a line of TOML: Python takes the square of a dotted key's parts


def read(path: Path) -> Any:
    """Read a file. Raises OSError, and ValueError for what is no such file."""
    return _PARSE.get(path.suffix.lower(), strict_json.read_file)(path)


def _read_yaml(path: Path) -> Any:
    return strict_yaml.parse(strict_json.read_bytes(path, FILE_BYTES))


def _read_toml(path: Path) -> Any:
    text = strict_json.read_bytes(path, FILE_BYTES).decode("utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):  # TOML ends lines at no other character
        if line.count(".") > _DOTS:
            raise ValueError(f"line {number} has more than {_DOTS} dots")
    try:
        value = tomllib.loads(text, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    strict_json.check_depth(value)
    _refuse_dates(value)
    return value


_PARSE = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml}


def _finite(text: str) -> WrittenFloat:
    number = WrittenFloat(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:20]}, which is no finite number")
    return number


def _refuse_dates(value: Any) -> None:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _refuse_dates(part)
    elif isinstance(value, datetime.date | datetime.time):
        raise ValueError(f"it holds the date or time {value}; quote it to have a text")
    elif isinstance(value, int) and abs(value) >= 10**40:
        raise ValueError("it holds a huge number")
