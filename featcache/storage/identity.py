"""Two manifests are compared field by field; every difference has a grade."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from featcache.errors import IdentityError

# The first prefix that fits a field's dotted name is its grade. `fatal`: other numbers; `lossy`:
# the same numbers, less exact; `layout`: the same numbers in other files; `cosmetic`: no effect.
# What is not listed is fatal.
GRADES = (
    ("identity.codec", "lossy"),
    ("identity.store", "layout"),
    ("identity.rows_per_shard", "layout"),
    ("identity.", "fatal"),
    ("provenance.", "cosmetic"),
)
# The options of `featcache extract` that a field comes from; the first prefix that fits.
FIELD_OPTIONS = (
    ("identity.teacher.name", "--teacher"),
    ("identity.teacher.weight_hash", "--weights"),
    ("identity.pictures.", "--images"),
    ("identity.appended", "--images"),
    ("identity.rows_per_shard", "--rows-per-shard"),
    *(
        (f"identity.{name}", f"--{name}")
        for name in ("views", "levels", "order", "codec", "store", "tokens", "keep")
    ),
    ("identity.pixels", "--pixels"),
    ("identity.pixel_path.decoder", "--decoder"),
    ("identity.pixel_path.exif_transpose", "--exif"),
    *(
        (f"identity.policy.{name}", f"--{name}")
        for name in ("size", "scale", "ratio", "filter", "flip", "jitter")
    ),
    ("identity.policy.seed", "--seed"),
)
_HASHED_OPTIONS = ("--weights", "--images")  # a field holds their hash, which nobody can type


class Mismatch(NamedTuple):
    field: str
    grade: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.field} ({self.grade}): {self.here!r} here, {self.there!r} there"

    @property
    def fix(self) -> str:
        """The option to give `featcache extract` for the cache that is there; it is empty where no
        option sets the field.

        >>> Mismatch("identity.levels", "fatal", [12], [11, 12]).fix
        '--levels 11,12'
        >>> Mismatch("identity.keep", "fatal", 58, None).fix
        'no --keep'
        """
        option = next(
            (option for prefix, option in FIELD_OPTIONS if self.field.startswith(prefix)), ""
        )
        if not option:
            return ""
        if option in _HASHED_OPTIONS:
            return f"another {option}"
        if self.there is None or self.there is False:
            return f"no {option}"
        if self.there is True:
            return option
        return (
            f"{option} "
            f"{','.join(map(str, self.there)) if isinstance(self.there, list) else self.there}"
        )


def compare(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Mismatch]:
    """List every differing field of identity and provenance, fatal ones first."""
    ours, theirs = (
        dict(flatten({key: m[key] for key in ("identity", "provenance")})) for m in (here, there)
    )
    found = [
        Mismatch(field, grade(field), ours.get(field), theirs.get(field))
        for field in sorted(ours.keys() | theirs.keys())
        if ours.get(field) != theirs.get(field)
    ]
    return sorted(
        found, key=lambda mismatch: ("fatal", "lossy", "layout", "cosmetic").index(mismatch.grade)
    )


def grade(field: str) -> str:
    return next((grade for prefix, grade in GRADES if field.startswith(prefix)), "fatal")


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects under dotted names.

    >>> dict(flatten({"a": {"b": 1, "c": [2]}, "d": 3}))
    {'a.b': 1, 'a.c': [2], 'd': 3}
    """
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def refuse_mismatch(
    here: Mapping[str, Any],
    there: Mapping[str, Any],
    what: str,
    advice: str,
    grades: Iterable[str],
    *,
    show_fixes: bool = False,
) -> None:
    """Raise IdentityError when the two differ in a field of one of `grades`; the line names the
    fields and grades, and with `show_fixes` the options of `featcache extract` that give what is
    there."""
    found = [mismatch for mismatch in compare(here, there) if mismatch.grade in set(grades)]
    if found:
        listed = "; ".join(
            f"{each}, give {each.fix}" if show_fixes and each.fix else str(each)
            for each in found[:3]
        )
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise IdentityError(f"{what}: {listed}{more}; {advice}")
