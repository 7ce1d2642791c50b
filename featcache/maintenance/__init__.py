"""A cache is verified, recomputed, repaired, copied and converted."""
