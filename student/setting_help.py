"""Settings are described by what stands in a configuration's own code: types, ranges, choices, and
the text below each field."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from student.settings import as_dict, default_values

_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class SettingHelp:
    """Says of one setting what a person needs to change it."""

    key: str
    value: Any
    default: Any  # of the recipe; `value` may be that of the model's size, or what was set
    type: str
    allowed: str  # choices or a range; empty where the type says all, or `help` does
    help: str


def describe(config: Any) -> list[SettingHelp]:
    """Describe all settings of a configuration, in the order of its fields."""
    kind = type(config)
    hints = get_type_hints(kind, include_extras=True)
    defaults = default_values(kind)
    return [
        SettingHelp(
            key,
            value,
            defaults.get(key),
            _type(hints[key]),
            _choices(kind, key, hints[key]) or _range(hints[key]),
            meaning(kind, key),
        )
        for key, value in as_dict(config).items()
    ]


def meaning(kind: type[Any], key: str) -> str:
    """Return the text of a field, in one line: its own, or that of the class which it comes from;
    empty where there is none."""
    for base in kind.__mro__:
        known: dict[str, FieldInfo] = base.__dict__.get("__pydantic_fields__", {})
        if key in known and (text := known[key].description):
            return " ".join(text.split())
    return ""


def as_lines(setting: SettingHelp, width: int = 80) -> str:
    """Lay out a setting: `key = value` as JSON, and below it what is allowed, the default where it
    is another, and the meaning."""
    facts = [setting.type, setting.allowed]
    if setting.value != setting.default:
        facts.append(f"by default {json.dumps(setting.default)}")
    text = "; ".join(fact for fact in facts if fact) + "."
    below = textwrap.fill(
        f"{text} {setting.help}".strip(), width, initial_indent="    ", subsequent_indent="    "
    )
    return f"{setting.key} = {json.dumps(setting.value)}\n{below}"


def _type(hint: Any) -> str:
    """Return a type in words: 'number or null'."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return _TYPES.get(type(parts[0]), "value")
    if origin is tuple:
        return f"list of {len(parts)}, each a {_type(parts[0])}"
    if type(None) in parts:
        return " or ".join([*(_type(part) for part in parts if part is not type(None)), "null"])
    return _TYPES.get(hint, getattr(hint, "__name__", str(hint)))


def _metadata(hint: Any) -> Iterator[Any]:
    """Yield what is said of a type and of its parts."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for each in parts[1:]:
            yield from each.metadata if isinstance(each, FieldInfo) else (each,)
        yield from _metadata(parts[0])
    elif origin is tuple:
        yield from _metadata(parts[0])
    elif origin is not Literal:
        for part in parts:
            yield from _metadata(part)


def _choices(kind: type[Any], key: str, hint: Any) -> str:
    """Return the names that are allowed, where they are known."""
    names: list[Any] = [*getattr(kind, "TARGETS", ())] if key == "target" else []
    names += get_args(hint) if get_origin(hint) is Literal else []
    for each in _metadata(hint):
        names += getattr(getattr(each, "func", None), "names", ())
    return f"one of {', '.join(map(str, names))}" if names else ""


def _range(hint: Any) -> str:
    """Return the ends of a range in words: 'from 0 to below 1'."""
    low = high = ""
    for each in _metadata(hint):
        low = f"above {each.gt:g}" if hasattr(each, "gt") else low
        low = f"from {each.ge:g}" if hasattr(each, "ge") else low
        high = f"below {each.lt:g}" if hasattr(each, "lt") else high
        high = f"at most {each.le}" if hasattr(each, "le") else high
    return ", ".join(part for part in (low, high) if part)
