"""A fine-tuning gives the same bits after any interruption, and the same losses and scores for any
number of processes and any accumulation, with all of its augmentation on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from student.training import metrics
from tests import finetuning as ft
from tests import processes
from tests import student_fixtures as fx
from tests.student.training.test_train_exact import dies_in, same_averages, stops_after
from tests.test_end_to_end import assert_undisturbed

# all that is random, and more of it than is published
ALL = (
    "mixup=0.8",
    "cutmix=1.0",
    "switch_prob=0.5",
    "erasing=0.7",
    "drop_path=0.4",
    "rand_augment=rand-m9-mstd0.5-inc1",
    "smoothing=0.1",
    "head_std=0.2",
)
STEPS = 6  # three epochs of two
AVERAGE = ("--keep-ema", 0.9)
SLOW = pytest.mark.slow


def best(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(run / "best.safetensors"), "pt") as file:
        about = json.loads(file.metadata()["about"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def result(run: Path) -> dict[str, Any]:
    """What was recorded of the last weights, but for times."""
    (line,) = (run / "results.jsonl").read_text().splitlines()
    return {key: value for key, value in json.loads(line).items() if key not in ("time", "seconds")}


def assert_same_run(run: Path, whole: Path) -> None:
    assert_undisturbed(run, whole)
    assert same_averages(run, whole)
    (here, own), (there, other) = best(run), best(whole)
    assert here == there
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert result(run) == result(whole)


# --- interruptions --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mae", pytest.param("fd", marks=SLOW)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("exact") / request.param
    fx.good(ft.finetune(request.param, run, *AVERAGE, sets=ALL))
    return run


def test_the_whole_run_has_something_to_compare(whole: Path) -> None:
    """Scores move, so that the best is not simply the first or all of them equal."""
    rows = metrics.read(whole)
    scores = [row["top1"] for row in rows if "top1" in row]
    assert [row["step"] for row in rows if "top1" in row] == [2, 4, 6]
    assert len(set(scores)) > 1
    assert all(("ema_top1" in row) == ("top1" in row) for row in rows)
    assert len({row["loss"] for row in rows}) == STEPS
    first = min(row["step"] for row in rows if row.get("top1") == max(scores))
    assert best(whole)[0] == {"step": first, "top1": max(scores)}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["told", "died", "died often saved"])
@pytest.mark.parametrize("step", range(STEPS))
def test_interrupted_at_every_step_and_resumed(
    step: int, way: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop after `step` steps, in the middle of an epoch or at its end; or dead between
    gradients and update, with a checkpoint every epoch or every step."""
    run, recipe = tmp_path / whole.name, whole.name
    options = (*AVERAGE, *(("--save-every", 1) if way == "died often saved" else ()))
    with monkeypatch.context() as patch:
        if way == "told":
            stops_after(patch, step)
            ran = ft.finetune(recipe, run, *options, sets=ALL)
            assert ran.status == (75 if step > 0 else 0)
            assert "--resume" in ran.err or step == 0
        else:
            dies_in(patch, step)
            with pytest.raises(RuntimeError, match="power cut"):
                ft.finetune(recipe, run, *options, sets=ALL)
    if (way, step) != ("told", 0):
        assert not (run / "results.jsonl").exists()
        fx.good(ft.finetune(recipe, run, *options, "--resume", sets=ALL))
    assert_same_run(run, whole)


def _half_written(name: str) -> str:
    """Code that dies in the middle of a file of weights."""
    return f"""
import os, student.models.weights_file
def dies(tensors, path, metadata):
    if {name!r} not in os.path.basename(path):
        return plain(tensors, path, metadata=metadata)
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), 9)
plain, student.models.weights_file.save_file = student.models.weights_file.save_file, dies
"""


