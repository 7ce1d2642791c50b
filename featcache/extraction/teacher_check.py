"""A teacher is checked before hours are spent: its features must tell labelled pictures apart.

Wrong weights, a wrong activation or wrong pixel statistics do not stop a network; they make its
features worse. So a few hundred labelled pictures are embedded in their centre view (the last
block's [CLS], normalised), each is classified by its nearest neighbours among the others (weighted
votes as in DINO, Caron et al., ICCV 2021: k = 20, temperature 0.07), and the share that is right is
put beside chance and beside the same vote on 14 x 14 thumbnails of the pixels, which need no
teacher. Chance is what the commonest class alone would get.

n pictures, D width, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.errors import UsageError, UserError, counted
from featcache.extraction.forward import run_teacher
from featcache.extraction.knn import K, votes
from featcache.models import precision, tokenizer
from featcache.models.contract import Teacher
from featcache.pictures.decode import decode
from featcache.pictures.source import PictureError, Source
from featcache.targets import levels
from featcache.views.fingerprint import thumbnail
from featcache.views.policy import AREA, Policy
from featcache.views.render import render_centre

CLASSES, PER_CLASS = 32, 16  # at most; a minute of B/16 on a few cores
CROP_PCT = 0.875
MARGIN = 3.0  # standard errors of a guess; above chance by this much is no chance

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """Holds shares, from 0 to 1, of n pictures that a vote gets right."""

    teacher: str
    pictures: int
    classes: int
    right: float
    pixels: float
    chance: float

    @property
    def needed(self) -> float:
        return self.chance + MARGIN * math.sqrt(self.chance * (1 - self.chance) / self.pictures)

    @property
    def text(self) -> str:
        verdict = (
            ""
            if self.right > self.pixels
            else "; no better than the pixels: are these the right weights?"
        )
        return (
            f"check of {self.teacher}: k-NN {self.right:.1%} of "
            f"{counted(self.pictures, 'picture')} of "
            f"{counted(self.classes, 'class', 'classes')}, chance {self.chance:.1%}, bare pixels "
            f"{self.pixels:.1%}{verdict}"
        )

    def refuse(self) -> None:
        """Raise a UserError at chance level."""
        if self.right <= self.needed:
            raise UserError(
                f"teacher {self.teacher!r} is at chance level on the labelled pictures: k-NN "
                f"{self.right:.1%}, above {self.needed:.1%} is needed (chance {self.chance:.1%} "
                f"and {MARGIN:g} standard errors); check --weights, or leave --check-teacher out"
            )


def check(teacher: Teacher, source: Source, policy: Policy, batch_size: int) -> Score:
    """Score a teacher on labelled pictures: class folders, or tars with .cls members."""
    if isinstance(teacher, tokenizer.TokenizerTeacher):
        raise UsageError(
            f"--check-teacher: {teacher.name!r} gives discrete tokens, not features; leave it out"
        )
    chosen, labels = _choose(source)
    # whole pictures are always Pillow's
    filter = "bicubic" if policy.filter == AREA else policy.filter
    features, thumbnails = [], []
    for low in range(0, len(chosen), batch_size):
        pixels = [
            _view(source, index, teacher.input_px, filter)
            for index in chosen[low : low + batch_size].tolist()
        ]
        thumbnails += [thumbnail(each).reshape(-1) for each in pixels]
        features.append(_embed(teacher, np.stack(pixels)))
    plain = torch.from_numpy(np.stack(thumbnails)).float()
    classes = len(np.unique(labels))
    chance = float(np.bincount(labels).max() / len(labels))
    right, pixels_right = (
        right_share(each, labels) for each in (torch.cat(features), plain - plain.mean(0))
    )
    return Score(teacher.name, len(chosen), classes, right, pixels_right, chance)


def _choose(source: Source) -> tuple[I64, I64]:
    """Return indices and labels of up to PER_CLASS pictures of up to CLASSES classes, both evenly
    spread."""
    labels = source.labels
    if labels is None:
        raise UserError(
            f"--check-teacher {source.spec!r} has no labels: a folder with one sub-folder for each "
            "class, or tars with .cls members, is needed"
        )
    _, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    known = np.flatnonzero(counts >= 2)  # one picture has no neighbour of its class
    if len(known) < 2:
        raise UserError(
            f"--check-teacher {source.spec!r}: "
            f"{counted(len(known), 'class has', 'classes have')} two pictures or more, two "
            "such classes are needed"
        )
    kept = known[_spread(len(known), CLASSES)]
    chosen = [
        np.flatnonzero(labels == each)[_spread(int(counts[each]), PER_CLASS)] for each in kept
    ]
    numbers = np.concatenate(chosen)
    return numbers, labels[numbers]


def _spread(count: int, limit: int) -> I64:
    """Return up to `limit` numbers below `count`, evenly spread.

    >>> _spread(10, 4).tolist(), _spread(3, 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    limit = min(count, limit)
    return np.arange(limit) * count // limit


def _view(source: Source, index: int, size: int, filter: str) -> npt.NDArray[np.uint8]:
    try:
        return render_centre(decode(source.read(index)), size, CROP_PCT, filter)
    except (PictureError, OSError) as error:
        raise UserError(
            f"--check-teacher: picture {source.keys[index]!r} cannot be used: {error}; fix it or "
            "take it away"
        ) from error


@torch.no_grad()
def _embed(teacher: Teacher, pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Map pixels (B, S, S, 3) to features (B, D): [CLS] of the last level, normalised."""
    batch = (
        torch.from_numpy(pixels).to(precision.device_of(teacher)).permute(0, 3, 1, 2).contiguous()
    )
    y, _ = run_teacher(teacher, batch, (teacher.depth,))
    return levels.normalise(y[:, :1])[0][:, 0].float().cpu()


def right_share(features: Tensor, labels: I64) -> float:
    """Return the share of the rows of `features` (n, D) that the votes of their nearest others, by
    cosine, put into their own class."""
    wanted = torch.from_numpy(labels)
    rows, classes, k = features.double(), int(wanted.max()) + 1, min(K, len(features) - 1)
    found = votes(rows, rows, wanted, classes, k=k, leave_one_out=True)
    return float((found.argmax(1) == wanted).double().mean())
