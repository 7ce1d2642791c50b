"""What the teacher's and the students' [CLS] look at, on the same whole views (MaskAlign's Figure
3), with the outline of the patches that hold half of the attention (CAE's Figure 6)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featcache.drawing import pictures
from student.reporting.contents import Contents
from student.reporting.sections import display

SHARE = 0.5  # of the attention, inside of the outline
EXPLAINED = (
    "How much [CLS] looks at each patch in the last block: mean over heads, of the whole view, "
    "nothing hidden. Black is none, yellow each map's own largest. The outline holds the fewest "
    "patches that have half of the attention."
)
F64 = npt.NDArray[np.floating]


def section(contents: Contents) -> str:
    """Return a row for each view: the view, the teacher, each student."""
    views = contents.views
    if views is None:
        return ""
    maps = _maps(contents)
    if not maps:
        return ""
    rows = []
    for i, key in enumerate(views.keys):
        view = display.resized(contents.backdrop[i])
        figures = [display.figure(view, "the view", key)]
        figures += [display.figure(_drawn(view, rows[i]), name, key) for name, rows in maps.items()]
        rows.append(display.row(key, figures))
    return contents.explanation(EXPLAINED) + "\n".join(rows)


def _maps(contents: Contents) -> dict[str, F64]:
    """Return attention (n, P) by whose it is."""
    views = contents.views
    assert views is not None
    maps = {}
    if "attention" in views.stored:
        maps["teacher"] = views.stored["attention"]
    elif views.cache is not None:
        contents.miss("the teacher's attention: the cache has none, for want of a [CLS] token")
    else:
        contents.miss("the teacher's attention and features: --cache CACHE")
    for run in contents.runs:
        looked = contents.looked(run)
        if looked is not None and looked.attention is not None:
            maps[f"run {run.name}"] = looked.attention
        elif looked is not None:
            run.missing.append(
                "attention: its encoder has no [CLS] token, or attention of another kind"
            )
    return maps


def _drawn(view: npt.NDArray[np.uint8], attention: F64) -> npt.NDArray[np.uint8]:
    side = pictures.grid_side(len(attention))
    weights = attention.reshape(side, side)
    return pictures.contour(pictures.attention_map(view, weights), weights, SHARE)
