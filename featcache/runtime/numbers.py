"""Whole numbers that stand within a text are of a size that can be counted with."""

from __future__ import annotations

_DIGITS = 18  # below 2**63; Python itself refuses to read thousands


def is_whole(text: str) -> bool:
    """Return whether a text is a whole number, without a sign, that `int` may be given.

    >>> [is_whole(text) for text in ("12", "-1", "", "9" * 18, "9" * 19)]
    [True, False, False, True, False]
    """
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS
