"""A spec names pictures in one text: a path, and after it parts that say how it is read.

    val.tar#labels=LOC_val_solution.csv
    train/#labels=prefix#separator=_
    'train-*.parquet#image-column=photo#label-column=fine_label'
    'train-{000..146}.tar#image-member=seg.png'

One text goes wherever pictures are named (--images, --test, --probe, FEATCACHE_IMAGES, Python), and
a cache records it whole. What exists under the whole text is taken as it is written.
"""

from __future__ import annotations

import os
import re
from dataclasses import Field, dataclass, fields
from typing import Any

from featcache.errors import UsageError, near
from featcache.runtime.local_path import local_path

PREFIX = "prefix"  # as labels: the first part of a key
_PART = re.compile(r"#([a-z]+(?:-[a-z]+)*)=")
_KINDS = {
    "a folder": ("labels", "separator", "label-column"),
    "tars": ("labels", "separator", "label-column", "image-member"),
    "parquet": ("labels", "separator", "label-column", "image-column"),
    "a .beton": (),
}


@dataclass(frozen=True)
class Spec:
    """Hold a spec's path and its parts; a part that is not given is None."""

    path: str
    labels: str | None = None  # a file, or PREFIX
    separator: str | None = None  # of PREFIX
    label_column: str | None = None  # of the file of labels, or of parquet
    image_column: str | None = None  # of parquet
    image_member: str | None = None  # suffix in samples of tars

    @property
    def parts(self) -> dict[str, str]:
        """Return the parts that are given, by name."""
        found = {each.name.replace("_", "-"): getattr(self, each.name) for each in _parts()}
        return {name: value for name, value in found.items() if value is not None}

    def text(self) -> str:
        """Return the spec as one text.

        >>> Spec("a", labels="b.csv").text()
        'a#labels=b.csv'
        """
        return self.path + "".join(f"#{name}={value}" for name, value in self.parts.items())

    def check_kind(self, kind: str) -> None:
        """Raise UsageError for a part that pictures of a kind do not have."""
        allowed = _KINDS[kind]
        if self.label_column is not None and self.labels is None and kind != "parquet":
            raise UsageError(
                f"pictures {self.path!r}: #label-column={self.label_column} names a column of a "
                "table, and no #labels=FILE.csv is given; give both, or none"
            )
        for name, value in self.parts.items():
            if name not in allowed:
                listed = " ".join(f"#{each}=" for each in allowed) or "no part"
                raise UsageError(
                    f"pictures {self.path!r}: #{name}={value} is given, and for {kind} {listed} is "
                    "allowed; leave it out"
                )


def _parts() -> list[Field[Any]]:
    return [each for each in fields(Spec) if each.name != "path"]


def parse_spec(text: str) -> Spec:
    """Split a spec into its path and parts. Raises UsageError for an unknown part, one that is
    given twice or is empty, and parts that do not go together.

    >>> parse_spec("a.tar#image-member=seg.png")
    Spec(path='a.tar', labels=None, separator=None, label_column=None, image_column=None, \
image_member='seg.png')
    """
    if "#" not in text or "\0" in text or os.path.lexists(text):
        return Spec(text)
    path, *rest = _PART.split(text)
    known, found = [each.name.replace("_", "-") for each in _parts()], dict[str, str]()
    for name, value in zip(rest[::2], rest[1::2], strict=True):
        if name not in known:
            raise UsageError(
                f"pictures {text!r}: #{name}= is no part of a spec ({near(name, known)}); parts "
                "are " + " ".join(f"#{each}=" for each in known)
            )
        if name in found or not value:
            raise UsageError(
                f"pictures {text!r}: #{name}= is {'given twice' if name in found else 'empty'}; "
                "give it once, with a value"
            )
        found[name] = value
    return _checked(Spec(path, **{name.replace("-", "_"): each for name, each in found.items()}))


def _checked(spec: Spec) -> Spec:
    if spec.separator is not None and spec.labels != PREFIX:
        raise UsageError(
            f"pictures {spec.path!r}: #separator={spec.separator} parts a key for "
            f"#labels={PREFIX}, which is not given; give both, or none"
        )
    if spec.label_column is not None and spec.labels == PREFIX:
        raise UsageError(
            f"pictures {spec.path!r}: #label-column={spec.label_column} names a column, and "
            f"#labels={PREFIX} takes labels from keys; leave one out"
        )
    if spec.labels in (None, PREFIX):
        return spec
    # a cache records it, and is read from other folders
    file = os.path.abspath(local_path(str(spec.labels), "#labels="))  # noqa: PTH100 (text)
    return Spec(**{**vars(spec), "labels": file})