# kill -9 where the best weights are ahead of the checkpoints, or half written
KILLS = {
    "between best and checkpoint": """
import os, student.training.train
def dies(run, loader, state, step, metrics):
    if step == 4:
        os.kill(os.getpid(), 9)
    plain(run, loader, state, step, metrics)
plain, student.training.train._save = student.training.train._save, dies
""",
    "while the best is written": _half_written("best"),
    "while the encoder is written": _half_written("encoder"),
    "while a checkpoint is written": """
import os, torch
def dies(content, file):
    if content["step"] == 4:
        os.kill(os.getpid(), 9)
    plain(content, file)
plain, torch.save = torch.save, dies
""",
    "before the result": """
import os, student.features.results
def dies(*args, **kwargs):
    os.kill(os.getpid(), 9)
student.features.results.record = dies
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["mae"], indirect=True)
@pytest.mark.parametrize("where", KILLS)
def test_killed_and_resumed(where: str, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "mae"
    ran = processes.student(1, ft.words("mae", run, *AVERAGE, sets=ALL), before=KILLS[where])
    assert ran.status == [-9], ran.said
    fx.good(ft.finetune("mae", run, *AVERAGE, "--resume", sets=ALL))
    assert_same_run(run, whole)
    encoder = "encoder.safetensors"
    assert (run / encoder).read_bytes() == (whole / encoder).read_bytes()
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_scores_again(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / whole.name))
    fx.good(ft.finetune(whole.name, run, *AVERAGE, "--resume", sets=ALL))
    one, two = (json.loads(line) for line in (run / "results.jsonl").read_text().splitlines())
    for line in (one, two):
        del line["time"], line["seconds"]
    assert one == two
    assert fx.same_weights(run, whole)


# --- processes ------------------------------------------------------------------------------------

WHOLE, HALVES, TWO, BOTH = (1, 8, 1), (1, 4, 2), (2, 4, 1), (2, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "cuts"),
    [
        ("mae", (HALVES, TWO, BOTH)),
        pytest.param("cae", (TWO,), marks=SLOW),
        pytest.param("conv", (BOTH,), marks=SLOW),
    ],
)
def test_any_cut_of_a_step_makes_the_same_losses_and_scores(
    recipe: str, cuts: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    """Processes x pictures x micro-batches are eight pictures a step."""
    runs = {}
    for world, batch, parts in (WHOLE, *cuts):
        run = tmp_path / f"{world}-{batch}"
        # the last option wins
        cut = ("--batch-size", batch, "--accumulate", parts, *AVERAGE)
        words = ft.words(recipe, run, *cut, sets=ALL)
        if world > 1:
            processes.good(processes.student(world, words))
        else:
            fx.good(fx.stud(*words))
        runs[world, batch, parts] = run
    rows = {cut: metrics.read(run) for cut, run in runs.items()}
    expected = rows[WHOLE]
    assert len(expected) == STEPS
    for cut, found in rows.items():
        np.testing.assert_allclose(
            [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-5
        )
        for name in ("top1", "ema_top1", "lr"):
            assert [row.get(name) for row in found] == [row.get(name) for row in expected], name
        assert result(runs[cut])["score"] == result(runs[WHOLE])["score"]
        assert result(runs[cut])["n_test"] == 7
        assert best(runs[cut])[0] == best(runs[WHOLE])[0]


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["mae"], indirect=True)
def test_a_run_goes_on_with_two_processes(whole: Path, tmp_path: Path) -> None:
    """One process to the second epoch, then two with half of the batch each."""
    run = tmp_path / whole.name
    kill = KILLS["while a checkpoint is written"]
    words = ft.words(whole.name, run, *AVERAGE, sets=ALL)
    assert processes.student(1, words, before=kill).status == [-9]
    more = ft.words(whole.name, run, *AVERAGE, "--batch-size", 4, "--resume", sets=ALL)
    processes.good(processes.student(2, more))
    np.testing.assert_allclose(fx.losses(run), fx.losses(whole), rtol=1e-5)
    assert result(run)["score"] == result(whole)["score"]
