"""`pair` matches the rows of two caches by key, where both show the same crops of the same
pictures."""

from featcache.reading.pairing import pair

__all__ = ["pair"]
