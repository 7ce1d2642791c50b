"""A source of pictures gives labels, is split into a training and a held-out part, and is cut to a
few pictures of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UsageError, UserError, command_line, counted, near
from featcache.pictures.classes import MOST_CLASSES, NAME
from featcache.pictures.source import Source

I64 = npt.NDArray[np.int64]


def labels_of(source: Source) -> I64:
    """Return (n,) labels as indices of the source's own classes (see `class_names`), or raise the
    error that says how pictures get them."""
    labels = _given(source)
    if source.classes is not None:
        return labels
    return np.searchsorted(_numbers(source), labels)


def class_count(train: Source) -> int:
    """Count classes by name where the source names them, else the different numbers among its
    labels. Raises UserError for more than MOST_CLASSES."""
    count = len(_numbers(train))
    if count > MOST_CLASSES:
        raise UserError(
            f"cannot evaluate on {train.spec}: its labels are of "
            f"{counted(count, 'class', 'classes')}, {MOST_CLASSES} "
            "at most are allowed; give pictures of fewer"
        )
    return count


def class_name(source: Source, index: int) -> str:
    """Return the name of a class, or its number where the source names none."""
    return repr(source.classes[index]) if source.classes else str(_numbers(source)[index])


def _given(source: Source) -> I64:
    if source.labels is None:
        raise UserError(
            f"cannot evaluate on {source.spec}: its "
            f"{counted(len(source), 'picture has', 'pictures have')} no labels; labels "
            "are class folders (SRC/CLASS/picture.png), the .cls members of webdataset tars, a "
            f"table, {command_line(f'{source.spec}#labels=FILE.csv')}, or the beginnings of keys, "
            "#labels=prefix"
        )
    return np.asarray(source.labels, np.int64)


def _numbers(source: Source) -> I64:
    """Return the numbers (C,) that labels of a source may have, ascending: of a subset those of the
    whole."""
    if source.classes is not None:
        return np.arange(len(source.classes))
    return np.unique(_given(whole(source)))


# ------------------------------------------------------------ two sets


def labels_as(source: Source, train: Source) -> I64:
    """Return the labels (n,) of `source` in the numbering of `train`: classes are matched by name,
    not by position.

    Raises UserError for pictures of a class that `train` does not name, and, where one of the two
    names none, for sets of different numbers: what a number means is then not known.
    """
    labels = labels_of(source)
    if source.classes is None or train.classes is None:
        _check_numbers(source, train)
        return labels
    number = {name: index for index, name in enumerate(train.classes)}
    present = [source.classes[label] for label in np.unique(labels)]
    unknown = sorted(set(present) - set(number))
    if unknown:
        raise UserError(
            f"cannot score {source.spec}: {len(unknown)} of its classes have no training "
            f"pictures, the first is {unknown[0]!r} ({near(unknown[0], number)[:300]}); give "
            "training and test pictures with the same classes"
        )
    return np.array([number.get(name, -1) for name in source.classes], np.int64)[labels]


def _check_numbers(source: Source, train: Source) -> None:
    """Raise UserError where classes without names cannot be the same ones."""
    if whole(source) is whole(train):
        return
    ours, theirs = _numbers(source), _numbers(train)
    if len(ours) == len(theirs) and (ours == theirs).all():
        return
    nameless = " and ".join(each.spec for each in (source, train) if each.classes is None)
    raise UserError(
        f"cannot score {source.spec}: its classes are {_text(ours)}, those of {train.spec} are "
        f"{_text(theirs)}; those of {nameless} have no names ({NAME} beside the tars), so that "
        "a number may mean two things; pack both from class folders with `featcache pack`, or "
        "give sets with the same classes"
    )


def _text(numbers: I64) -> str:
    return f"{len(numbers)} numbers from {numbers[0]} to {numbers[-1]}"


def match_notes(test: Source, train: Source) -> list[str]:
    """Say what a person should know of two sets that match: that nobody named their classes, and
    how many test pictures are of a class without training pictures."""
    notes = []
    if (test.classes is None or train.classes is None) and whole(test) is not whole(train):
        notes.append("classes are matched by number: one of the sets has no names for them")
    labels = labels_as(test, train)
    unseen = labels[~np.isin(labels, labels_of(train))]
    if unseen.size:
        classes = np.unique(unseen)
        notes.append(
            f"{unseen.size} of {len(test)} test pictures count as wrong, since no training picture "
            f"is of their class ({counted(len(classes), 'class', 'classes')}, the first is "
            f"{class_name(train, int(classes[0]))})"
        )
    return notes


@dataclass
class Subset:
    """Gives some rows of a source, itself a source with the same class numbers."""

    source: Source
    rows: list[int]
    spec: str

    def __post_init__(self) -> None:
        self.keys: Sequence[str] = [self.source.keys[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        return self.source.read(self.rows[index])

    def stamp(self, rows: Sequence[int]) -> str:
        """Digest what tells these pictures from others; empty where the source cannot."""
        own = getattr(self.source, "stamp", None)
        return str(own([self.rows[row] for row in rows])) if own is not None else ""

    @property
    def labels(self) -> I64 | None:
        labels = self.source.labels
        return None if labels is None else labels[self.rows]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes


def whole(source: Source) -> Source:
    """Return the source that a subset is of; any other source is whole."""
    while isinstance(source, Subset):
        source = source.source
    return source


def split_holdout(source: Source, fraction: float = 0.2, seed: int = 0) -> tuple[Subset, Subset]:
    """Return (train, test): a picture is held out when the word of its key falls below `fraction`.

    A picture keeps its side whatever else is in the folder, so adding pictures never moves one from
    test to train.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"cannot hold out {fraction:g} of the pictures: the fraction lies between 0 and 1; "
            "give 0.2"
        )
    raw = rng.words(rng.key_digests(source.keys), rng.stream("held-out", seed), 1)[:, 0]
    held = rng.uniform(raw) < fraction
    train = Subset(source, np.flatnonzero(~held).tolist(), f"{source.spec} (train part)")
    test = Subset(source, np.flatnonzero(held).tolist(), f"{source.spec} (held-out part)")
    if not len(train) or not len(test):
        raise UserError(
            f"cannot hold out {fraction:g} of {counted(len(source), 'picture')}: "
            f"{len(train)} are left to "
            f"train and {len(test)} to test, both need at least one; give more pictures, another "
            "seed, or test pictures of their own"
        )
    return train, test


def low_shot(
    source: Source, *, shots: int | None = None, fraction: float | None = None, seed: int = 0
) -> Subset:
    """Return `shots` pictures of each class, or a `fraction` of them (rounded, at least one): those
    whose keys have the smallest words.

    A picture's word depends on its key and the seed alone, so that 1 shot is among the 5, and other
    pictures change nothing. Raises UserError where a class has fewer than `shots`.
    """
    labels = labels_of(source)
    raw = rng.words(rng.key_digests(source.keys), rng.stream("low-shot", seed), 1)[:, 0]
    rows = list[int]()
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = shots if shots is not None else max(1, round((fraction or 0) * len(own)))
        if count > len(own):
            raise UserError(
                f"cannot take {counted(count, 'picture')} of each class of "
                f"{source.spec}: there are "
                f"{len(own)} of {class_name(source, int(label))}; give a smaller --shots"
            )
        rows += own[np.argsort(raw[own], kind="stable")[:count]].tolist()
    told = f"{shots} a class" if shots is not None else f"{100 * (fraction or 0):g} %"
    return Subset(source, sorted(rows), f"{source.spec} ({told})")
