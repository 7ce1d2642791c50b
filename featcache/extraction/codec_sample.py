"""Whoever begins a cache makes the state of its codec from the first views that decode, and
measures what it loses of them; all others take it from there.

The views are those of the first pictures of the whole list, whatever share of it this process
takes, in the batches that the cache will be made in. What is summed is what will be stored: levels
as fp16 has them, the tokens that are kept, in their order. L levels, T stored tokens, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from featcache.errors import UserError, counted
from featcache.extraction import device_pipeline, rows
from featcache.extraction.forward import rank_tokens
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.target_folder import existing_manifest
from featcache.models import precision
from featcache.models.tokenizer import network_of
from featcache.storage import codec_state, manifest
from featcache.storage.part import added_parts, cache_root
from featcache.targets import distortion
from featcache.targets.codecs import get_codec
from featcache.targets.levels import normalise

VIEWS = 256
MEASURED = 16  # of them, by which what is lost is told

FirstBatches = Callable[[], Iterator[rows.Batch]]  # of the views that decode, from the first


class Known(NamedTuple):
    """The state of a teacher's parts that are there: the rotation, and the mean of each level."""

    rotation: dict[str, Tensor]
    means: dict[int, Tensor]


@dataclass
class Sample:
    """The first views as they come, of which a few are kept to measure with."""

    levels: list[Tensor] = field(default_factory=list)  # (L, T, D) float16 each
    views: rows.Batch = field(default_factory=list)
    orders: list[Any] = field(default_factory=list)  # of ranked tokens, (P,) each

    def take(self, level: Tensor, view: Any, order: Any) -> None:
        if len(self.levels) < MEASURED:
            self.levels.append(level)
            self.views.append(view)
            self.orders.append(order)


def begin_codec(
    job: ExtractJob, batch_size: int, batches: FirstBatches, progress: ExtractProgress
) -> ExtractJob:
    """Return the job with the state of its codec: that of the cache that is there, else one made
    from the first views and written into the folder, with what it loses of them."""
    plan, out = job
    wanted = plan.manifest()
    if not codec_state.needs_state(wanted):
        return job
    there = existing_manifest(wanted, out)
    if there is not None:
        return ExtractJob(replace(plan, state_file=codec_state.read_file(out, there)), out)
    progress.note(f"codec {plan.codec} first looks at up to {VIEWS} views")
    sample = Sample()
    known = known_state(cache_root(out), wanted)
    state = make_state(wanted, known, lambda: first_levels(plan, batch_size, batches, sample))
    data = codec_state.pack(state, plan.levels, wanted["id"])
    data = codec_state.begin(out, wanted, plan.state_name, data)
    plan = replace(plan, state_file=data)
    if not sample.levels:  # every mean was known
        deque(first_levels(plan, batch_size, batches, sample, count=MEASURED), maxlen=0)
    return ExtractJob(replace(plan, distortion=_measure(plan, batch_size, sample)), out)


def known_state(root: Path, wanted: Mapping[str, Any]) -> Known:
    """Return what the parts of a cache know already for one of its teachers: an addition decodes as
    they do."""
    paths = [root, *added_parts(root)] if (root / manifest.NAME).is_file() else []
    parts = [(path, manifest.read(path)) for path in paths]
    same = [
        (path, about)
        for path, about in parts
        if about["identity"]["teacher"]["name"] == wanted["identity"]["teacher"]["name"]
        and codec_state.needs_state(about)
    ]
    if not same:
        return Known({}, {})
    states = [codec_state.read_state(path, about) for path, about in same]
    levels = [about["identity"]["levels"] for _, about in same]
    return Known(*codec_state.merge(states, levels, root))


def make_state(
    wanted: Mapping[str, Any], known: Known, sample: Callable[[], Iterator[Tensor]]
) -> dict[str, Tensor]:
    """Return the state of a cache's levels; the views are looked at where a level is not known."""
    identity = wanted["identity"]
    levels = identity["levels"]
    if all(level in known.means for level in levels):
        return {"mean": torch.stack([known.means[level] for level in levels]), **known.rotation}
    made = get_codec(identity["codec"]).prepare(sample(), identity["policy"]["seed"])
    mean = [known.means.get(level, made["mean"][i]) for i, level in enumerate(levels)]
    return {**made, **known.rotation, "mean": torch.stack(mean)}


