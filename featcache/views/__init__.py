"""Augmented views are drawn from (seed, key, view), rendered and fingerprinted."""
