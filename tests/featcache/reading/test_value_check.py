"""Numbers of views that no extraction writes are refused as they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featcache.reading.value_check import value_problem

IDENTITY = {"teacher": {"patches": 4, "width": 8}}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("crop", "<i4", [[0, 0, 1, 1], [5, 7, 30, 40]]),
        ("jitter", "<f4", [[1, 1, 1, 0], [0.6, 1.4, 0.6, 5]]),
        ("mask_order", "|u1", [[0, 1, 2, 3], [3, 1, 0, 2]]),
        ("attention", "<f4", [[0, 0.1, 0.2, 0.7]]),
        ("source_size", "<i4", [[1, 1], [500, 375]]),
        ("features", "<f2", [[NAN]]),
        ("crop", "<i4", np.zeros((0, 4))),
    ],
)
def test_what_an_extraction_writes(name: str, dtype: str, values: Any) -> None:
    assert value_problem(name, np.array(values, dtype), IDENTITY) == ""


@pytest.mark.parametrize(
    ("name", "dtype", "values"),
    [
        ("crop", "<i4", [[-1, 0, 1, 1]]),
        ("crop", "<i4", [[0, 0, 0, 1]]),
        ("crop", "<i4", [[0, 0, 2**31 - 1, 1]]),
        ("jitter", "<f4", [[1, 1, 1, 6]]),
        ("jitter", "<f4", [[1, 1, 1, -1]]),
        ("jitter", "<f4", [[NAN, 1, 1, 0]]),
        ("jitter", "<f4", [[1, 1, 1, NAN]]),
        ("jitter", "<f4", [[1, 1e9, 1, 0]]),
        ("mask_order", "|u1", [[0, 1, 2, 4]]),
        ("mask_order", "<u2", [[0, 1, 2, 65535]]),
        ("mask_order", "|u1", [[0, 1, 2, 2]]),
        ("attention", "<f4", [[0, 0, 0, NAN]]),
        ("attention", "<f4", [[0, 0, 0, INF]]),
        ("attention", "<f4", [[0, 0, -0.1, 1]]),
        ("source_size", "<i4", [[0, 5]]),
        ("source_size", "<i4", [[5, -5]]),
    ],
)
def test_what_none_writes(name: str, dtype: str, values: Any) -> None:
    assert value_problem(name, np.array(values, dtype), IDENTITY)
