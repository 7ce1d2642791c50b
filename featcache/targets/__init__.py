"""A teacher's targets as tensors: normalised levels, attention orders, derived targets, codecs."""
