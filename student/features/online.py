"""Labelled pictures judge an encoder while it is trained: k-NN, a linear probe, effective rank.

All is cheap and deterministic, and draws from no generator: the pictures are chosen by words of
their keys, and the linear probe is ridge regression to one-hot labels, in closed form. The released
linear protocol is 90 epochs of SGD over several learning rates; its head is solved here in one
step, so that a curve over a run shows the encoder and not the training of the head.

    student train --probe LABELLED

n pictures, N of them to train a head, C classes, D width, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from featcache import rng
from featcache.errors import UserError, counted
from featcache.extraction.knn import K, votes
from featcache.models.hooks import normalise_pixels
from featcache.pictures.decode import decode
from featcache.pictures.source import PictureError, Source
from featcache.views.render import render_centre
from student.features.embed import CROP_PCT, DECODE_THREADS
from student.features.labels import class_name, labels_of
from student.features.rankme import rankme
from student.features.scores import hits, percent
from student.models import losses

MOST = 2048  # pictures, half of them held out
# Times N. On random features of the digits (N = 400, D = 64 to 768) 0.03 and 0.1 are within a point
# of the best of 1e-4 to 10; 1 loses two to three, and 1e-4 loses 27 where N is about D.
RIDGE = 0.1
STD_EPS = 1e-6  # of a channel that hardly varies
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeRows:
    """Holds the rows of a source that train a head and those that are held out, the latter in
    random order, with their labels below `classes`."""

    train: I64
    train_labels: I64
    test: I64
    test_labels: I64
    classes: int


def choose_rows(source: Source, seed: int, most: int = MOST) -> ProbeRows:
    """Choose at most `most` pictures, as many of each class as there are, half of them held out; of
    too many classes, some.

    A word of (seed, key) orders the pictures of a class. Raises UserError where there are no
    labels, fewer than two classes, or a class of one picture.
    """
    labels = labels_of(source)
    raw = rng.words(rng.key_digests(source.keys), rng.stream("probe", seed), 1)[:, 0]
    present, counts = np.unique(labels, return_counts=True)
    _check_classes(source, present, counts)
    chosen = _some_classes(present, seed, most // 2)
    by_word = np.argsort(raw, kind="stable")
    train, test = list[int](), list[int]()
    for label in chosen:
        rows = by_word[labels[by_word] == label][: most // len(chosen)]
        test += rows[: len(rows) // 2].tolist()
        train += rows[len(rows) // 2 :].tolist()
    rows_train, rows_test = (np.array(sorted(rows, key=raw.__getitem__)) for rows in (train, test))
    number = {int(label): i for i, label in enumerate(chosen)}
    train_labels, test_labels = (
        np.array([number[int(label)] for label in labels[rows]]) for rows in (rows_train, rows_test)
    )
    return ProbeRows(rows_train, train_labels, rows_test, test_labels, len(chosen))


def _check_classes(source: Source, present: I64, counts: I64) -> None:
    if len(present) < 2:
        raise UserError(
            f"--probe {source.spec}: all "
            f"{counted(len(source), 'picture is', 'pictures are')} of one class, "
            f"{class_name(source, int(present[0]))}; give pictures of two classes or more"
        )
    if (rare := np.flatnonzero(counts < 2)).size:
        raise UserError(
            f"--probe {source.spec}: {rare.size} of "
            f"{counted(len(present), 'class has', 'classes have')} one picture, the "
            f"first is {class_name(source, int(present[rare[0]]))}; a class needs 2 pictures, one "
            "to train and one held out: give more of them, or leave the class out"
        )


def _some_classes(present: I64, seed: int, most: int) -> I64:
    """Return the classes, or `most` of them by words of their numbers."""
    if len(present) <= most:
        return present
    digests = rng.key_digests(f"class:{label}" for label in present)
    raw = rng.words(digests, rng.stream("probe", seed), 1)[:, 0]
    return np.sort(present[np.argsort(raw, kind="stable")[:most]])


def centre_crops(source: Source, rows: Sequence[int] | I64, size: int) -> U8:
    """Decode pictures once and return their centre crops (n,S,S,3). Raises UserError for a picture
    that cannot be decoded."""

    def crop(row: int) -> U8:
        try:
            return render_centre(decode(source.read(row)), size, CROP_PCT, "bicubic")
        except PictureError as error:
            raise UserError(
                f"--probe {source.spec}: cannot decode the picture {source.keys[row]!r}: {error}; "
                "repair it or take it out of the source"
            ) from error

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        return np.stack(list(pool.map(crop, [int(row) for row in rows])))


# --- features -------------------------------------------------------------------------------------


@torch.no_grad()
def embed(encoder: Any, crops: U8, device: torch.device, batch_size: int = 128) -> Tensor:
    """Embed crops (n,S,S,3) -> (n,D) float32 on the CPU: [CLS] after the encoder's final norm, or
    the mean of the patches where it has none. The encoder is taken in the mode that it is in."""
    parts = []
    for start in range(0, len(crops), batch_size):
        pixels = torch.from_numpy(crops[start : start + batch_size]).to(device).permute(0, 3, 1, 2)
        tokens = encoder.forward_features(
            normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        pooled = tokens[:, 0] if encoder.num_prefix_tokens else tokens.mean(1)
        parts.append(pooled.float().cpu())
    return torch.cat(parts)


# --- scores ---------------------------------------------------------------------------------------


def scores(train: Tensor, test: Tensor, rows: ProbeRows) -> dict[str, float]:
    """Return probe_knn and probe_linear, top-1 in per cent of the held-out features test (n,D), and
    rankme of all of them; NaN where a feature is not finite."""
    every = torch.cat([train, test])
    if not bool(every.isfinite().all()):
        return dict.fromkeys(("probe_knn", "probe_linear", "rankme"), math.nan)
    bank, labels = torch.from_numpy(rows.train_labels), torch.from_numpy(rows.test_labels)
    neighbours = votes(test, train, bank, rows.classes, k=min(K, len(train)))
    linear = ridge_scores(train, bank, test, rows.classes)
    return {
        "probe_knn": percent(hits(neighbours, labels, 1)),
        "probe_linear": percent(hits(linear, labels, 1)),
        "rankme": rankme(every),
    }


def ridge_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Return scores (n,C) float64 of test (n,D) by ridge regression to the one-hot labels (N,) of
    train (N,D).

    Channels are standardised by the mean and std of train, as the linear protocol's BatchNorm does;
    the intercept, the mean of the one-hot labels, is not damped. With X (N,D) standardised and Y
    (N,C) centred, W = (X'X + N RIDGE I)^-1 X'Y, or X'(XX' + N RIDGE I)^-1 Y where N is below D. No
    lambda is searched for: a curve must not jump because another one was found.
    """
    x, queries = train.double(), test.double()
    mean, std = x.mean(0), x.std(0, unbiased=False)
    x, queries = (x - mean) / (std + STD_EPS), (queries - mean) / (std + STD_EPS)
    y = torch.nn.functional.one_hot(labels, classes).double()
    share = y.mean(0)
    damping = RIDGE * len(x)
    if len(x) < x.shape[1]:
        weight = x.T @ _solve(x @ x.T, damping, y - share)
    else:
        weight = _solve(x.T @ x, damping, x.T @ (y - share))
    return queries @ weight + share


def _solve(gram: Tensor, damping: float, right: Tensor) -> Tensor:
    """Solve (gram + damping I) z = right."""
    gram.diagonal().add_(damping)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


# --- alignment ------------------------------------------------------------------------------------


@torch.no_grad()
def cosines(
    predict: Callable[[dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]],
    batches: Iterable[dict[str, Tensor]],
) -> dict[str, float]:
    """Return the mean cosine between what is predicted of a teacher and its target, (B,N,D) both,
    over the pictures and tokens of all batches, for each name that `predict` gives."""
    sums: dict[str, float] = {}
    pictures = 0
    for batch in batches:
        pictures += len(batch["images"])
        for name, (predicted, target) in predict(batch).items():
            cosine = 1 - losses.cosine_distance(predicted, target)  # (B,N)
            sums[name] = sums.get(name, 0.0) + cosine.double().mean(1).sum().item()
    return {name: total / pictures for name, total in sums.items()}
