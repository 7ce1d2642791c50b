"""The pictures of `--probe` are chosen before training, and a teacher makes targets of some of them
once.

The teacher is that of the run: the one in its loop, or the one that its cache was made with, whose
own levels are compared with, whatever codec the cache keeps them in. n held-out
pictures, S pixels a side, L levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.runtime import device as devices
from featcache.targets import levels
from student.data.prefetch import to_device
from student.features import online
from student.recipes import TargetSpec
from student.setup.cache_match import MatchedCache
from student.setup.options import Options, RunRequest
from student.setup.teacher_choice import load_teacher
from student.setup.training_inputs import TrainingInputs
from student.targets.cached import CachedTargets
from student.targets.contract import HostBatch
from student.targets.fallback import FallbackTargets
from student.targets.online import OnlineTargets
from student.training.online_probe import ProbePlan
from student.training.train_state import sharded

ALIGNED = 256  # held-out pictures that the teacher is run on
BATCH = 64


@dataclass(frozen=True)
class HeldOut:
    """Holds the held-out pictures of a source that the teacher is run on: rows (n,) and centre
    crops (n,S,S,3)."""

    source: Source
    rows: online.I64
    crops: online.U8


def probe_plan(request: RunRequest, inputs: TrainingInputs, acc: Accelerator) -> ProbePlan | None:
    """Choose the pictures of --probe; None where it is not given. Raises UserError for pictures
    that no probe can be made of."""
    options = request.options
    _check_options(options, acc)
    if options.probe is None:
        return None
    source = open_source(options.probe)
    rows = online.choose_rows(source, options.seed)

    def align(crops: online.U8) -> list[dict[str, Tensor]]:
        return _alignment(request, inputs, HeldOut(source, rows.test[:ALIGNED], crops[:ALIGNED]))

    return ProbePlan(source, rows, inputs.config.img_size, options.probe_every, align, request.say)


def _check_options(options: Options, acc: Accelerator) -> None:
    if options.probe_every is not None and options.probe is None:
        raise UsageError(
            f"--probe-every {options.probe_every} says how often --probe is done, which is not "
            "given: give both, or none"
        )
    if options.probe is not None and sharded(acc):
        raise UsageError(
            "--probe does not go with FSDP, which gives each process a part of the weights; leave "
            "one out, and use `student eval` on a checkpoint"
        )


# --- what the teacher says of held-out pictures ---------------------------------------------------


def _alignment(
    request: RunRequest, inputs: TrainingInputs, pictures: HeldOut
) -> list[dict[str, Tensor]]:
    """Return batches as the recipe takes them, on the host and without `images`; none where the
    recipe predicts no level of a teacher, or the teacher cannot be had, of which a note tells."""
    spec = request.recipe.needs(inputs.config)
    if not hasattr(request.recipe.Model, "predictions") or "features" not in spec.fields:
        return []
    try:
        targets = _teacher_targets(request, inputs, spec)
    except (UserError, OSError) as error:
        if request.options.weights:
            raise
        request.say(
            f"note: --probe leaves alignment out, as the teacher cannot be had: {error}; --weights "
            "FILE gives it, with --teacher-name SPEC where it is a file of your own"
        )
        return []
    batches = list(_batches(request, inputs, targets, pictures))
    if spec.moments:
        _add_moments(batches, inputs)
    del targets
    if devices.is_gpu(torch.device(request.device)):
        torch.cuda.empty_cache()
    return batches


def _teacher_targets(
    request: RunRequest, inputs: TrainingInputs, spec: TargetSpec
) -> OnlineTargets:
    """Return what the run's teacher gives of views of our own."""
    # Moments are of a step's whole batch, a collective, and here one process is at work. No other
    # teacher is run: its arrays are left out.
    fields = tuple(name for name in spec.fields if "/" not in name)
    spec = dataclasses.replace(spec, fields=fields, second="", moments=False)
    own = inputs.targets.online if isinstance(inputs.targets, FallbackTargets) else inputs.targets
    assert isinstance(own, CachedTargets | OnlineTargets)
    if isinstance(own, OnlineTargets):
        return OnlineTargets(own.policy, spec, own.teacher, 1, own.order)
    found = MatchedCache(own.cache, inputs.config, spec, request.settings)
    teacher = load_teacher(request, found)
    return OnlineTargets(own.policy, spec, teacher, 1, own.cache.identity["order"])


def _batches(
    request: RunRequest, inputs: TrainingInputs, targets: OnlineTargets, pictures: HeldOut
) -> Iterator[dict[str, Tensor]]:
    """Run the teacher on the crops, masks drawn as in epoch 0."""
    source, rows, device = pictures.source, pictures.rows, torch.device(request.device)
    digests = rng.key_digests(source.keys[row] for row in rows)
    theirs = online.centre_crops(source, rows, targets.teacher_px) if targets.teacher_px else None
    for start in range(0, len(rows), BATCH):
        some = slice(start, start + BATCH)
        zeros = np.zeros(len(rows[some]), np.int64)
        host: HostBatch = {"pixels": pictures.crops[some], "digests": digests[some]}
        host |= {"view": zeros, "round": zeros}
        if theirs is not None:
            host["teacher_pixels"] = theirs[some]
        batch = to_device(inputs.config, targets, host, device, request.options.seed)
        del batch["images"]  # made of the crops again
        yield {name: _kept(name, value) for name, value in batch.items()}


def _kept(name: str, value: Tensor) -> Tensor:
    """Bring an array to the host; whole levels in fp16, as a cache has them."""
    return value.half().cpu() if name == "features" else value.cpu()


def _add_moments(batches: list[dict[str, Tensor]], inputs: TrainingInputs) -> None:
    """Add `moments` (L, 2), over all held-out pictures, to each batch."""
    stats = torch.cat([batch["feature_stats"] for batch in batches])
    moments = levels.moments(levels.moment_sums(stats, inputs.config.teacher_width))
    for batch in batches:
        batch["moments"] = moments
