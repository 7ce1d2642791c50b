"""The codecs' names, for those who need no tensors."""

from __future__ import annotations

from featcache.errors import UsageError, near

NAMES = ("fp16", "q8", "t4", "t3")
LOSSLESS = "fp16"  # it has no state, and what every other one encodes


def check(name: str) -> None:
    """Raise UsageError for a name that --codec does not take."""
    if name not in NAMES:
        raise UsageError(f"--codec {name!r}: {near(name, NAMES)}")
