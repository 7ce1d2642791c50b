"""The stages overlap, and what they write does not depend on it.

Overlap is shown by making one stage wait for another to begin the next batch: stages in turn would
wait for ever.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache import teachers
from featcache.extraction import device_pipeline, extract, plan, rendering
from featcache.extraction import rows as item_rows
from featcache.extraction.progress import STAGES, ExtractProgress
from featcache.models import precision as running
from featcache.pictures import open_source as images
from featcache.storage import zarr_store
from featcache.teachers.synthetic import Synthetic
from featcache.views import pixel_path
from featcache.views.policy import Policy
from tests.conftest import files_below, make_plan, undisturbed

PATIENCE_S = 20.0
VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


class Marks:
    """Marks tell which (stage, number) has begun."""

    def __init__(self) -> None:
        self._changed, self._seen = threading.Condition(), set[tuple[str, int]]()
        self._counts: dict[str, int] = {}

    def begin(self, stage: str) -> int:
        """Note that a stage begins once more; returns how often it had before."""
        with self._changed:
            number = self._counts.get(stage, 0)
            self._counts[stage] = number + 1
            self._seen.add((stage, number))
            self._changed.notify_all()
        return number

    def wait(self, stage: str, number: int) -> None:
        with self._changed:
            begun = self._changed.wait_for(lambda: (stage, number) in self._seen, PATIENCE_S)
        assert begun, f"{stage} {number} has not begun meanwhile"


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("holder", "awaited"),
    [
        (("write", 0), ("encode", 1)),
        (("write", 0), ("teacher", 1)),
        (("encode", 0), ("teacher", 1)),
        (("encode", 1), ("teacher", 2)),
        (("decode", 8), ("teacher", 0)),
        (("teacher", 1), ("decode", 6)),
        (("teacher", 2), ("write", 0)),
    ],
    ids=lambda pair: f"{pair[0]} {pair[1]}",
)
def test_a_stage_goes_on_while_another_is_held_up(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: tuple[str, int],
    awaited: tuple[str, int],
) -> None:
    """11 pictures of one view in one shard, batches of 3."""
    marks = Marks()

    def patch(place: Any, name: str, stage: str) -> None:
        original = getattr(place, name)

        def marked(*args: Any, **options: Any) -> Any:
            if (stage, marks.begin(stage)) == holder:
                marks.wait(*awaited)
            return original(*args, **options)

        monkeypatch.setattr(place, name, marked)

    patch(rendering, "render_views", "decode")
    patch(device_pipeline, "run_teacher", "teacher")
    patch(item_rows, "mask_order", "encode")
    patch(zarr_store.ZarrShardWriter, "append", "write")
    made = make_plan(photos, views=1, rows_per_shard=100)
    extract.run(made, tmp_path / "held", batch_size=3, workers=2)
    monkeypatch.undo()
    extract.run(made, tmp_path / "free", batch_size=3, workers=1)
    assert files_below(tmp_path / "held") == files_below(tmp_path / "free")


@pytest.mark.slow
def test_the_teacher_does_not_run_away(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more batches wait in memory than IN_FLIGHT and the one in the teacher's hands."""
    asked: list[int] = []
    written: list[int] = []
    ahead: list[int] = []
    ask, append = device_pipeline.run_teacher, zarr_store.ZarrShardWriter.append

    def counted(*args: Any) -> Any:
        asked.append(1)
        ahead.append(len(asked) - len(written))
        return ask(*args)

    def slow(*args: Any) -> None:
        threading.Event().wait(0.05)
        append(*args)
        written.append(1)

    monkeypatch.setattr(device_pipeline, "run_teacher", counted)
    monkeypatch.setattr(zarr_store.ZarrShardWriter, "append", slow)
    extract.run(make_plan(photos, rows_per_shard=100), tmp_path / "c", batch_size=2)
    assert len(asked) == 17
    assert max(ahead) == extract.IN_FLIGHT + 1


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("stage", ["decode", "teacher", "encode", "write"])
def test_a_failure_in_any_stage_stops_all_and_leaves_no_litter(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    places = {
        "decode": (rendering, "render_views"),
        "teacher": (device_pipeline, "run_teacher"),
        "encode": (item_rows, "mask_order"),
        "write": (zarr_store.ZarrShardWriter, "append"),
    }
    place, name = places[stage]
    original, calls = getattr(place, name), []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError(stage)
        return original(*args, **options)

    before = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(place, name, fails)
        with pytest.raises(ZeroDivisionError, match=stage):
            extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert threading.active_count() == before
    left = files_below(tmp_path / "c")
    assert all(undisturbed(pictures)[name] == data for name, data in left.items())
    extract.run(make_plan(pictures), tmp_path / "c", batch_size=4)
    assert files_below(tmp_path / "c") == undisturbed(pictures)


class Slow(Synthetic):
    """The synthetic teacher after some rest."""

    def __init__(self) -> None:
        super().__init__(3, 4, 8, 28)
        self.name = "slow"

    def forward(
        self, batch: torch.Tensor, levels: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        threading.Event().wait(0.3)
        return super().forward(batch, levels)


@pytest.mark.slow
def test_the_slowest_stage_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> ExtractProgress:
        progress = ExtractProgress()
        teacher = Slow() if name == "teacher" else Synthetic(3, 4, 8, 28)
        teacher.name = "any"
        made = plan.Plan(
            source=images.open_source(photos),
            teacher=teacher,
            policy=Policy(size=28),
            views=1,
            levels=(3,),
        )
        extract.run(made, tmp_path / name, batch_size=4, progress=progress)
        return progress

    def rest(original: Any) -> Any:
        def rested(*args: Any, **options: Any) -> Any:
            threading.Event().wait(0.3)
            return original(*args, **options)

        return rested

    for stage, place, name in (
        ("decode", pixel_path, "decode"),
        ("copy", device_pipeline.DevicePipeline, "_to_device"),
        ("teacher", None, ""),
        ("encode", item_rows, "mask_order"),
        ("write", zarr_store.ZarrShardWriter, "append"),
    ):
        with monkeypatch.context() as patched:
            if place is not None:
                patched.setattr(place, name, rest(getattr(place, name)))
            progress = run(stage)
        assert progress.slowest == stage, progress.busy
        assert tuple(progress.busy) == STAGES


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_streams_change_no_byte(photos: Path, tmp_path: Path, precision: str) -> None:
    """Overlapped and with a wait after every kernel; near what the CPU gives."""

    def run(name: str, device: str) -> Path:
        teacher = running.configure(teachers.load(VIT, "random:0", device), precision)
        made = plan.Plan(
            source=images.open_source(photos),
            teacher=teacher,
            policy=Policy(size=32),
            views=3,
            levels=(2, 3),
            rows_per_shard=5,
        )
        extract.run(made, tmp_path / name, batch_size=4)
        return tmp_path / name

    first = files_below(run("a", "cuda"))
    for i in range(5):
        assert files_below(run(f"b{i}", "cuda")) == first
    original = device_pipeline.run_teacher
    try:

        def waits(*args: Any) -> Any:
            torch.cuda.synchronize()
            answer = original(*args)
            torch.cuda.synchronize()
            return answer

        device_pipeline.run_teacher = waits
        assert files_below(run("c", "cuda")) == first
    finally:
        device_pipeline.run_teacher = original
    with featcache.open(tmp_path / "a") as a, featcache.open(run("cpu", "cpu")) as b:
        x, y = (cache.read(range(11), 1)["features"].astype(np.float64) for cache in (a, b))
        bound = running.BOUNDS[precision][0]
        assert (np.linalg.norm(x - y, axis=-1) / np.linalg.norm(y, axis=-1)).max() < bound
