"""Whole numbers that stand within a text are of a size that can be counted with."""

from __future__ import annotations

MOST_COUNTED = 10**6  # of processes that are counted
_DIGITS = 18  # below 2**63; Python itself refuses to read thousands


def is_whole(text: str) -> bool:
    """Return whether a text is a whole number, without a sign, that `int` may be given.

    >>> [is_whole(text) for text in ("12", "-1", "", "9" * 18, "9" * 19)]
    [True, False, False, True, False]
    """
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS


def parse_range(text: str) -> tuple[int, int | None]:
    """Parse a number, or the least and the most of one, which may be open. Raises ValueError.

    >>> parse_range("4"), parse_range("2:8"), parse_range("2:")
    ((4, 4), (2, 8), (2, None))
    """
    least, colon, most = text.partition(":")
    if not is_whole(least) or not (is_whole(most) or not most):
        raise ValueError(text)
    low, high = int(least), int(most) if most else None if colon else int(least)
    if low < 1 or max(low, high or 0) > MOST_COUNTED or (high is not None and high < low):
        raise ValueError(text)
    return low, high
