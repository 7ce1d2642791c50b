"""The linear probe is tested: LARS against its formula, the head's start, and whole probes on
toys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from student.evals import linear
from student.features import scores
from student.features.labels import split_holdout
from student.training import probe
from student.training.probe import Head
from tests.student import toy_task as toys


def evaluated(task: toys.ToyTask | None = None, **options: Any) -> dict[str, Any]:
    """What a probe of toys says: settings, and the test pictures' scores."""
    settings = {"epochs": 60, "warmup_epochs": 5, "batch_size": 10, "blr": "25.6", "train_views": 0}
    outcome = linear.evaluate(task or toys.toy_task(), **{**settings, **options})
    assert outcome.head is not None
    return {**scores.of_test(outcome.scored[0]), **outcome.facts}


# --- the parts ------------------------------------------------------------------------------------


def test_lars_is_maes_formula() -> None:
    """m <- 0.9 m + q g; w <- w - lr m; q = 0.001 |w| / |g| for the weight, 1 for the bias, no
    decay."""
    draw = np.random.default_rng(0)
    head = Head(5, 3, seed=0)
    optimizer = linear.lars(head)
    weight = head.linear.weight.detach().numpy().astype(np.float64)
    bias = np.zeros(3)
    momentum_w, momentum_b = np.zeros_like(weight), np.zeros_like(bias)
    for lr in (0.0, 0.5, 6.4, 3.2, 0.1):
        grad_w, grad_b = draw.normal(size=(3, 5)), draw.normal(size=3)
        q = 0.001 * np.linalg.norm(weight) / np.linalg.norm(grad_w)
        momentum_w, momentum_b = 0.9 * momentum_w + q * grad_w, 0.9 * momentum_b + grad_b
        weight, bias = weight - lr * momentum_w, bias - lr * momentum_b
        for group in optimizer.param_groups:
            group["lr"] = lr
        head.linear.weight.grad = torch.from_numpy(grad_w).float()
        head.linear.bias.grad = torch.from_numpy(grad_b).float()
        optimizer.step()
        np.testing.assert_allclose(head.linear.weight.detach(), weight, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(head.linear.bias.detach(), bias, rtol=1e-5, atol=1e-7)


def test_lars_takes_no_ratio_where_a_norm_is_zero() -> None:
    """A zero gradient gives a zero step, a zero weight a plain one; neither divides by zero."""
    head = Head(2, 2, seed=0)
    optimizer = linear.lars(head)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = head.linear.weight.detach().clone()
    head.linear.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(head.linear.weight, before)
    with torch.no_grad():
        head.linear.weight.zero_()
    head.linear.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(head.linear.weight, torch.full((2, 2), -0.5))


def test_head_starts_from_its_seed_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, same, other = Head(64, 500, 3), Head(64, 500, 3), Head(64, 500, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.linear.weight, same.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
    assert one.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not one.linear.bias.any()
    assert (one.norm.affine, one.norm.eps, one.norm.momentum) == (False, 1e-6, 0.1)
    assert {name for name, _ in one.named_parameters()} == {"linear.weight", "linear.bias"}


def test_testing_normalises_by_running_statistics() -> None:
    head = Head(3, 2, 0)
    features = 5 + 2 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weight = head.linear.weight.detach().clone()
    head.train()(features)
    running_mean, running_var = 0.1 * features.mean(0), 0.9 + 0.1 * features.var(0)
    want = (features - running_mean) / (running_var + 1e-6).sqrt() @ weight.T
    got = probe.predict(head, lambda rows: features[rows], np.arange(64))
    torch.testing.assert_close(got, want)
    assert not head.training


# --- whole probes ---------------------------------------------------------------------------------


def test_separable_classes_are_separated() -> None:
    got = evaluated()
    assert got.pop("train_loss") < 1.2  # ln 5 = 1.61 at the start
    got.pop("per_class")
    assert json.loads(json.dumps(got)) == {
        "top1": 100.0, "interval": [100.0, 100.0], "top5": 100.0, "n_test": 40, "epochs": 60,
        "lr": 1.0, "blr": 25.6, "batch_size": 10, "warmup_epochs": 5, "train_views": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_features_without_classes_stay_at_chance() -> None:
    assert evaluated(toys.toy_task(gap=0.0))["top1"] < 45


def test_few_classes_have_no_top5() -> None:
    assert "top5" not in evaluated(toys.toy_task(classes=4))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_probe() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # the global generator has no say
        runs.append(evaluated(toys.toy_task(gap=0.4, seed=seed)))
    assert runs[0] == runs[1]
    assert runs[0]["train_loss"] != runs[2]["train_loss"]


def test_batches_follow_the_epochs_order_and_the_rate_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100 pictures in batches of 32: three whole batches, the last 4 rows of the order are left
    out."""
    task, rates, batches = toys.toy_task(seed=6), list[float](), list[Tensor]()
    (rows,), _ = task.pooled(task.train, stage="")
    made = linear.lars

    def recorded(head: Head) -> Any:
        optimizer = made(head)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        head.register_forward_pre_hook(
            lambda module, given: batches.append(given[0]) if module.training else None
        )
        return optimizer

    monkeypatch.setattr(linear, "lars", recorded)
    # peak 8 * 32 / 256 = 1
    evaluated(task, epochs=5, warmup_epochs=1, batch_size=32, blr="8")
    assert rates[:3] == pytest.approx([0, 1 / 3, 2 / 3])
    # half a cosine over the four epochs after the warm-up
    assert rates[3:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 12)) for i in range(12)])
    for epoch in range(5):
        order = rng.permutation(100, 6, epoch)[:96]
        for i, batch in enumerate(batches[3 * epoch : 3 * epoch + 3]):
            assert torch.equal(batch, rows[order[32 * i : 32 * i + 32]])
    assert len(batches) == 15


def test_the_batch_is_cut_to_the_training_set() -> None:
    got = evaluated(batch_size=16384, blr="0.1")
    assert (got["batch_size"], got["lr"]) == (100, 0.1 * 100 / 256)


def test_the_batch_that_is_told_is_without_the_pictures_held_back() -> None:
    """A tenth of 100 chooses, so that a step takes 90."""
    got = evaluated(batch_size=16384, blr="25.6,51.2")
    assert (got["batch_size"], got["lr"]) == (90, got["blr"] * 90 / 256)


def test_several_rates_are_trained_beside_each_other() -> None:
    """Each head is what it would be alone on nine tenths of the pictures, and the tenth that is
    held back chooses."""
    task = toys.toy_task(gap=0.7)
    many = linear.evaluate(
        task, epochs=9, warmup_epochs=1, batch_size=10, blr="0.001,2000,20", train_views=0
    )
    grid = many.facts["grid"]
    assert list(grid) == ["0.001", "2000", "20"]
    assert many.facts["blr"] == float(max(grid, key=lambda rate: grid[rate])) != 0.001
    assert all(score * 10 % 100 == 0 for score in grid.values())  # of ten pictures
    again = linear.evaluate(
        task, epochs=9, warmup_epochs=1, batch_size=10, blr="20,0.001,2000", train_views=0
    )
    assert again.facts["grid"] == {rate: grid[rate] for rate in ("20", "0.001", "2000")}
    assert many.head is not None
    assert again.head is not None
    assert sorted(grid.values())[-2] < max(grid.values())  # so that one is the best in any order
    assert many.facts["blr"] == again.facts["blr"]
    assert torch.equal(many.head["linear.weight"], again.head["linear.weight"])


def test_a_rate_too_small_for_few_pictures_is_told() -> None:
    """Two epochs of one step, no warm-up: learning rates 1 and 0.5 of the peak 100 / 256 * blr,
    travel 0.01 * their sum."""
    few = {"epochs": 2, "warmup_epochs": 0, "batch_size": 100}
    assert evaluated(**few, blr="0.256")["note"] == (
        "the head could move only 0.0015 of its own length: --blr 0.256 over 2 epochs is too small "
        "for 100 pictures; try --blr 1000 with --batch-size 256 or less, or more --epochs"
    )
    assert "note" not in evaluated(**few, blr="512")


@pytest.mark.parametrize(
    ("train_views", "calls"),
    [
        (0, [("test", None, True), ("train", None, True)]),
        (2, [("test", None, True), ("train", [0, 1], True)]),
        (
            None,
            [
                ("test", None, True),
                *((f"train, epoch {e + 1} of 3", [e], False) for e in range(3)),
            ],
        ),
    ],
)
def test_views_of_the_training_pictures(
    train_views: int | None, calls: list[tuple[str, list[int] | None, bool]]
) -> None:
    """A fresh view of each epoch is not kept."""
    task = toys.toy_task()
    evaluated(task, epochs=3, warmup_epochs=1, train_views=train_views)
    assert task.calls == calls


def test_stored_views_take_turns() -> None:
    """Three stored views over three epochs are the same rows as a fresh view each epoch, so the
    probes are equal."""
    stored = evaluated(epochs=3, warmup_epochs=1, train_views=3)
    fresh = evaluated(epochs=3, warmup_epochs=1, train_views=None)
    assert (stored.pop("train_views"), fresh.pop("train_views")) == (3, None)
    assert stored == fresh


@pytest.mark.slow
def test_real_pictures_from_a_folder_for_any_embedding_batch(tmp_path: Path) -> None:
    """Red against blue, two views in turn: all are told apart, and the batch of the backbone
    changes nothing."""
    draw = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = draw.integers(0, 120, (14, 12, 3), np.uint8)
            pixels[..., channel] += 80
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    train, test = split_holdout(open_source(tmp_path), 0.3, seed=0)
    options = {"epochs": 100, "warmup_epochs": 2, "blr": "300", "batch_size": 4, "train_views": 2}
    got = []
    for batch in (2, 64):
        task = toys.task_of(toys.encoder(toys.colour), train, test, batch_size=batch)
        outcome = linear.evaluate(task, **options)
        got.append({**scores.of_test(outcome.scored[0]), **outcome.facts})
    assert got[0]["top1"] == 100.0
    assert got[0] == got[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batches of 1: BatchNorm needs at least 2"),
        ({"epochs": 0}, "0 epochs with 5 of warm-up"),
        (
            {"epochs": 9, "warmup_epochs": 10},
            "warm-up is 0 or more and below the epochs; give --warmup-epochs 1",
        ),
        ({"warmup_epochs": -1}, "with -1 of warm-up"),
        ({"blr": "0"}, "base learning rate of 0: --blr is a number above 0"),
        ({"blr": "nan"}, "base learning rate of nan"),
        ({"blr": "1,x"}, "base learning rate of 1,x"),
        ({"blr": "1,1"}, "a base learning rate is given twice"),
        ({"train_views": -1}, "on -1 views: --train-views is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, object], message: str) -> None:
    task = toys.toy_task()
    with pytest.raises(UsageError, match=message):
        evaluated(task, **options)
    assert task.calls == []


def test_a_loss_that_is_not_finite_stops_the_probe() -> None:
    task = toys.toy_task()
    task.centres[0] = math.nan
    with pytest.raises(UserError, match="diverged: loss in epoch 0 is nan"):
        evaluated(task)
