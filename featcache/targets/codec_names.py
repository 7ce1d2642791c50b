"""The codecs' names, for those who need no tensors."""

from __future__ import annotations

NAMES = ("fp16", "q8", "t4", "t3")
LOSSLESS = "fp16"  # it has no state, and what every other one encodes
