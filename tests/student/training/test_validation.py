"""A run is scored as it goes on: by all processes together, whatever can be decoded in each, and
without a trace in the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.errors import UserError
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from student.features import finetuned
from student.features.embed import Rendering, Skipped
from student.features.labels import labels_of
from student.features.task import TestSet
from student.training import metrics, validation
from student.training.validation import ValidationPlan
from tests import finetuning as ft
from tests import processes
from tests import student_fixtures as fx

GREY = (0.5, 0.5, 0.5)


def damaged(tmp_path: Path, *rows: int) -> Path:
    """The test pictures, of which those in some rows are none."""
    place = Path(shutil.copytree(ft.test_pictures(), tmp_path / "damaged"))
    paths = sorted(place.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    for row in rows:
        paths[row].write_bytes(b"no picture")
    return place


def plan(pictures: Path, batch_size: int = 2, allowed: int = 0) -> ValidationPlan:
    source = open_source(str(pictures))
    names = [f"c{i}" for i in range(ft.CLASSES)]
    test = TestSet("test", source, labels_of(source), names)
    rendering, skipped = Rendering(fx.SIZE), Skipped(allowed)
    return ValidationPlan((test,), rendering, GREY, GREY, ft.CLASSES, batch_size, 1, skipped)


def means(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits that say which picture it was: means of its quarters, and of all."""
    x = batch["images"].mean(1)
    half = x.shape[-1] // 2
    parts = [x[:, a : a + half, b : b + half].mean((1, 2)) for a in (0, half) for b in (0, half)]
    return {"logits": torch.stack([*parts, x.mean((1, 2))], 1)}


class Together:
    """Threads that stand for processes; a collective that one of them leaves out is an error after
    ten seconds."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.slots = world, [None] * world
        self.barrier, self.own = threading.Barrier(world, timeout=10), threading.local()
        monkeypatch.setattr(
            validation, "gather_object", lambda x: [y for z in self._all(x) for y in z]
        )

    def _all(self, value: Any) -> list[Any]:
        self.slots[self.own.rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def score(self, scored: ValidationPlan) -> list[Any]:
        """Return what each of them scores, or its error."""

        def one(rank: int) -> Any:
            self.own.rank = rank
            own: Any = SimpleNamespace(
                num_processes=self.world,
                process_index=rank,
                device=torch.device("cpu"),
                gather=lambda rows: torch.cat(self._all(rows)),
            )
            mine = dataclasses.replace(scored, skipped=Skipped(scored.skipped.allowed))
            try:
                (found,) = mine.score(means, own)
            except UserError as error:
                return str(error)
            return found, mine.skipped.told()

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))


ALONE: Any = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))


@pytest.mark.parametrize("world", [2, 3, 4, 7, 9])
def test_every_process_has_the_logits_of_all_in_order(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven pictures on as many processes as divide them, or not, or more than there are."""
    scored = plan(ft.test_pictures())
    (expected,) = scored.score(means, ALONE)
    assert len(expected.scores.unique(dim=0)) == 7
    for found, told in Together(world, monkeypatch).score(scored):
        assert torch.equal(found.scores, expected.scores)
        assert found.labels.tolist() == expected.labels.tolist() == [0, 0, 1, 1, 2, 3, 4]
        assert told == {"count": 0, "first": []}


def test_the_pixels_are_the_normalised_centre_crop() -> None:
    """The mean of a picture of one colour is known: (c / 255 - 0.5) / 0.5."""
    (found,) = plan(ft.test_pictures()).score(means, ALONE)
    source = open_source(str(ft.test_pictures()))
    for row, scores in enumerate(found.scores):
        picture = decode(source.read(row))
        side = min(picture.size) * 0.875  # shorter side -> 32 / 0.875, of which 32 are kept
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        cut = picture.resize((32, 32), Image.Resampling.BICUBIC, box=box)
        expected = (np.asarray(cut).mean() / 255 - 0.5) / 0.5
        assert scores[4].item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("rows", [(0,), (1, 3), (1, 3, 5), (6,)])
