"""The pictures of a run are compared with its cache before the first step, and on every resume.

Each process looks at its share of the sample and at the pictures of its own first step; a miss in
one of them stops all. Nothing is compared where pixels come from the cache, or no cache is read, or
`--check-pixels 0` asks for none.
"""

from __future__ import annotations

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from featcache.errors import IdentityError, UserError, counted
from featcache.reading.sample_check import PictureCheck
from student import checkpoint
from student.data.loader import Loader
from student.setup.options import Say
from student.targets.cached import TOLERANCE_ADVICE, CachedTargets
from student.targets.fallback import FallbackTargets
from student.training.train import Run


def check_pictures(run: Run, loader: Loader, acc: Accelerator, say: Say) -> None:
    """Raise IdentityError, in every process, unless sizes and pixels of a sample and the sizes of
    the first step's pictures are those of the cache; a collective. Says how many were looked at."""
    targets = run.targets
    cached = targets.cached if isinstance(targets, FallbackTargets) else targets
    if not isinstance(cached, CachedTargets) or cached.stored_pixels or not loader.check_fraction:
        return
    check = PictureCheck(
        cached.cache,
        loader.source,
        loader.pictures,
        cached.rows,
        cached.tolerance,
        TOLERANCE_ADVICE,
        loader.workers,
    )
    sample = check.sample(run.seed)
    error: UserError | None = None
    try:
        check.check_sizes(_first_pictures(run, loader))
        check.check_pixels(sample[loader.rank :: loader.world], run.seed)
    except UserError as problem:
        error = problem
    _stop_all(error, acc)
    say(
        f"note: checked {counted(len(sample), 'picture')} of "
        f"{counted(check.shards(sample), 'shard')} against the cache, "
        "and the sizes of the first step's pictures"
    )


def _first_pictures(run: Run, loader: Loader) -> np.ndarray:
    """Return the training pictures of this process's first step."""
    step = (checkpoint.latest_step(run.out) or 0) if run.resume else 0
    return np.unique(
        np.concatenate([loader.rows(step, micro)[0] for micro in range(loader.accumulation)])
    )


def _stop_all(error: UserError | None, acc: Accelerator) -> None:
    """Raise the error of this process, or that of another; a collective."""
    if acc.num_processes > 1:
        texts = gather_object([str(error) if error else None])
        other = next((text for text in texts if text), None)
        error = error or (IdentityError(other) if other else None)
    if error is not None:
        raise error
