"""A view policy's numbers are those of a view that can be drawn."""

from __future__ import annotations

import math

import pytest

from featcache.errors import UsageError
from featcache.views.policy import Policy


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": (1e-300, 1e300)},
        {"ratio": (1e308, 1e308)},
        {"ratio": (math.nan, 1.0)},
        {"ratio": (1.0, math.inf)},
        {"ratio": (2.0, 1.0)},
        {"scale": (math.nan, 1.0)},
        {"scale": (0.2, math.inf)},
        {"flip": math.nan},
        {"jitter": math.nan},
    ],
    ids=str,
)
def test_numbers_of_no_view_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"view policy: {next(iter(fields))}"):
        Policy(**fields)  # type: ignore[arg-type]
