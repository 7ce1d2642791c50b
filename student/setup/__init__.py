"""The options of `student train` become a run: a cache is matched, views and targets are chosen."""
