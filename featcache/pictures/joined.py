"""Several sources are one, their pictures one after the other: `A::B`.

So the pictures of a cache that others were appended to are named in one text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from featcache.errors import UserError
from featcache.pictures.passed_over import PassedOver, Tally, passed_over
from featcache.pictures.source import Source, check_double

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class JoinedSource:
    """Gives the pictures of its members in order. Classes are those of all members by name."""

    spec: str
    members: tuple[Source, ...]

    @cached_property
    def keys(self) -> list[str]:
        return [key for member in self.members for key in member.keys]

    @cached_property
    def _starts(self) -> I64:
        return np.cumsum([0, *(len(member) for member in self.members)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> bytes:
        member, own = self._member(index)
        return member.read(own)

    def _member(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self.members[number], index - int(self._starts[number])

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        tally = Tally()
        for member in self.members:
            tally.add_rows(passed_over(member))
        return tally.rows

    @cached_property
    def classes(self) -> list[str] | None:
        """The names of all classes, sorted; None where a member has no names."""
        names = [member.classes for member in self.members]
        if any(each is None for each in names):
            return None
        return sorted({name for each in names for name in each or ()})

    @cached_property
    def labels(self) -> I64 | None:
        """(n,) numbers of classes, None where a member has none. Raises UserError where some have
        names of classes and others numbers alone."""
        labels = [member.labels for member in self.members]
        if any(each is None for each in labels):
            return None
        unnamed = [member.spec for member in self.members if member.classes is None]
        if unnamed and len(unnamed) < len(self.members):
            named = next(each.spec for each in self.members if each.classes is not None)
            raise UserError(
                f"pictures {self.spec!r}: {named!r} has names of classes, {unnamed[0]!r} numbers "
                "alone, so that no class of one is known to be that of the other; give labels of "
                "one kind: #labels=FILE.csv"
            )
        found = [self._renumbered(each) for each in self.members]
        return np.concatenate(found)

    def _renumbered(self, member: Source) -> I64:
        labels = np.asarray(member.labels, np.int64)
        if self.classes is None or member.classes is None:
            return labels
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[name] for name in member.classes], np.int64)[labels]

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others, without reading them; empty where a member
        cannot tell."""
        wanted, told = np.asarray(rows, np.int64), hashlib.blake2b(digest_size=16)
        bounds = zip(self._starts, self._starts[1:], self.members, strict=False)
        for begin, end, member in bounds:
            own = getattr(member, "stamp", None)
            if own is None:
                return ""
            inside = wanted[(wanted >= begin) & (wanted < end)] - begin
            told.update(own(inside.tolist()).encode() + b"\0")
        return told.hexdigest()


def join(spec: str, members: Sequence[Source]) -> JoinedSource:
    """Join sources under the text that names them. Raises UserError where two pictures have one
    key."""
    source = JoinedSource(spec, tuple(members))
    where = [member.spec for member in members for _ in range(len(member))]
    check_double(spec, source.keys, lambda row: f"{where[row]} ({source.keys[row]})")
    return source
