"""Numbers that several commands take: NaN and infinity pass every comparison, and are refused."""

from __future__ import annotations

import click
import pytest

from featcache.console.params import SEED, FiniteRange


@pytest.mark.parametrize("value", ["nan", "NaN", "-nan", "inf", "1e999", "-1"])
def test_a_number_that_is_not_finite_or_below_is_refused(value: str) -> None:
    with pytest.raises(click.BadParameter):
        FiniteRange(0).convert(value, None, None)


def test_finite_numbers_pass() -> None:
    assert FiniteRange(0, 1).convert("0.25", None, None) == 0.25
    assert FiniteRange(0).convert("1e300", None, None) == 1e300


def test_seeds_are_what_policies_and_generators_take() -> None:
    assert SEED.convert(str(2**63 - 1), None, None) == 2**63 - 1
    with pytest.raises(click.BadParameter):
        SEED.convert(str(2**63), None, None)
