"""Options and variables are read that several commands share: two numbers as one option, such as
--scale 0.2,1 or --ratio 3/4,4/3, finite numbers, seeds and the pictures."""

from __future__ import annotations

import math
import os
from typing import Any

import click

from featcache.errors import UsageError
from featcache.pictures.source import ALLOWED


class FloatPair(click.ParamType):
    """One option takes two numbers parted by a comma, fractions allowed: 0.2,1 or 3/4,4/3."""

    name = "LOW,HIGH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        try:
            low, high = (_number(part) for part in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(
                f"{value!r} given; two numbers parted by a comma are needed, such as 0.2,1 or "
                "3/4,4/3",
                param,
                ctx,
            )
        return low, high


class FiniteRange(click.FloatRange):
    """One option takes a finite number of a range: NaN passes every comparison."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


SEED = click.IntRange(0, 2**63 - 1)  # what a view policy allows, and torch's generator takes


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


def require_images(spec: str | None) -> str:
    """Return --images, or FEATCACHE_IMAGES; UsageError says what may be given."""
    spec = spec or os.environ.get("FEATCACHE_IMAGES")
    if not spec:
        raise UsageError(
            f"no pictures given: --images SRC is {ALLOWED}; FEATCACHE_IMAGES sets a default"
        )
    return spec
