"""Whoever begins a cache makes the state of its codec, from the first views that decode; all others
take it from there.

The views are those of the first pictures of the whole list, whatever share of it this process
takes, in the batches that the cache will be made in. What is summed is what will be stored: levels
as fp16 has them, the tokens that are kept, in their order. L levels, T stored tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.extraction import device_pipeline, rows
from featcache.extraction.forward import rank_tokens
from featcache.extraction.plan import ExtractJob, Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.target_folder import existing_manifest
from featcache.storage import codec_state, manifest
from featcache.storage.part import added_parts, cache_root
from featcache.targets.codecs import get_codec
from featcache.targets.levels import normalise

VIEWS = 256

# a plan and one of its shards -> batches of the views that decode
ShardBatches = Callable[[Plan, Mapping[str, Any]], Iterator[rows.Batch]]


class Known(NamedTuple):
    """The state of a teacher's parts that are there: the rotation, and the mean of each level."""

    rotation: dict[str, Tensor]
    means: dict[int, Tensor]


def with_state(job: ExtractJob, batch_size: int, batches: ShardBatches) -> ExtractJob:
    """Return the job with the state of its codec: that of the cache that is there, else one made
    from the first views and written into the folder. A codec without a state needs none."""
    plan, out = job
    wanted = plan.manifest()
    if not codec_state.needs_state(wanted) or plan.state_file:
        return job
    there = existing_manifest(wanted, out)
    if there is not None:
        return ExtractJob(replace(plan, state_file=codec_state.read_file(out, there)), out)
    known = known_state(cache_root(out), wanted)
    state = make_state(wanted, known, lambda: first_levels(plan, batch_size, batches))
    data = codec_state.pack(state, plan.levels, wanted["id"])
    data = codec_state.begin(out, wanted, plan.state_name, data)
    return ExtractJob(replace(plan, state_file=data), out)


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


def first_levels(plan: Plan, batch_size: int, batches: ShardBatches) -> Iterator[Tensor]:
    """Yield the levels (L, T, D) float16, as they would be stored, of the first views that decode.
    A UserError where none does."""
    pipeline = device_pipeline.DevicePipeline(plan, batch_size, ExtractProgress())
    every = itertools.chain.from_iterable(batches(plan, shard) for shard in plan.shards)
    found = 0
    for batch in every:
        for view in _stored_levels(plan, batch, pipeline.submit(batch).answer):
            yield view
            found += 1
            if found == VIEWS:
                return
    if not found:
        raise UserError(
            f"none of {len(plan.source)} pictures can be used, and codec {plan.codec} begins with "
            "the first of them; give other pictures: --images SRC"
        )


@torch.no_grad()
def _stored_levels(plan: Plan, batch: rows.Batch, answer: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield what is stored of each view's levels, as fp16 has them."""
    *ys, attention = answer
    n = len(batch)
    h = torch.stack([normalise(y[:n])[0].half() for y in ys], 1).cpu().numpy()
    if plan.tokens == "ranked":
        order = rows.order_of(plan, batch, attention[:n].float().cpu().numpy())
        h = rank_tokens(h, order, plan.stored_tokens)
    yield from torch.from_numpy(h)
