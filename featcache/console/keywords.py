"""A keyword of a Python call is read as the command reads its option: by the same parameter, from
the text that would be typed. So both refuse the same values, in the same words.

    --batch-size 64                      batch_size=64
    --scale 0.2,1                        scale=(0.2, 1)
    --levels 8,10 --levels dino-b16=-1   levels=["8,10", "dino-b16=-1"]
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import click

from featcache.console import picture_options
from featcache.console.config_text import default, key
from featcache.errors import UsageError, short

# Words of Python's own, and one that says more than the option does.
NAMES = {"for": "for_", "set": "settings"}
COMMANDS_OWN = ("as_json",)  # a call returns what the command prints


def keyword(param: click.Parameter) -> str:
    """Return the keyword of a parameter.

    >>> keyword(click.Option(["--batch-size"])), keyword(click.Option(["--set", "settings"]))
    ('batch_size', 'settings')
    """
    name = key(param).replace("-", "_")
    return NAMES.get(name, name)


def keywords(parameters: Sequence[click.Parameter]) -> dict[str, click.Parameter]:
    """Return the parameters by their keywords, but for those that only a command line has."""
    return {
        keyword(param): param
        for param in parameters
        if param.expose_value and param.name not in COMMANDS_OWN
    }


def read(parameters: Sequence[click.Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all parameters by click's own names, as the command's own function gets
    them. Raises UsageError, which names the keyword, for a value that the command would refuse."""
    values = {
        str(param.name): _read(name, param, given[name])
        for name, param in keywords(parameters).items()
    }
    return picture_options.joined(parameters, values)


def _read(name: str, param: click.Parameter, value: Any) -> Any:
    context = click.Context(click.Command(name))
    try:
        return param.type_cast_value(context, _typed(param, value))
    except click.BadParameter as error:
        told = click.BadParameter(error.message, param_hint=name).format_message()
        raise UsageError(told) from None


def _typed(param: click.Parameter, value: Any) -> Any:
    """Return what click would make a value of: text, several texts, a flag or None."""
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            raise _refusal(value, "neither True nor False")
        return value
    if value is None and default(param) in (None, ()):
        return () if param.multiple else None
    if not param.multiple:
        return _text(param, value)
    several = isinstance(value, list | tuple) and not _are_numbers(value)
    return tuple(_text(param, each) for each in (value if several else [value]))


def _text(param: click.Parameter, value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str):
            return text
    elif isinstance(param.type, click.Path):
        raise _refusal(value, "no path")
    elif _are_numbers([value]):
        return _number(value)
    elif isinstance(value, list | tuple) and _are_numbers(value):
        return ",".join(map(_number, value))
    raise _refusal(value, "no number" if _is_number(param.type) else "no text")


def _are_numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(each, Real) and not isinstance(each, bool) for each in values
    )


def _number(value: Any) -> str:
    """Write a number so that it is read as the same one; NumPy's are written as Python's."""
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _is_number(kind: click.ParamType) -> bool:
    return isinstance(kind, click.types.IntParamType | click.types.FloatParamType)


def _refusal(value: Any, what: str) -> click.BadParameter:
    return click.BadParameter(f"{short(value)} is {what}.")


def words(parameters: Sequence[click.Parameter], values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that say these values, by click's own names; defaults are
    left out."""
    found: list[str] = []
    for param in keywords(parameters).values():
        value, option = values[str(param.name)], param.opts[0]
        if value == default(param) or value in (None, ()):
            continue
        if isinstance(param, click.Option) and param.is_flag:
            found.append(option if value else param.secondary_opts[0])
            continue
        found += [
            f"{option}={_text(param, each)}" for each in (value if param.multiple else [value])
        ]
    return found
