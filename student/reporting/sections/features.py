"""The features of the teacher and of the students as colours: three principal components, one basis
for all views of a network."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.drawing import pca, pictures
from student.reporting.contents import Contents
from student.reporting.sections import display

EXPLAINED = (
    "The three directions in which the patches of these views differ most, as red, green and blue: "
    "alike in colour is alike in features. Each network has a basis of its own, so colours are "
    "compared within a network, not between two."
)
Tokens = npt.NDArray[np.floating]  # (n, P, D)


def section(contents: Contents) -> str:
    """Return a row for each view: the teacher's last stored level, each student's last block."""
    views = contents.views
    if views is None:
        return ""
    found = _tokens(contents)
    if not found:
        return ""
    columns = {name: _colours(tokens) for name, tokens in found.items()}
    rows = [
        display.row(key, [display.figure(shown[i], name, key) for name, shown in columns.items()])
        for i, key in enumerate(views.keys)
    ]
    return contents.explanation(EXPLAINED) + "\n".join(rows)


def _tokens(contents: Contents) -> dict[str, Tokens]:
    views = contents.views
    assert views is not None
    found: dict[str, Tokens] = {}
    if views.cache is not None and views.teacher_tokens is not None:
        level = views.cache.levels[-1]
        found[f"teacher, level {level}"] = views.teacher_tokens
    for run in contents.runs:
        if (looked := contents.looked(run)) is not None:
            found[f"run {run.name}"] = looked.tokens
    return found


def _colours(tokens: Tokens) -> list[npt.NDArray[np.uint8]]:
    """Return a picture for each view; patches that are not stored are hatched."""
    basis = pca.fit(tokens.reshape(-1, tokens.shape[-1]))
    side = pictures.grid_side(tokens.shape[1])
    known = np.isfinite(tokens).all(-1).reshape(-1, side, side)
    return [
        pictures.patches(pca.rgb(tokens[i], basis), display.SIZE_PX, known[i])
        for i in range(len(tokens))
    ]
