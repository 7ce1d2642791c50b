"""Several seeds as one option, and what is told of numbers that each of them gave."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from featcache.errors import UsageError


def parse_seeds(text: str) -> list[int]:
    """Read different whole numbers parted by commas. Raises UsageError.

    >>> parse_seeds("0,2,1")
    [0, 2, 1]
    """
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(
            f"--seeds {text!r}: different whole numbers parted by commas are needed, such as 0,1,2"
        )
    return [int(part) for part in parts]


def spread(values: Sequence[float], form: str) -> str:
    """Write the mean, and the standard deviation where there are several values.

    >>> spread([1.0, 3.0], ".1f"), spread([2.0], "+.1f")
    ('2.0 ± 1.4', '+2.0')
    """
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
