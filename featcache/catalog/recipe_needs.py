"""A recipe states in its literal `SERVED_BY` what its default configuration reads and how its views
were published (catalog.serves); here it is checked and becomes its needs:

    SERVED_BY = {
        "teacher": "clip-b16",
        "fields": ("features", "dvae/token_ids"),  # NAME/... is of another teacher, or a tokenizer
        "levels": "last:1",  # of the first teacher; of another, features are its last level
        "mask_ratio": 0.5,
        "all_tokens": True,  # hidden patches' too
        "derive": "z",  # or f or fd, of the last level
        "scale": (0.08, 1.0),  # these three where they are not the usual ones of `Policy`
        "jitter": 0.4,
        "size": 196,
    }
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.catalog import recipe_files
from featcache.catalog.recipe_files import NEEDS_LITERAL
from featcache.errors import UsageError, UserError, near, short
from featcache.reading.crop_range import Scale
from featcache.views.policy import Policy

MOST_LEVELS = 256

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RecipeNeeds:
    """Hold what a recipe's default configuration reads of a cache; no fields: none is read."""

    name: str  # or the path of a user's own file
    literal: dict[str, Any]
    fields: tuple[str, ...] = ()
    levels: int = 0  # the teacher's last so many
    teacher: str = ""  # "" where the recipe does not say it
    scale: Scale = Policy().scale
    jitter: float = Policy().jitter
    size: int = Policy().size


def find_needs(name: str) -> RecipeNeeds:
    """Find a recipe that is installed, or a user's own file, which is parsed and never run.
    UsageError where there is none, or where it does not state what it reads."""
    if name.endswith(".py"):
        return parse_needs(name, _own_literal(Path(name)))
    known = installed()
    if name not in known:
        raise UsageError(
            f"--for: unknown recipe {name!r}: {near(name, known)}; or the path of your own file, "
            "./mine.py"
        )
    found = known[name]
    if isinstance(found, UserError):
        raise found
    return found


def installed() -> dict[str, RecipeNeeds | UserError]:
    """Return the needs of every recipe that is announced, by its name; or why it states none."""
    found: dict[str, RecipeNeeds | UserError] = {}
    taken: dict[str, Path] = {}
    for path in recipe_files.installed_files():
        needs: RecipeNeeds | UserError | None
        try:
            literal = recipe_files.read_needs(path)
            needs = None if literal is None else parse_needs(path.stem, literal)
        except UserError as error:
            needs = error
        if needs is None or taken.get(path.stem) == path:
            continue
        if path.stem in taken:
            _LOG.warning("recipe %r of %s is hidden by %s", path.stem, path, taken[path.stem])
            continue
        found[path.stem], taken[path.stem] = needs, path
    return found


def _own_literal(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(
            f"--for: cannot read recipe {str(path)!r}: no such file; give a name or the path of "
            "your own .py file"
        )
    literal = recipe_files.read_needs(path)
    if literal is None:
        raise UsageError(
            f"--for: recipe {str(path)!r} states no {NEEDS_LITERAL} = {{...}}, so nothing "
            "is known of what it reads; add it, or give --teacher and --levels in place of --for"
        )
    return literal


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_below_1(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)


def _is_range(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))
    return pair and 0 < value[0] <= value[1] <= 1


def _is_last(value: Any) -> bool:
    found = re.fullmatch(r"last:([1-9][0-9]{0,2})", value) if isinstance(value, str) else None
    return value == "" or (found is not None and int(found[1]) <= MOST_LEVELS)


# key -> what its value must be, in code and in words
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "fields": (_is_names, "a tuple of the names of arrays"),
    "levels": (_is_last, f"'last:N' of at most {MOST_LEVELS}, or '' for none,"),
    "mask_ratio": (_is_below_1, "a number from 0 to below 1"),
    "teacher": (lambda value: isinstance(value, str), "a teacher's name"),
    "scale": (_is_range, "a pair with 0 < low <= high <= 1"),
    "jitter": (_is_below_1, "a number from 0 to below 1"),
    "size": (lambda value: type(value) is int and 1 <= value <= 4096, "1 to 4096 pixels"),
    "all_tokens": (lambda value: isinstance(value, bool), "True or False"),
    "derive": (lambda value: value in ("", "z", "f", "fd"), "z, f, fd or ''"),
}
_NEEDED = ("fields", "levels", "mask_ratio")  # the latter where fields are read


def parse_needs(name: str, literal: dict[str, Any]) -> RecipeNeeds:
    """Check the literal of a recipe, and return it as its needs."""
    for key, value in literal.items():
        if key not in _KEYS:
            raise UsageError(
                f"--for {name}: its {NEEDS_LITERAL} has an unknown key {short(key)}; "
                f"{near(str(key), _KEYS)}; change it"
            )
        if not _KEYS[key][0](value):
            raise UsageError(
                f"--for {name}: its {NEEDS_LITERAL} has {key}={short(value)}; "
                f"{_KEYS[key][1]} is needed; change it"
            )
    for key in _NEEDED if literal.get("fields") else _NEEDED[:1]:
        if key not in literal:
            raise UsageError(
                f"--for {name}: its {NEEDS_LITERAL} has no {key!r}; {_KEYS[key][1]} is "
                "needed; add it"
            )
    count = literal.get("levels", "").removeprefix("last:")
    given: dict[str, Any] = {
        key: literal[key] for key in ("teacher", "jitter", "size") if key in literal
    }
    if "scale" in literal:
        given["scale"] = (float(literal["scale"][0]), float(literal["scale"][1]))
    fields = tuple(literal["fields"])
    return RecipeNeeds(name=name, literal=literal, fields=fields, levels=int(count or 0), **given)
