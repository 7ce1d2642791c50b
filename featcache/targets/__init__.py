"""A teacher's targets are tensors: normalised levels, attention orders, derived targets, codecs."""
