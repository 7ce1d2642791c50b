"""A run makes the same steps for any number of processes, shows every picture once an epoch, and
gives the same numbers after any interruption.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import student.training.train
from student import checkpoint
from student.targets.cached import CachedTargets
from student.training import metrics
from tests import processes
from tests import student_fixtures as fx
from tests.test_end_to_end import assert_undisturbed

OFF = ("drop_path=0",)
DROPS = ("drop_path=0.1",)
HALVES = ("drop_path=0.5",)
SLOW = pytest.mark.slow

# Notes which pictures each process took in each step.
NOTING = """
import json, student.training.train
plain = student.training.train.train_step
def noting(*args):
    result = plain(*args)
    with open({place!r} + f"/{{RANK}}.jsonl", "a") as file:
        row = result.row
        noted = {{"step": row["step"], "epoch": row["epoch"], "keys": result.keys}}
        file.write(json.dumps(noted) + "\\n")
    return result
student.training.train.train_step = noting
"""


def noting(place: Path) -> str:
    place.mkdir()
    return NOTING.format(place=str(place))


def seen(place: Path, world: int) -> dict[int, list[str]]:
    """Step -> the pictures of all processes."""
    out: dict[int, list[str]] = {}
    for rank in range(world):
        rows = [json.loads(line) for line in (place / f"{rank}.jsonl").read_text().splitlines()]
        for row in rows:
            out.setdefault(row["step"], []).extend(row["keys"])
    return out


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mralign", pytest.param("maskalign", marks=pytest.mark.slow)])
def test_one_process_with_batch_16_equals_two_with_batch_8(recipe: str, tmp_path: Path) -> None:
    """The same losses to 1e-5 at step 1 and 1e-4 over 20 steps, drop path on, and the same pictures
    in each step."""
    common = ("--cache", fx.cache_path(), "--steps", "20")
    for world, batch in ((1, 16), (2, 8)):
        run = ("--out", tmp_path / f"run{world}", "--batch-size", batch)
        before = noting(tmp_path / f"seen{world}")
        processes.good(
            processes.train(world, *common, *run, recipe=recipe, sets=DROPS, before=before)
        )
    one, two = (np.array(fx.losses(tmp_path / f"run{world}")) for world in (1, 2))
    assert len(one) == 20
    assert abs(one[0] - two[0]) <= 1e-5 * one[0]
    assert np.abs(one - two).max() <= 1e-4 * one.min()
    assert one[-1] < 0.9 * one[0]  # it learns: the comparison is not of a standstill
    first, second = seen(tmp_path / "seen1", 1), seen(tmp_path / "seen2", 2)
    assert {step: set(keys) for step, keys in first.items()} == {
        step: set(keys) for step, keys in second.items()
    }
    assert all(len(keys) == 16 for keys in second.values())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mralign", pytest.param("maskalign", marks=pytest.mark.slow)])
def test_micro_batches_are_one_batch(recipe: str, tmp_path: Path) -> None:
    """Two of 8 are one of 16 with drop path on, in one process and in two with two of 4 each."""
    runs = {(1, 16, 1): [0.0], (1, 8, 2): [0.0], (2, 4, 2): [0.0]}
    for world, batch, parts in runs:
        run = tmp_path / f"{world}-{batch}"
        options = ("--batch-size", batch, "--accumulate", parts, "--steps", 6, "--out", run)
        processes.good(
            processes.train(world, "--cache", fx.cache_path(), *options, recipe=recipe, sets=HALVES)
        )
        runs[world, batch, parts] = fx.losses(run)
    for losses in runs.values():
        np.testing.assert_allclose(losses, runs[1, 16, 1], rtol=1e-5)


@pytest.mark.parametrize("recipe", sorted(fx.RECIPES))
@SLOW
def test_every_recipe_makes_the_same_numbers_in_two_processes(recipe: str, tmp_path: Path) -> None:
    """Losses, their parts and the gradient's norm, drop path at a half."""
    rows = []
    for world, batch in ((1, 8), (2, 4)):
        options = ("--batch-size", batch, "--steps", 3, "--out", tmp_path / str(world))
        sets = (*HALVES, "clip_grad=1.0")
        cache = ("--cache", fx.cache_of(recipe))
        processes.good(processes.train(world, *cache, *options, recipe=recipe, sets=sets))
        rows.append(metrics.read(tmp_path / str(world)))
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in sorted(set(one) - set(metrics.CLOCKS)):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@SLOW
@pytest.mark.parametrize(
    "way",
    [
        ("--teacher", "online"),
        ("--aug-repeats", 2),
        ("--sampling", "block"),
        ("--resident",),
        ("--checkpoint-activations", "--ema", 0.9),
        ("--accumulate", 2),
    ],
    ids=lambda way: way[0],
)
def test_every_way_of_training_is_the_same_in_two_processes(
    way: tuple[object, ...], tmp_path: Path
) -> None:
    """Drop path at a half, six steps."""
    for world, batch in ((1, 8), (2, 4)):
        options = ("--batch-size", batch, "--steps", 6, "--out", tmp_path / str(world), *way)
        cache = ("--cache", fx.cache_path())
        processes.good(processes.train(world, *cache, *options, recipe="mralign", sets=HALVES))
    one, two = (fx.losses(tmp_path / str(world)) for world in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mralign", pytest.param("maskalign", marks=pytest.mark.slow)])
@pytest.mark.parametrize("given", [(), ("--batch-size", 16)])
def test_a_run_goes_on_with_another_number_of_processes(
    recipe: str, given: tuple[str | int, ...], tmp_path: Path
) -> None:
    """4 steps on two, 4 on one, which takes the global batch by itself: the run of 8 on two;
    config.json says how it runs now."""
    common = ("--cache", fx.cache_path(), "--steps", 8, "--save-every", 4)
    for name in ("whole", "cut"):
        options = ("--batch-size", 8, "--out", tmp_path / name)
        processes.good(processes.train(2, *common, *options, recipe=recipe, sets=HALVES))
    (tmp_path / "cut/checkpoints/step-00000008.pt").unlink()
    more = ("--resume", "--out", tmp_path / "cut", *given, "--json")
    ran = processes.good(processes.train(1, *common, *more, recipe=recipe, sets=HALVES))
    assert '"first_step": 4' in ran.said[0]
    whole, cut = (np.array(fx.losses(tmp_path / name)) for name in ("whole", "cut"))
    assert len(cut) == 8
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    configs = [checkpoint.read_config(tmp_path / name) for name in ("whole", "cut")]
    found = [
        [each["running"][k] for k in ("processes", "batch_size", "accumulate")] for each in configs
    ]
    assert found == [[2, 8, 1], [1, 16, 1]]
    assert configs[0]["data"] == configs[1]["data"]


def test_another_global_batch_is_another_run(tmp_path: Path) -> None:
    """Both numbers are named, with the option that would make them equal; or that none does."""
    common = ("--cache", fx.cache_path(), "--steps", 2)
    fx.good(fx.train("mralign", tmp_path, *common, "--batch-size", 8))
    ran = fx.train("mralign", tmp_path, *common, "--resume", "--batch-size", 4, "--accumulate", 4)
    assert ran.status == 1
    assert "data.global_batch 8 before, 16 now" in ran.line
    assert ran.line.endswith(
        "--batch-size 2 on 1 process with --accumulate 4 makes its global batch of 8"
    )
    ran = fx.train("mralign", tmp_path, *common, "--resume", "--accumulate", 3)
    assert ran.status == 2
    assert "takes 8 pictures, which 1 process x --accumulate 3 cannot share evenly" in ran.line


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cached", "online"])
def test_statistics_of_the_batch_are_those_of_all_its_parts(way: str, tmp_path: Path) -> None:
    """target_norm=bn: one process with batch 16, two with 8, and from a cache one that adds up four
    times 4, give the same losses; statistics of each part alone would not (see below)."""
    cuts = {(1, 16, 1), (2, 8, 1)} | ({(1, 4, 4), (2, 4, 2)} if way == "cached" else set())
    sets, runs = (*OFF, "target_norm=bn"), {}
    for world, batch, parts in cuts:
        run = tmp_path / f"{world}-{batch}"
        options = (
            "--batch-size",
            batch,
            "--accumulate",
            parts,
            "--steps",
            6,
            "--teacher",
            way,
            "--out",
            run,
        )
        cache = ("--cache", fx.cache_path())
        processes.good(processes.train(world, *cache, *options, recipe="maskalign", sets=sets))
        runs[world, batch, parts] = np.array(fx.losses(run))
    for losses in runs.values():
        np.testing.assert_allclose(losses, runs[1, 16, 1], rtol=1e-5)


def test_statistics_of_a_part_would_give_other_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above has teeth: moments of a quarter of the batch in place of all of it are
    seen."""
    options = ("--cache", fx.cache_path(), "--batch-size", 16, "--steps", 1)
    sets = (*OFF, "target_norm=bn")
    fx.good(fx.train("maskalign", tmp_path / "whole", *options, sets=sets))
    plain = CachedTargets._moments
    monkeypatch.setattr(
        CachedTargets, "_moments", lambda targets, at, view: plain(targets, at[:4], view[:4])
    )
    fx.good(fx.train("maskalign", tmp_path / "part", *options, sets=sets))
    assert abs(fx.losses(tmp_path / "whole")[0] / fx.losses(tmp_path / "part")[0] - 1) > 1e-4


def test_statistics_of_the_batch_online_want_it_in_one_piece(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--teacher", "online", "--steps", 1, "--accumulate", 2)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=("target_norm=bn",))
    assert ran.status == 2
    assert (
        "--accumulate 2 with --teacher online: these targets are normalised over the whole batch"
        in ran.line
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "batch", "accumulate"),
    [
        (1, 5, 1),
        (2, 5, 1),
        (2, 2, 2),
        pytest.param(1, 3, 3, marks=SLOW),
        pytest.param(3, 2, 1, marks=SLOW),
    ],
)
def test_an_epoch_shows_each_picture_at_most_once(
    world: int, batch: int, accumulate: int, tmp_path: Path
) -> None:
    """Of 24 pictures all but less than one global batch, in three epochs of a real run, by their
    keys."""
    total = world * batch * accumulate
    per_epoch = 24 // total
    options = (
        "--cache",
        fx.cache_path(),
        "--batch-size",
        batch,
        "--accumulate",
        accumulate,
        "--epochs",
        3,
    )
    before = noting(tmp_path / "seen")
    run = ("--out", tmp_path / "run")
    processes.good(
        processes.train(world, *options, *run, recipe="maskalign", sets=OFF, before=before)
    )
    steps = seen(tmp_path / "seen", world)
    assert sorted(steps) == list(range(1, 3 * per_epoch + 1))
    for epoch in range(3):
        keys = [
            key
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
            for key in steps[step + 1]
        ]
        assert len(set(keys)) == len(keys) == per_epoch * total
        assert 24 - len(keys) < total
        assert set(keys) <= {f"p{i:02d}" for i in range(24)}
    assert len(metrics.read(tmp_path / "run")) == 3 * per_epoch


# --- interruptions --------------------------------------------------------------------------------

TWELVE = ("--steps", "12", "--batch-size", "8", "--save-every", "5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("exact") / "whole"
    fx.good(fx.train("mralign", run, "--cache", fx.cache_path(), *TWELVE, "--ema", "0.9"))
    assert checkpoint.read_config(run)["config"]["drop_path"] == 0.1
    return run


@pytest.mark.slow
@pytest.mark.parametrize("way", ["told", "died"])
@pytest.mark.parametrize("step", range(12))
def test_interrupted_at_every_step_and_resumed(
    step: int, way: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `step` whole steps: told to stop, which saves there, or dead between gradients and
    update, which goes back to the checkpoint of step 5 or 10 or to the start."""
    options = ("--cache", fx.cache_path(), *TWELVE, "--ema", "0.9")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if way == "told":
            stops_after(patch, step)
            status = fx.train("mralign", run, *options).status
            assert status == (75 if step > 0 else 0)
        else:
            dies_in(patch, step)
            with pytest.raises(RuntimeError, match="power cut"):
                fx.train("mralign", run, *options)
            assert [row["step"] for row in metrics.read(run)] == list(range(1, step + 1))
    ran = fx.good(fx.train("mralign", run, *options, "--resume", "--json"))
    assert ran.json["first_step"] == ((step or 12) if way == "told" else step // 5 * 5)
    assert_undisturbed(run, whole)
    assert same_averages(run, whole)


def stops_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """A scheduler's notice that is noticed after so many steps; 0: never."""
    calls: list[int] = []

    def due(self: Any) -> bool:
        calls.append(1)
        self.asked = "SIGTERM" if len(calls) == step else None
        return self.asked is not None

    patch.setattr("student.training.preemption.StopNotice.due", due)


def dies_in(patch: pytest.MonkeyPatch, step: int) -> None:
    plain = student.training.train._gradients

    def dies(*args: Any) -> Any:
        if args[-1] == step:
            plain(*args)
            raise RuntimeError("power cut")
        return plain(*args)

    patch.setattr(student.training.train, "_gradients", dies)


def same_averages(a: Path, b: Path) -> bool:
    one, two = (checkpoint.load_latest(run)["ema"] for run in (a, b))
    return one.keys() == two.keys() and all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_two_processes_with_accumulation_interrupted_and_resumed(step: int, tmp_path: Path) -> None:
    """Both die in a step; drop path on, two micro-batches each."""
    common = (
        "--cache",
        fx.cache_path(),
        "--batch-size",
        3,
        "--accumulate",
        2,
        "--steps",
        9,
        "--save-every",
        2,
    )
    dying = f"""
import student.training.train
plain = student.training.train._gradients
def dies(*args):
    if args[-1] == {step}:
        raise SystemExit(9)
    return plain(*args)
student.training.train._gradients = dies
"""
    processes.good(processes.train(2, *common, "--out", tmp_path / "whole", recipe="mralign"))
    ran = processes.train(2, *common, "--out", tmp_path / "cut", recipe="mralign", before=dying)
    assert ran.status == [9, 9], ran.said
    assert checkpoint.latest_step(tmp_path / "cut") == step // 2 * 2
    processes.good(
        processes.train(2, *common, "--out", tmp_path / "cut", "--resume", recipe="mralign")
    )
    assert_undisturbed(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_deterministic_kernels_are_asked_for_and_every_recipe_has_them(tmp_path: Path) -> None:
    """In a process of its own, since the switch is the process's while it trains. On a CPU nothing
    changes."""
    for name in sorted(fx.RECIPES):
        options = ("--cache", fx.cache_of(name), "--steps", 2, "--batch-size", 8)
        asked = """
import torch
from student.training import train
run = train.train
def told(*given):
    print("deterministic", torch.are_deterministic_algorithms_enabled(), flush=True)
    return run(*given)
train.train = told
"""
        on = processes.train(
            1,
            *options,
            "--out",
            tmp_path / name / "on",
            "--deterministic",
            recipe=name,
            before=asked,
        )
        assert "deterministic True" in processes.good(on).said[0]
        fx.good(fx.train(name, tmp_path / name / "off", *options))
        assert_undisturbed(tmp_path / name / "on", tmp_path / name / "off")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_interrupted_on_a_gpu_and_resumed(
    step: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    options = ("--recipe", "mralign", "--cache", fx.cache_path(), *TWELVE, *sets, "--deterministic")
    given = ("train", *options, "--precision", precision, "--device", "cuda")
    fx.good(fx.stud(*given, "--out", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        dies_in(patch, step)
        with pytest.raises(RuntimeError, match="power cut"):
            fx.stud(*given, "--out", tmp_path / "cut")
    fx.good(fx.stud(*given, "--out", tmp_path / "cut", "--resume"))
    assert_undisturbed(tmp_path / "cut", tmp_path / "whole")
