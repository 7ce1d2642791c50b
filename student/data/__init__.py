"""Batches: the order of samples, reading and decoding, prefetching to the device."""
