"""One batch is decoded and run through the teachers, to say beforehand how long a cache takes.

Nothing is written. Decoding overlaps with the teacher, so the slower of both sets the pace;
encoding and the disk, which are mostly faster, are left out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from featcache.extraction.forward import run_teacher
from featcache.extraction.plan import Plan
from featcache.extraction.rendering import Rendered, render_views
from featcache.models import precision
from featcache.pictures.source import PictureError


@dataclass(frozen=True)
class BatchTime:
    """Holds the seconds of one batch: decoding and rendering its views in all threads, and the
    teachers of all plans; `views` that were timed."""

    views: int
    decode_s: float
    teacher_s: float

    def seconds(self, views: int) -> float:
        """Return the seconds of so many views at the pace of the slower stage."""
        return views / self.views * max(self.decode_s, self.teacher_s)


def time_batch(plans: Sequence[Plan], batch_size: int, workers: int) -> BatchTime | None:
    """Time a batch of the plans' views, of pictures spread over the source; None where none of
    these can be used."""
    begun = time.perf_counter()
    rendered = list(_rendered(plans, batch_size, workers))
    if not rendered:
        return None
    decode_s = time.perf_counter() - begun
    per_view = decode_s / (len(rendered) * plans[0].views)
    teacher_s = sum(_teacher_s(each, rendered, batch_size) for each in plans)
    return BatchTime(batch_size, per_view * batch_size, teacher_s)


def _rendered(plans: Sequence[Plan], batch_size: int, workers: int) -> Iterator[Rendered]:
    n, wanted = len(plans[0].source), max(-(-batch_size // plans[0].views), workers)
    wanted = min(n, wanted)
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(render_views, plans, i * n // wanted) for i in range(wanted)]
        for task in tasks:
            with contextlib.suppress(PictureError, OSError):  # the work tells of those
                yield task.result()


def _teacher_s(plan: Plan, rendered: Sequence[Rendered], batch_size: int) -> float:
    """Return the seconds of one batch after a first one, which allocates and compiles."""
    views = np.concatenate([each.pixels[plan.input_px, plan.filter] for each in rendered])
    chosen = views[np.arange(batch_size) % len(views)]
    pixels = torch.from_numpy(chosen).to(precision.device_of(plan.teacher))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        run_teacher(plan.teacher, pixels, plan.levels)[-1].cpu()  # waits for the device
        seconds = time.perf_counter() - begun
    return seconds