def first_levels(
    plan: Plan, batch_size: int, batches: FirstBatches, sample: Sample, count: int = VIEWS
) -> Iterator[Tensor]:
    """Yield the levels (L, T, D) float16, as they would be stored, of the first views that decode;
    `sample` keeps a few of them. A UserError where none does, or a number is not finite."""
    pipeline = device_pipeline.DevicePipeline(plan, batch_size, ExtractProgress())
    found = 0
    for batch in batches():
        in_flight = pipeline.submit(batch)
        levels, orders = _stored_levels(plan, batch, in_flight.answer)
        pipeline.count(in_flight)
        for i, (level, view, order) in enumerate(zip(levels, batch, orders, strict=True)):
            for k in (~level.isfinite().all(2).all(1)).nonzero()[:1].flatten().tolist():
                raise rows.not_finite_error(plan, batch, i, k)
            sample.take(level, view, order)
            yield level
            found += 1
            if found == count:
                return
    if not found:
        raise UserError(
            f"none of {counted(len(plan.source), 'picture')} can be used, and codec "
            f"{plan.codec} begins with "
            "the first of them; give other pictures: --images SRC"
        )


@torch.no_grad()
def _stored_levels(
    plan: Plan, batch: rows.Batch, answer: tuple[Tensor, ...], orders: Sequence[Any] | None = None
) -> tuple[Tensor, Sequence[Any]]:
    """Return what is stored of each view's levels (n, L, T, D), as fp16 has them, and the orders of
    its patches, which are those given where any are."""
    *ys, attention = answer
    n = len(batch)
    h = torch.stack([normalise(y[:n])[0].half() for y in ys], 1).cpu()
    if plan.tokens != "ranked":
        return h, [None] * n
    order = rows.order_of(plan, batch, attention[:n].float().cpu().numpy())
    order = order if orders is None else np.stack(orders)
    return torch.from_numpy(rank_tokens(h.numpy(), order, plan.stored_tokens)), list(order)


# ------------------------------------------------------------ what is lost


def _measure(plan: Plan, batch_size: int, sample: Sample) -> dict[str, Any]:
    """Measure what the codec loses of the sample, and, of a network, what another batch size and
    another precision change."""
    mean = plan.state["mean"]
    facts = measure_codec(plan.codec, plan.state, sample.levels)
    if not _is_plain_network(plan):
        return facts
    batch = distortion.compare(_again(plan, sample, 1 if batch_size > 1 else 2), mean)
    other = "bf16" if precision.execution_config(plan.teacher).precision == "fp32" else "fp32"
    with precision.run_as(plan.teacher, other):
        arithmetic = distortion.compare(_again(plan, sample, batch_size), mean)
    return {
        **facts,
        "batch_mse": batch.mse,
        "batch_added_loss": batch.added_loss,
        "precision": other,
        "precision_mse": arithmetic.mse,
        "precision_added_loss": arithmetic.added_loss,
    }


def measure_codec(
    name: str, state: Mapping[str, Tensor], views: Sequence[Tensor]
) -> dict[str, Any]:
    """Return what a codec loses of views (L, T, D), as a manifest notes it."""
    codec = get_codec(name)
    pairs = ((h, codec.decode(codec.encode(h, state), state)) for h in views)
    return {"views": len(views), **distortion.compare(pairs, state["mean"])._asdict()}


def _is_plain_network(plan: Plan) -> bool:
    """Tell whether a teacher can be run otherwise: one that is compiled would be compiled again."""
    compiled = precision.execution_config(plan.teacher).compiled
    return isinstance(network_of(plan.teacher), nn.Module) and not compiled


def _again(plan: Plan, sample: Sample, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the levels of the sample and those that the teacher gives now, (L, T, D) each."""
    pipeline = device_pipeline.DevicePipeline(plan, batch_size, ExtractProgress())
    for first in range(0, len(sample.views), batch_size):
        part = slice(first, first + batch_size)
        batch = sample.views[part]
        orders = sample.orders[part] if plan.tokens == "ranked" else None
        in_flight = pipeline.submit(batch)
        levels, _ = _stored_levels(plan, batch, in_flight.answer, orders)
        pipeline.count(in_flight)
        yield from zip(sample.levels[part], levels, strict=True)
