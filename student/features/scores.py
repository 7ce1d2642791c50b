"""Scores of classes are turned into accuracy: in all, with an interval, and for each class.

n pictures, C classes of the training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student.features.task import Scored

I64 = npt.NDArray[np.int64]
COVERAGE = 0.95


def hits(scores: Tensor, labels: Tensor, first: int) -> Tensor:
    """Return (n,) bool: is the label of each row of `scores` (n,C) among its `first` best classes?

    Equal scores rank the smaller class number first, so that a tie is the same on every device. A
    class that scores -inf cannot be chosen at all.
    """
    own = scores.gather(1, labels[:, None])  # (n,1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return (rank < first) & (own[:, 0] > -torch.inf)


def percent(hit: Tensor) -> float:
    """Return the share of true entries, in per cent.

    >>> percent(torch.tensor([True, False, False, False]))
    25.0
    """
    return float(np.round(100.0 * hit.sum().item() / hit.numel(), 4))


def interval(right: int, count: int) -> list[float]:
    """Return the percentile bootstrap interval of an accuracy, in per cent, at 95 %.

    Drawing `count` pictures anew from `count`, of which `right` are hits, gives a binomial number
    of hits: its quantiles are those of a bootstrap with no end of draws, and nothing is random.

    >>> interval(0, 10), interval(10, 10)
    ([0.0, 0.0], [100.0, 100.0])
    """
    from scipy.stats import binom  # half a second, and nothing else needs it

    tail = (1 - COVERAGE) / 2
    low, high = binom.ppf([tail, 1 - tail], count, right / count)
    return [float(np.round(100.0 * each / count, 4)) for each in (low, high)]


def restrict(scores: Tensor, classes: I64) -> Tensor:
    """Return scores (n,C) with -inf for every class that is not among `classes`."""
    out = torch.full_like(scores, -torch.inf)
    index = torch.from_numpy(classes)
    out[:, index] = scores[:, index]
    return out


def of_test(scored: Scored) -> dict[str, Any]:
    """Return what `summarise` does for a test set, of which some classes may be chosen."""
    test, scores = scored.of, scored.scores
    if test.classes is not None:
        scores = restrict(scores, test.classes)
    return summarise(scores, scored.labels, test.names, test.mapping)


def summarise(
    scores: Tensor, labels: Tensor, names: Sequence[str], mapping: I64 | None = None
) -> dict[str, Any]:
    """Return top-1 with its interval, top-5 from five classes on, and the accuracy of each class,
    as plain JSON.

    `labels` (n,) and `names` are of the training classes; with `mapping` (C,), of another set of
    classes, to which the best class of a picture is mapped: -1 is none of them.
    """
    if mapping is None:
        hit = hits(scores, labels, 1)
    else:
        best = scores.max(1)
        hit = torch.from_numpy(mapping)[best.indices] == labels
        hit &= best.values > -torch.inf
    result: dict[str, Any] = {
        "top1": percent(hit),
        "interval": interval(int(hit.sum()), len(hit)),
    }
    if mapping is None and scores.shape[1] >= 5:
        result["top5"] = percent(hits(scores, labels, 5))
    pictures = torch.bincount(labels, minlength=len(names)).tolist()
    right = torch.bincount(labels[hit], minlength=len(names)).tolist()
    result["per_class"] = {
        name: {"top1": float(np.round(100.0 * good / count, 4)), "pictures": count}
        for name, good, count in zip(names, right, pictures, strict=True)
        if count
    }
    return result | {"n_test": len(labels)}
