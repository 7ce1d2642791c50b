"""Accuracy, its interval, restricted and mapped classes, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student.features import scores
from student.features.labels import Subset
from student.features.task import Scored, TestSet

INF = float("inf")


def test_an_interval_is_that_of_many_bootstraps() -> None:
    """200,000 resamples of 50 pictures, 36 of them right, by numpy."""
    draw = np.random.default_rng(0)
    hit = np.arange(50) < 36
    means = np.concatenate([hit[draw.integers(0, 50, (20_000, 50))].mean(1) for _ in range(10)])
    want = 100 * np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert scores.interval(36, 50) == pytest.approx(want.tolist(), abs=1e-6)
    assert scores.interval(36, 50) == [60.0, 84.0]


def test_a_class_that_scores_nothing_is_never_chosen() -> None:
    rows = torch.tensor([[-INF, -INF, -INF], [-INF, 0.0, -INF]])
    assert scores.hits(rows, torch.tensor([0, 1]), 1).tolist() == [False, True]
    assert scores.hits(rows, torch.tensor([0, 0]), 3).tolist() == [False, False]


def scored(classes: object = None, mapping: object = None) -> Scored:
    """Four pictures of five classes; their best classes are 4, 1, 0, 2."""
    rows = torch.tensor(
        [
            [0.1, 0.2, 0.3, 0.0, 0.9],
            [0.1, 0.8, 0.3, 0.0, 0.7],
            [0.5, 0.2, 0.3, 0.0, 0.4],
            [0.1, 0.2, 0.6, 0.5, 0.0],
        ]
    )
    labels = np.array([2, 1, 0, 3])
    names = ["a", "b", "c", "d", "e"]
    if mapping is not None:
        labels, names = np.array([1, 0, 0, 1]), ["low", "high"]
    source = Subset(None, [], "none")  # type: ignore[arg-type]
    test = TestSet("t", source, labels, names, classes, mapping)  # type: ignore[arg-type]
    return Scored(test, rows, torch.from_numpy(labels))


def test_all_classes_may_be_chosen() -> None:
    got = scores.of_test(scored())
    assert got["top1"] == 50.0  # the second and the third
    assert got["top5"] == 100.0
    assert got["n_test"] == 4
    assert got["per_class"] == {
        "a": {"top1": 100.0, "pictures": 1},
        "b": {"top1": 100.0, "pictures": 1},
        "c": {"top1": 0.0, "pictures": 1},
        "d": {"top1": 0.0, "pictures": 1},
    }


def test_a_subset_takes_the_other_classes_out() -> None:
    """Without e and c the first picture's best is b, the last one's is d."""
    got = scores.of_test(scored(classes=np.array([0, 1, 3])))
    assert got["top1"] == 75.0
    assert got["per_class"]["c"]["top1"] == 0.0  # it cannot be chosen
    assert got["top5"] == 75.0


def test_classes_are_mapped_to_those_of_the_test_set() -> None:
    """a and b are low, c and d high, e is none: the first picture's e is wrong whatever it is."""
    got = scores.of_test(scored(mapping=np.array([0, 0, 1, 1, -1])))
    assert got["top1"] == 75.0
    assert got["per_class"] == {
        "high": {"top1": 50.0, "pictures": 2},
        "low": {"top1": 100.0, "pictures": 2},
    }
    assert "top5" not in got


def test_no_score_at_all_is_wrong_under_a_map_too() -> None:
    got = scores.summarise(torch.full((1, 2), -INF), torch.tensor([0]), ["x"], np.array([0, 0]))
    assert got["top1"] == 0.0
