"""A teacher's spec, NAME or NAME,key=value,..., is parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from featcache.errors import UsageError, near
from featcache.models.contract import Option


def parse_options(text: str) -> dict[str, Option]:
    """Parse 'img_size=32,drop=0.1,flag=true' into typed values.

    >>> parse_options("img_size=32,drop=0.1,flag=true,act=gelu")
    {'img_size': 32, 'drop': 0.1, 'flag': True, 'act': 'gelu'}
    """
    options: dict[str, Option] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"option {part!r}: key=value is needed, several are parted by commas")
        if key in options:
            raise UsageError(
                f"option {key!r} is given twice, the second time as {part!r}; once is allowed"
            )
        options[key] = _parse_value(value)
    return options


def _parse_value(text: str) -> Option:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_options(name: str, options: Mapping[str, Option], known: Iterable[str]) -> None:
    """Refuse an option that teacher `name` does not have, and offer near ones."""
    known = tuple(known)
    unknown = next((key for key in options if key not in known), None)
    if unknown is not None:
        raise UsageError(f"teacher {name!r}: unknown option {unknown!r}; {near(unknown, known)}")


def split_spec(spec: str) -> tuple[str, dict[str, Option]]:
    """Return the name and the typed options of a spec.

    >>> split_spec("timm:NAME,img_size=32"), split_spec("synthetic:levels=5")
    (('timm:NAME', {'img_size': 32}), ('synthetic', {'levels': 5}))
    >>> split_spec("run:runs/lr=0.1")
    ('run:runs/lr=0.1', {})
    """
    name, _, options = spec.partition(",")
    head, colon, first = name.partition(":")
    if colon and re.match(r"\w*=", first):  # PREFIX:key=value,... without a name
        return head, parse_options(spec.partition(":")[2])
    return name, parse_options(options)
