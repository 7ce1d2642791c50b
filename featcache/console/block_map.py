"""A grid of numbers is shown in a terminal as blocks of five shades, or in ASCII where the terminal
takes no more."""

from __future__ import annotations

import sys
from collections.abc import Sequence

BLOCKS = " ░▒▓█"
ASCII = " .:+#"


def block_map(values: Sequence[float], side: int, shades: str = BLOCKS) -> list[str]:
    """Return the lines of a grid (side * side), two characters a number: the first shade is zero,
    the last the upper fifth below the largest.

    >>> block_map([0, 1, 2, 4], 2, ASCII)
    ['  ..', '::##']
    """
    largest = max(max(values), 1e-30)
    last = len(shades) - 1
    marks = [shades[min(last, int(len(shades) * value / largest))] * 2 for value in values]
    return ["".join(marks[i : i + side]) for i in range(0, side * side, side)]


def terminal_shades() -> str:
    """Return the shades that stdout can write."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return ASCII
    return BLOCKS
