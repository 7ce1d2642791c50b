"""A batch on the device is what its host batch says, whoever fills the memory of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from featcache import rng, teachers
from featcache.pictures.open_source import open_source
from featcache.runtime.device_clock import Seconds
from student import config, recipes
from student.data.loader import Loader
from student.data.prefetch import Prefetcher, WaitShare, to_device
from student.recipes import TargetSpec
from student.targets.assemble import draw_masks
from student.targets.cached import CachedTargets
from student.targets.contract import HostBatch
from student.targets.online import OnlineTargets
from tests import student_fixtures as fx

CPU = torch.device("cpu")
STEPS = 12


def made(online: bool, pin: bool = False, stats: bool = False) -> tuple[Any, Loader]:
    """Settings of mralign and a loader of six pictures a batch, from the cache or with the teacher
    in the loop."""
    sets = (
        *fx.RECIPES["mralign"],
        "img_size=32",
        "patch_size=8",
        "teacher_depth=4",
        "teacher_width=24",
    )
    settings = config.from_overrides(recipes.load("mralign").Config, sets)
    cache, source = fx.open_cache(), open_source(fx.pictures())
    fields = ("features", *(["feature_stats"] if stats else []), "attention")
    spec = TargetSpec(
        teacher=fx.TEACHER, levels=(2, 3, 4), fields=fields, patches=16, moments=stats
    )
    cached = CachedTargets(cache, spec, cache.keys.find(source.keys))
    targets: Any = (
        OnlineTargets(cached.policy, spec, teachers.load(fx.TEACHER), fx.VIEWS)
        if online
        else cached
    )
    masks = (
        None if online else lambda host: draw_masks(settings, host, targets.mask_inputs(host), 3)
    )
    digests = rng.key_digests(source.keys)
    return settings, Loader(
        source=source,
        targets=targets,
        pictures=np.arange(24),
        digests=digests,
        seed=3,
        batch_size=6,
        masks=masks,
        pin=pin,
    )


def expected(settings: Any, loader: Loader) -> Iterator[tuple[HostBatch, dict[str, torch.Tensor]]]:
    """Each batch of memory of its own, masks drawn after it."""
    with ThreadPoolExecutor(2) as pool:
        for step in range(STEPS):
            host = replace(loader, masks=None, pin=False).batch(step, 0, pool)
            yield host, to_device(settings, loader.targets, host, CPU, 3)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("online", [False, True])
def test_what_is_taken_is_what_was_loaded(online: bool, stats: bool) -> None:
    """All twelve are kept while the memory they came from is filled again: nothing of a batch
    changes afterwards."""
    settings, loader = made(online, stats=stats)
    feed = Prefetcher(settings, loader.targets, loader.iterate(0, STEPS), CPU, 3)
    kept = []
    for _ in range(STEPS):
        kept.append(feed.take())
        feed.bring()
    for taken, (host, batch) in zip(kept, expected(settings, loader), strict=True):
        assert taken.keys == host["keys"]
        named = {
            "images",
            "features",
            "ids_keep",
            "ids_masked",
            *(["feature_stats", "moments"] if stats else []),
        }
        assert taken.batch.keys() == batch.keys() == named
        for name, values in batch.items():
            assert torch.equal(taken.batch[name], values), name
        assert taken.waited.item() >= 0
    with pytest.raises(StopIteration):
        feed.take()


def test_the_share_of_a_step_that_was_waited() -> None:
    assert WaitShare([Seconds(0.25), Seconds(0.5)], Seconds(3.0)).item() == 0.25
    assert WaitShare([Seconds(2.0)], Seconds(1.0)).item() == 1.0
    assert WaitShare([Seconds()], Seconds(1.0)).item() == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("online", [False, True])
def test_on_a_gpu_beside_a_busy_stream(online: bool) -> None:
    """Copied and decoded on a side stream from page-locked memory while long work runs: what a CPU
    makes of it."""
    device = torch.device("cuda")
    settings, loader = made(online, pin=True)
    if online:
        loader = replace(
            loader, targets=replace(loader.targets, teacher=teachers.load(fx.TEACHER, None, "cuda"))
        )
    feed = Prefetcher(settings, loader.targets, loader.iterate(0, STEPS), device, 3)
    busy = torch.randn(4096, 4096, device=device)
    for _, batch in expected(*made(online)):
        taken = feed.take()
        for _ in range(10):
            busy = torch.nn.functional.normalize(busy @ busy)
        # queued after the long work
        copies = {name: values * 1 for name, values in taken.batch.items()}
        feed.bring()
        for name, values in batch.items():
            torch.testing.assert_close(copies[name].cpu(), values, rtol=1e-5, atol=1e-5)
        assert 0 <= taken.waited.item() < 10
