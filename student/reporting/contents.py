"""The contents of a report: the runs, what differs between them, and the views that their models
are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.drawing.page import escape
from student.reporting import student_attention
from student.reporting.reported_run import ReportedRun
from student.reporting.shown_views import VIEW, ShownViews
from student.reporting.student_attention import Looked


@dataclass
class Contents:
    """Holds what the sections of a report draw; each adds to `missing` what it could not show, and
    which option would bring it."""

    runs: list[ReportedRun]
    judged: dict[str, Any]  # of `comparison.judge`
    views: ShownViews | None = None
    missing: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)  # columns that are drawn
    _looked: dict[int, Looked | None] = field(default_factory=dict)

    def looked(self, run: ReportedRun) -> Looked | None:
        """Return what a run's encoder makes of the views; None where there is no encoder or no
        view of its size, which `missing` then tells."""
        if run.number not in self._looked:
            self._looked[run.number] = self._look(run)
        return self._looked[run.number]

    def _look(self, run: ReportedRun) -> Looked | None:
        if self.views is None or run.encoder is None or not run.img_size:
            return None
        pixels = self.views.pixels(run.img_size)
        if pixels is None:
            run.missing.append(
                f"what it makes of views of {run.img_size} pixels: --images SRC, with the pictures "
                "that the cache was made from"
            )
            return None
        looked = student_attention.look(run.encoder, run.images(pixels))
        if not np.isfinite(looked.tokens).all():
            run.missing.append("what it makes of the views: its features are not finite")
            return None
        return looked

    @cached_property
    def backdrop(self) -> npt.NDArray[np.uint8]:
        """Return pixels (n, S, S, 3) to draw on: the views, or a cache's thumbnails of them where
        there are no pictures."""
        assert self.views is not None
        pixels = self.views.pixels(self.views.policy.size)
        backdrop: npt.NDArray[np.uint8] = (
            self.views.stored["thumbnail"] if pixels is None else pixels
        )
        return backdrop

    def explanation(self, text: str) -> str:
        """Return a paragraph that says how pictures are read, and whose the views are."""
        views = self.views
        if views is not None and views.cache is not None:
            text += f" Views {VIEW} of cache {views.cache.manifest['id']}; teacher {views.teacher}."
        return f'<p class="muted">{escape(text)}</p>\n'

    def miss(self, what: str) -> None:
        """Note, once, what is not on the page."""
        if what not in self.missing:
            self.missing.append(what)

    @property
    def all_missing(self) -> list[str]:
        """Return all that is not on the page, that of a run under its name."""
        of_runs = [f"run {run.name}: {what}" for run in self.runs for what in run.missing]
        return [*of_runs, *(self.views.missing if self.views else ()), *self.missing]
