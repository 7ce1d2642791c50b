"""Targets that follow from what is stored: `target` for tensors, `read` for the rows of a cache."""

from featcache.reading.derived import read
from featcache.targets.derived import NAMES, target

__all__ = ["NAMES", "read", "target"]
