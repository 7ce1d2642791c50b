"""Rows of a cache are read at memory speed, checked, joined with pictures by key and decoded."""
