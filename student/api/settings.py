"""Settings of a recipe are given as a mapping, or as the texts that --set takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import click

from featcache.console.config_file import read_settings
from featcache.console.params import LocalPath
from featcache.errors import UsageError, short

# of a command it is a file of options as well, which a call has as keywords
SETTINGS_FILE = click.Option(["--config"], type=LocalPath())
SettingsGiven = Mapping[str, Any] | str | Sequence[str]


def with_file(values: dict[str, Any]) -> dict[str, Any]:
    """Add the settings of the file that a call names, of nothing else. Raises UserError."""
    path = values.get("config")
    return {**values, "file_settings": read_settings(path)} if path else values


def setting_texts(given: SettingsGiven) -> Any:
    """Return settings as the texts that --set takes; what is no mapping is left as it is.

    >>> setting_texts({"drop_path": 0, "mask": "topk", "betas": (0.9, 0.95)})
    ['drop_path=0', 'mask=topk', 'betas=[0.9, 0.95]']
    """
    if not isinstance(given, Mapping):
        return given
    return [f"{key}={_text(key, value)}" for key, value in given.items()]


def _text(key: str, value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(
            f"Invalid value for settings: {short(key)}: {short(value)} is no plain value; give a "
            "number, a text, a truth value, None, or a list of them"
        ) from None


def _plain(value: Any) -> Any:
    """Return NumPy's numbers and paths as Python's own."""
    if isinstance(value, Integral | Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError
