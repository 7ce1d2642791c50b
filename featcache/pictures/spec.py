"""A spec names pictures in one text: a path, and after it parts that say how it is read.

    val.tar#labels=LOC_val_solution.csv
    train/#labels=prefix#separator=_
    'train-*.parquet#image-column=photo#label-column=fine_label'
    'train-{000..146}.tar#image-member=seg.png'
    first/::'later.tar#labels=later.csv'           (two sources, one after the other)

One text goes wherever pictures are named (--images, --test, --probe, FEATCACHE_IMAGES, Python), and
a cache records it whole. What exists under the whole text is taken as it is written. The options
--labels and --image-member of commands become parts of the text of --images.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from featcache.errors import UsageError
from featcache.runtime.local_path import local_path

SEPARATOR = "::"  # between sources whose pictures are one list
OPTIONS = ("labels", "image-member")  # parts that commands have as options, for --images
PREFIX = "prefix"  # as labels: the first part of a key
# wider than our names, so that a mistyped part is no part of a file's name
_PART = re.compile(r"#([A-Za-z]+(?:[-_][A-Za-z]+)*)=")
_SUFFIX = re.compile(r"\.?[^/.]+(?:\.[^/.]+)*")  # of a member
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
        for name, value in self.parts.items():
            if name not in allowed:
                option = f" (or --{name})" if name in OPTIONS else ""
                listed = f"{_listed(allowed)} are" if allowed else "no part is"
                raise UsageError(
                    f"pictures {self.path!r}: #{name}={value}{option} is given, and for {kind} "
                    f"{listed} allowed; leave it out"
                )
        if self.label_column is not None and self.labels is None and kind != "parquet":
            raise UsageError(
                f"pictures {self.path!r}: #label-column={self.label_column} names a column of a "
                "table, and no #labels=FILE.csv is given; give both, or none"
            )


def _parts() -> list[Field[Any]]:
    return [each for each in fields(Spec) if each.name != "path"]


def _listed(names: Iterable[str]) -> str:
    return " ".join(f"#{name}=" for name in names)


def parse_spec(text: str) -> Spec:
    """Split a spec into its path and parts. Raises UsageError for an unknown part, one that is
    given twice or is empty, and parts that do not go together.

    >>> parse_spec("a.tar#image-member=seg.png")
    Spec(path='a.tar', labels=None, separator=None, label_column=None, image_column=None, \
image_member='seg.png')
    """
    return _checked(_split(text))


def split_sources(text: str) -> list[str]:
    """Split a text into the specs of the sources that it names, one after the other. What exists
    under the whole text is one. Raises UsageError where one of them is empty.

    >>> split_sources("a::b.tar#labels=b.csv"), split_sources("a")
    (['a', 'b.tar#labels=b.csv'], ['a'])
    """
    if SEPARATOR not in text or "\0" in text or os.path.lexists(text):
        return [text]
    specs = text.split(SEPARATOR)
    if not all(each.strip() for each in specs):
        raise UsageError(
            f"pictures {text!r}: {SEPARATOR} stands between two sources, and one is empty; give "
            "A::B, or one source"
        )
    return specs


def with_parts(text: str, given: Mapping[str, str]) -> str:
    """Return a spec with the parts that options give beside it. Raises UsageError where it has such
    a part itself, and where no text can say both.

    >>> with_parts("a.tar", {"image-member": "seg.png"})
    'a.tar#image-member=seg.png'
    """
    if len(split_sources(text)) > 1:
        options = " ".join(f"--{name} {value}" for name, value in given.items())
        raise UsageError(
            f"pictures {text!r} are several sources, and {options} may mean each of them; give "
            + " or ".join(f"#{name}=" for name in given)
            + " to those that it is for"
        )
    spec = _split(text)
    for name, value in given.items():
        if not value:
            raise UsageError(f"--{name} {value!r}: a value is needed; give one, or leave it out")
        if (own := spec.parts.get(name)) is not None:
            raise UsageError(
                f"pictures {text!r} say #{name}={own} themselves, and --{name} {value} is given "
                "too; one of them is allowed: leave the other out"
            )
    spec = _checked(replace(spec, **{name.replace("-", "_"): v for name, v in given.items()}))
    if parse_spec(spec.text()) != spec:
        options = " ".join(f"--{name} {value}" for name, value in given.items())
        raise UsageError(
            f"pictures {text!r} with {options}: a part #NAME= stands in a name, or a file is named "
            f"{spec.text()!r}; rename it"
        )
    return spec.text()


def _split(text: str) -> Spec:
    if "#" not in text or "\0" in text or os.path.lexists(text):
        return Spec(text)
    path, *rest = _PART.split(text)
    known, found = [each.name.replace("_", "-") for each in _parts()], dict[str, str]()
    for name, value in zip(rest[::2], rest[1::2], strict=True):
        if name not in known:
            close = difflib.get_close_matches(name.lower()[:200].replace("_", "-"), known, n=1)
            hint = f": did you mean #{close[0]}=?" if close else ";"
            raise UsageError(
                f"pictures {text!r}: #{name}= is no part of a spec{hint} parts are {_listed(known)}"
            )
        if name in found or not value:
            raise UsageError(
                f"pictures {text!r}: #{name}= is {'given twice' if name in found else 'empty'}; "
                "give it once, with a value"
            )
        found[name] = value
    return Spec(path, **{name.replace("-", "_"): each for name, each in found.items()})


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
    if spec.image_member is not None and not _SUFFIX.fullmatch(spec.image_member):
        raise UsageError(
            f"pictures {spec.path!r}: #image-member={spec.image_member} is no suffix of a tar's "
            "member; give what follows KEY. in its name, such as jpg or seg.png"
        )
    if spec.labels in (None, PREFIX):
        return spec
    # a cache records it, and is read from other folders
    file = os.path.abspath(local_path(str(spec.labels), "#labels="))  # noqa: PTH100 (text)
    return replace(spec, labels=file)
