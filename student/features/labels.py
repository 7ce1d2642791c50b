"""A source of pictures gives labels, and is split into a training and a held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache import rng
from featcache.errors import UsageError, UserError, near
from featcache.pictures.source import Source


def labels_of(source: Source) -> npt.NDArray[np.int64]:
    """Return (n,) class numbers, or raise the error that says how pictures get them."""
    if source.labels is None:
        raise UserError(
            f"cannot evaluate on {source.spec}: its {len(source)} pictures have no labels; labels "
            "are class folders (SRC/CLASS/picture.png) or the .cls members of webdataset tars; "
            "arrange the pictures so, or pack them with `featcache pack`"
        )
    return np.asarray(source.labels, np.int64)


def class_count(train: Source) -> int:
    """Count classes by name where the source names them, else one more than the largest number."""
    return len(train.classes) if train.classes is not None else int(labels_of(train).max()) + 1


def labels_as(source: Source, train: Source) -> npt.NDArray[np.int64]:
    """Return the labels (n,) of `source` in the numbering of `train`: class folders are matched by
    name, not by position."""
    labels = labels_of(source)
    if source.classes is None or train.classes is None:
        if int(labels.max()) >= class_count(train):
            raise UserError(
                f"cannot score {source.spec}: it has class {int(labels.max())}, the training "
                f"pictures have classes 0 to {class_count(train) - 1}; give training and test "
                "pictures with the same classes"
            )
        return labels
    number = {name: index for index, name in enumerate(train.classes)}
    unknown = sorted(set(source.classes) - set(number))
    if unknown:
        raise UserError(
            f"cannot score {source.spec}: {len(unknown)} of its classes are not among the training "
            f"pictures', the first is {unknown[0]!r} ({near(unknown[0], number)[:300]}); give "
            "training and test pictures with the same classes"
        )
    return np.array([number[name] for name in source.classes], np.int64)[labels]


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

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        labels = self.source.labels
        return None if labels is None else labels[self.rows]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes


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
            f"cannot hold out {fraction:g} of {len(source)} pictures: {len(train)} are left to "
            f"train and {len(test)} to test, both need at least one; give more pictures, another "
            "seed, or test pictures of their own"
        )
    return train, test
