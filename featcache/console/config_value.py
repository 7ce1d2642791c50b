"""One value of a file of options becomes the text that the command line would have, and is checked
by click as that one."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import click

from featcache.console.params import FloatPair
from featcache.errors import UsageError, UserError, short
from featcache.runtime.strict_yaml import WrittenFloat


def checked(param: click.Parameter, key: str, value: Any, ctx: click.Context, where: str) -> Any:
    """Return a value as click takes it from a command line; UsageError where it would be refused
    there."""
    try:
        given = _as_given(param, value)
        param.type_cast_value(ctx, given)
    except click.BadParameter as error:
        raise UsageError(f"{where}: {key}: {error.message}") from None
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None
    return given


def _as_given(param: click.Parameter, value: Any) -> Any:
    if isinstance(param, click.Option) and param.is_flag:
        if not isinstance(value, bool):
            _fail(value, "true or false")
        return value
    if isinstance(param.type, FloatPair) and isinstance(value, list):
        return ",".join(_word(part) for part in value)
    if isinstance(param, click.Option) and param.multiple:
        return [_word(part) for part in (value if isinstance(value, list) else [value])]
    return _word(value)


def _word(value: Any) -> str:
    """Return what stands on a command line for this value."""
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, str):
        return _possible(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(value, "a text or a number")
    return repr(value)


def _possible(text: str) -> str:
    """Refuse what no command line can hold, so that nobody behind it expects it."""
    try:
        if b"\0" not in os.fsencode(text):
            return text
    except UnicodeEncodeError:
        pass
    _fail(text, "a text without null characters and halves of characters")


def _fail(value: Any, needed: str) -> NoReturn:
    given = {True: "true", False: "false", None: "null"}.get(value) if _is_word(value) else None
    raise click.BadParameter(f"{given or short(value)} given; {needed} is needed")


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)
