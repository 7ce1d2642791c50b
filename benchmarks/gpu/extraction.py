"""An extraction is measured against its teacher alone: the bare network over batches that lie on
its device, the whole extraction into nothing, and into the store."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import bench_extract, null_store
from benchmarks.gpu.bench import Bench
from featcache.extraction.options import parse_levels
from featcache.extraction.plan import Plan
from featcache.models import precision as running
from featcache.pictures.open_source import open_source
from featcache.teachers import load
from featcache.views.policy import load_policy

AIM = 1.05
VARIANTS = ("bare forward", "null sink", "store")


def extraction(bench: Bench, teacher: str) -> None:
    """Give both ratios, in fp32 as is the default and in the precision of the other
    measurements."""
    with null_store.registered():
        for precision in dict.fromkeys(("fp32", bench.sizes.precision)):
            _one(bench, teacher, precision)


def _one(bench: Bench, name: str, precision: str) -> None:
    spec, batch_size = bench.sizes.teachers[name], min(bench.sizes.batch_size, 256)
    model = running.configure(load(spec, "random:0", bench.device), precision)
    bare = bench_extract.without_hooks(
        running.configure(load(spec, "random:0", bench.device), precision)
    )
    plan = Plan(
        source=open_source(str(bench.pictures())),
        teacher=model,
        policy=load_policy(size=model.input_px),
        views=1,
        levels=parse_levels(bench.sizes.levels, model.depth),
        rows_per_shard=1024,
    )
    nothing = replace(plan, store=null_store.NAME)
    batches = bench_extract.batches_of(plan, batch_size)
    for each in (nothing, plan):  # the hash of the weights is taken once
        each.manifest()
    bench_extract.forward(bare, batches[:2], ())
    bench_extract.forward(model, batches[:2], plan.levels)

    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        out = Path(temporary) / "cache"

        def run(made: Plan) -> dict[str, object]:
            return bench_extract.extract(made, out, batch_size, bench.workers)

        ways = (
            lambda: bench_extract.forward(bare, batches, ()),
            lambda: run(nothing),
            lambda: run(plan),
        )
        variants = dict(zip(VARIANTS, ways, strict=True))
        reps = range(bench.sizes.extract_reps)
        done = [bench_extract.repetition(variants, out, rep) for rep in reps]
    _rows(bench, precision, len(plan.source), done)


def _rows(bench: Bench, precision: str, views: int, done: list[dict[str, dict]]) -> None:
    seconds = {name: statistics.median(rep[name]["seconds"] for rep in done) for name in VARIANTS}
    bench.row(f"{precision}: store", views / seconds["store"], "views/s", facts=seconds)
    for name in VARIANTS[1:]:
        ratios = [rep[name]["seconds"] / rep["bare forward"]["seconds"] for rep in done]
        note = f"the stage that limits it: {bench_extract.slowest_stage(done, name)}"
        value = statistics.median(ratios)
        bench.row(f"{precision}: {name} / bare forward", value, at_most=AIM, note=note)
