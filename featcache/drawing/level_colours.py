"""Every level gets one basis of three colours, fitted on patches of all the views that are drawn.

N tokens of a level, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from featcache.drawing import pca
from featcache.drawing.stored_view import TeacherReader
from featcache.errors import UserError

MOST_TOKENS = 8192  # of a level: a second of a core at a width of 768


def fit_levels(reader: TeacherReader, views: Sequence[tuple[int, int]]) -> dict[int, pca.Basis]:
    """Return the basis of each level of a teacher, of patches of the (row, view) pairs, evenly
    chosen; a level of which nothing can be read has none."""
    views = views[:: -(-len(views) // MOST_TOKENS) or 1]
    found = {}
    for level in reader.levels:
        tokens = list(_tokens(reader, level, views))
        if tokens and np.isfinite(joined := np.concatenate(tokens)).all(-1).any():
            found[level] = pca.fit(joined)
    return found


def _tokens(
    reader: TeacherReader, level: int, views: Sequence[tuple[int, int]]
) -> Iterable[np.ndarray]:
    """Yield patches of each view: those that are stored, every so many of them."""
    each = max(1, MOST_TOKENS // max(1, len(views)))
    for row, view in views:
        try:
            patches = reader.patches_of(level, row, view)
        except UserError:  # told where the view is drawn
            continue
        known = patches[np.isfinite(patches).all(-1)]
        yield known[:: -(-len(known) // each) or 1]
