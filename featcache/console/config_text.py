"""The options of a command are written as YAML that `--config` reads back to the same options."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from featcache.runtime import strict_yaml

WIDTH = 88


def key(param: click.Parameter) -> str:
    """Return what a parameter is called in a file: its long name, without dashes before it."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len).lstrip("-")
    return str(param.name)


def default(param: click.Parameter) -> Any:
    """Return a parameter's default, or None."""
    value = param.to_info_dict()["default"]
    return () if isinstance(param, click.Option) and param.multiple and not value else value


def plain(value: Any) -> Any:
    """Return an option's value as JSON and YAML have it: a path is a text, a tuple a list."""
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def document(
    ctx: click.Context, resolved: Mapping[str, tuple[Any, bool]], soft: Sequence[str]
) -> str:
    """Write all options, each below what it means; those that are not given are comments.

    `resolved` has of each key its plain value and whether that is the default; a default of `soft`
    parameters gives way to what a cache or a publication has, and is a comment as well.
    """
    params = {key(param): param for param in ctx.command.params}
    entries = [f"# {ctx.command_path} --config FILE reads this; the command line wins."]
    for name, (value, is_default) in resolved.items():
        gives_way = is_default and params[name].name in soft
        entries.append(f"{_comment(params[name], gives_way)}{_entry(name, value, gives_way)}")
    return "\n\n".join(entries)


def _comment(param: click.Parameter, gives_way: bool) -> str:
    text = (getattr(param, "help", None) or "") + (
        " Without it, what the cache or the publication has comes first." if gives_way else ""
    )
    lines = textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
    return "".join(f"{line}\n" for line in lines)


def _entry(name: str, value: Any, gives_way: bool) -> str:
    if value is None or value == []:
        return f"# {name}:"
    if isinstance(value, dict):
        lines = [f"  {strict_yaml.format_entry(key, each)}" for key, each in value.items()]
        return "\n".join([f"{name}:", *lines])
    return f"{'# ' if gives_way else ''}{strict_yaml.format_entry(name, value)}"
