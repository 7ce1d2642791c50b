"""Statistics of arrays against numpy on the whole data, however the stream is cut and over shards.

n items, L levels, T tokens, D channels, P patches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.storage.statistics import (
    FeatureStatistics,
    Statistics,
    entropy,
    merge_totals,
    totals,
)

L, T, D, P = 2, 3, 4, 5
CUTS = st.lists(st.integers(0, 12), max_size=5)


def data(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "features": random.standard_normal((n, L, T, D)).astype(np.float32) * 3,
        "attention": random.random((n, P)).astype(np.float32),
        "area": random.standard_normal(n).astype(np.float32),
        "crop": random.integers(-50, 900, (n, 4)).astype(np.int32),
        "flip": random.integers(0, 2, n).astype(np.uint8),
        "pixel_hash": random.integers(0, 2**63, n, np.uint64),
        "row_crc": random.integers(0, 2**32, (n, L), np.uint32),
    }


def of_features(values: np.ndarray) -> FeatureStatistics:
    if not values.size:
        return FeatureStatistics(math.inf, -math.inf, np.zeros((0, L), np.float32))
    norms = np.linalg.norm(values.astype(np.float64), axis=-1).mean(-1)
    return FeatureStatistics(values.min().item(), values.max().item(), norms.astype(np.float32))


def gathered(items: dict[str, np.ndarray], cuts: Sequence[int] = ()) -> dict[str, dict[str, Any]]:
    n = len(items["features"])
    statistics = Statistics()
    for low, high in pairwise(sorted({0, n, *(cut % (n + 1) for cut in cuts)})):
        part = {name: values[low:high] for name, values in items.items()}
        statistics.add(part, of_features(part["features"]))
    return statistics.summary()


@given(n=st.integers(1, 12), cuts=CUTS, seed=st.integers(0, 5))
def test_any_split_gives_numpys_numbers(n: int, cuts: list[int], seed: int) -> None:
    items = data(n, seed)
    got = gathered(items, cuts)
    assert got == gathered(items)  # to the last bit
    # the range of a hash says nothing
    assert got.keys() == {"features", "attention", "area", "crop", "flip"}
    for name, facts in got.items():
        assert (facts["min"], facts["max"]) == (items[name].min(), items[name].max()), name
        assert facts["non_finite"] == 0
    norms = np.linalg.norm(items["features"].astype(np.float64), axis=-1)
    assert got["features"]["norm"] == pytest.approx(norms.mean(), rel=1e-6)
    p = items["attention"].astype(np.float64)
    p /= p.sum(1, keepdims=True)
    assert got["attention"]["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-9)
    assert set(got["crop"]) == {"min", "max", "non_finite"}


def test_the_summary_is_plain_json() -> None:
    got = gathered(data(3))
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert type(got["crop"]["min"]) is int
    assert type(got["area"]["max"]) is float


def test_nothing_added_nothing_known() -> None:
    assert Statistics().summary() == {}
    empty = Statistics()
    empty.add(data(0), of_features(data(0)["features"]))
    assert empty.summary() == {}


def test_numbers_that_are_none_are_counted() -> None:
    items = data(6)
    items["area"][[1, 4]] = [np.inf, -np.inf]
    items["area"][5] = np.nan
    assert gathered(items, [2, 5])["area"]["non_finite"] == 3
    assert gathered(items, [2, 5])["crop"]["non_finite"] == 0


def test_entropy_by_hand() -> None:
    """Uniform over four is ln 4, one patch alone has none, halves ln 2; the sum of the weights does
    not matter, and no weight at all is no entropy, not a NaN."""
    weights = np.array([[1, 1, 1, 1], [0, 5, 0, 0], [0.25, 0, 0, 0.25], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(entropy(weights), [math.log(4), 0, math.log(2), 0], atol=1e-12)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_merged_shards_are_as_one(sizes: list[int], seed: int) -> None:
    """Two views a row; shards without rows have no statistics."""
    items = data(2 * sum(sizes), seed)
    edges = [2 * sum(sizes[:i]) for i in range(len(sizes) + 1)]
    records = [
        {
            "rows": (high - low) // 2,
            "statistics": gathered({k: v[low:high] for k, v in items.items()}),
        }
        for low, high in pairwise(edges)
    ]
    got = merge_totals([totals(records)])
    whole = gathered(items) if sum(sizes) else {}
    assert got.keys() == whole.keys()
    for name, facts in whole.items():
        assert got[name] == pytest.approx(facts, rel=1e-9), name


def test_merged_by_hand() -> None:
    records = [
        {
            "rows": 1,
            "statistics": {"features": {"min": -1.0, "max": 2.0, "non_finite": 0, "norm": 4.0}},
        },
        {"rows": 0, "statistics": {}},
        {
            "rows": 3,
            "statistics": {
                "features": {"min": 0.0, "max": 5.0, "non_finite": 2, "norm": 8.0},
                "attention": {"min": 0.0, "max": 1.0, "non_finite": 1, "entropy": 0.5},
            },
        },
    ]
    assert merge_totals([totals(records)]) == {
        "features": {"min": -1.0, "max": 5.0, "non_finite": 2, "norm": 7.0},
        "attention": {"min": 0.0, "max": 1.0, "non_finite": 1, "entropy": 0.5},
    }
    assert records[0]["statistics"]["features"]["norm"] == 4.0  # type: ignore[index]
    assert merge_totals([totals([])]) == {}
