"""Run folders are summed up, listed and compared here; nothing in them is written or executed."""
