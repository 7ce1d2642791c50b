"""Tasks of toys: features that a test makes, and encoders that are no networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.pictures.source import Source
from student.features.frozen import FrozenEncoder
from student.features.labelled import SetOptions, open_sets
from student.features.labels import labels_as, labels_of
from student.features.task import LabelledSet, Task, TestSet, Visible


def encoder(
    tokens: Callable[[Tensor], Tensor], *, size: int = 8, prefix: int = 1, digest: str = ""
) -> FrozenEncoder:
    """An encoder of one block whose tokens (B,T,D) are a function of the pixels."""
    return FrozenEncoder(
        "toy", size, 1, prefix, lambda pixels, blocks, ids: [tokens(pixels)] * len(blocks),
        lambda device: None, digest,
    )  # fmt: skip


def colour(pixels: Tensor) -> Tensor:
    """[CLS] is the mean colour, and so is the only patch: (B,2,3)."""
    return pixels.float().mean((2, 3))[:, None].expand(-1, 2, -1)


class Labelled:
    """A source of which only the labels are looked at."""

    spec = "toy"
    classes: list[str] | None = None

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.keys = labels.numpy(), [str(i) for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        raise AssertionError("features come from the test")


@dataclass(frozen=True)
class ToyTask(Task):
    """Gives features of Gaussian classes, with a little noise that differs from view to view; of
    tokens only patch 1 is of the class."""

    centres: Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)
    calls: list[tuple[str, list[int] | None, bool]] = field(default_factory=list, repr=False)

    def pooled(
        self,
        of: LabelledSet,
        views: Sequence[int] | None = None,
        *,
        stage: str,
        keep: bool = True,
        visible: Visible | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((stage, None if views is None else list(views), keep))
        labels = torch.from_numpy(of.labels)
        rows = [
            self.centres[labels] + self._noise(len(of), number)
            for number in ([-1] if views is None else views)
        ]
        return torch.stack(rows), labels

    def tokens(
        self,
        of: LabelledSet,
        views: Sequence[int] | None = None,
        *,
        stage: str,
        keep: bool = True,
    ) -> tuple[list[Any], Tensor]:
        features, labels = self.pooled(of, views, stage=stage, keep=keep)
        noise = torch.stack([self._noise(len(of), 100 + i) for i in range(4)], 1)  # (n,4,D)
        tokens = []
        for each in features:
            made = noise.clone()
            made[:, 2] = each  # [CLS], patch 0, patch 1
            tokens.append(made.half().numpy())
        return tokens, labels

    def _noise(self, count: int, number: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 + number + count)
        return torch.randn(count, self.centres.shape[1], generator=draw)


def toy_task(gap: float = 3.0, classes: int = 5, width: int = 12, seed: int = 0) -> ToyTask:
    """100 training and 40 test pictures of Gaussian classes, their centres `gap` apart."""
    centres = gap * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    train, test = (Labelled(torch.arange(n) % classes) for n in (100, 40))
    names = [str(i) for i in range(classes)]
    return ToyTask(
        encoder(colour), LabelledSet("train", train, train.labels),
        (TestSet("test", test, test.labels, names),), names, seed=seed, centres=centres,
    )  # fmt: skip


def task_of(frozen: FrozenEncoder, train: Source, test: Source, **options: Any) -> Task:
    """A task over two sources."""
    names = train.classes or [str(i) for i in np.unique(labels_of(train))]
    return Task(
        frozen, LabelledSet("train", train, labels_of(train)),
        (TestSet("test", test, labels_as(test, train), names),), names, **options,
    )  # fmt: skip


def folder_task(frozen: FrozenEncoder, images: Path, test: Path, **options: Any) -> Task:
    """A task over two folders of class folders."""
    sets = open_sets(SetOptions(str(images), [str(test)]))
    return Task(frozen, sets.train, sets.tests, sets.names, **options)