def test_what_cannot_be_decoded_is_left_out_by_all(
    rows: tuple[int, ...], batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of two processes has nothing else: rows 1, 3 and 5 are all of the second's."""
    (expected,) = plan(ft.test_pictures()).score(means, ALONE)
    good = [row for row in range(7) if row not in rows]
    scored = plan(damaged(tmp_path, *rows), batch_size, len(rows))
    for found, told in Together(2, monkeypatch).score(scored):
        assert torch.equal(found.scores, expected.scores[good])
        assert torch.equal(found.labels, expected.labels[good])
        assert told["count"] == len(rows)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_too_many_stops_all_with_the_same_line(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pictures of two processes are too many where one may be left out."""
    scored = plan(damaged(tmp_path, 2, 3), allowed=1)
    told = Together(world, monkeypatch).score(scored)
    assert len(set(told)) == 1
    assert "cannot decode the picture 'c1/p06'" in told[0]
    assert "--skip-bad N" in told[0]


def test_no_picture_at_all_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its 7 pictures can be decoded"):
        plan(damaged(tmp_path, *range(7)), allowed=100).score(means, ALONE)


# --- in a run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_with_unequal_shares(tmp_path: Path) -> None:
    """The second has no picture at all, and the network has buffers that DDP would exchange before
    the first; the result tells what was left out."""
    place = damaged(tmp_path, 0, 1, 3, 5)
    outs = {world: tmp_path / str(world) for world in (1, 2)}
    for world, out in outs.items():
        given = ("--test", place, "--skip-bad", 4, "--embed-batch", 1, "--json")
        words = ft.words("fd", out, *given, "--batch-size", 8 // world, "--epochs", 2)
        ran = processes.good(processes.student(world, words))
        facts = json.loads(ran.said[0][ran.said[0].index("{") :])
        assert facts["skipped"]["count"] == 4
        assert facts["n_test"] == 3
    one, two = (metrics.read(out) for out in outs.values())
    assert [row.get("top1") for row in one] == [row.get("top1") for row in two]
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in (one, two)), rtol=1e-5)


@pytest.mark.slow
def test_scores_leave_no_trace_in_the_run(tmp_path: Path) -> None:
    """Losses and weights are those of a run that is scored at its end alone, drop path on."""
    for every in (1, 100):
        sets = ("drop_path=0.5", "head_std=0.2")
        fx.good(ft.finetune("mae", tmp_path / str(every), "--eval-every", every, sets=sets))
    often, once = (metrics.read(tmp_path / every) for every in ("1", "100"))
    assert [row["step"] for row in often if "top1" in row] == [2, 4, 6]
    assert [row["step"] for row in once if "top1" in row] == [6]
    assert [row["loss"] for row in often] == [row["loss"] for row in once]
    assert fx.same_weights(tmp_path / "1", tmp_path / "100")


@pytest.mark.slow
def test_every_second_epoch_and_the_end(tmp_path: Path) -> None:
    fx.good(ft.finetune("mae", tmp_path / "run", "--eval-every", 2))
    scored = [row["step"] for row in metrics.read(tmp_path / "run") if "top1" in row]
    assert scored == [4, 6]


def test_the_best_of_steps_that_are_made_again_does_not_count(tmp_path: Path) -> None:
    """A run goes on from step 4, and its file holds the weights of step 6: they come again, or what
    takes their place."""
    weights = {"x": torch.arange(2.0)}
    state: Any = SimpleNamespace(acc=SimpleNamespace(is_main_process=True), weights=lambda: weights)
    finetuned.write_best(tmp_path / finetuned.BEST, weights, 6, 80.0)
    for first, step, top1 in ((6, 7, 79.0), (6, 7, 80.0), (4, 5, 10.0), (5, 6, 10.0), (5, 6, 11.0)):
        validation._Best(tmp_path, first).take(state, step, top1)
        found = finetuned.best_facts(tmp_path)
        assert found is not None
        expected = {(6, 7): (6, 80.0), (4, 5): (5, 10.0), (5, 6): (5, 10.0)}[first, step]
        assert (found.step, found.top1) == (expected if top1 != 11.0 else (6, 11.0))


def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    """They are scored before the loss of the next step stops the run."""
    run = tmp_path / "run"
    sets = ("lr=1e30", "warmup_epochs=0", "drop_path=0")
    ran = fx.stud(*ft.words("mae", run, "--batch-size", 20, sets=sets))
    assert "loss is nan at step 2" in ran.line
    assert not (run / "best.safetensors").exists()
