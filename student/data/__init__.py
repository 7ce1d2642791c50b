"""Batches are sampled, decoded and read, and prefetched to the device."""
