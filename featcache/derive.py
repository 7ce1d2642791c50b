"""Targets are derived from what is stored: by `target` for tensors, by `read` for the rows of a
cache."""

from featcache.reading.derived import read
from featcache.targets.derived import NAMES, target

__all__ = ["NAMES", "read", "target"]
