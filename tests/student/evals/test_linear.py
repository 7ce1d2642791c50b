"""The linear probe is tested: LARS against its formula, the head's start, and whole probes on
toys."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from student.evals import linear
from student.features.frozen import FrozenEncoder
from student.features.labels import split_holdout

FROZEN = FrozenEncoder("toy", 8, "cls", lambda pixels: pixels, lambda device: None)


class Labelled:
    """A source of which only the labels are looked at."""

    spec = "toy"
    classes: list[str] | None = None

    def __init__(self, labels: Tensor) -> None:
        self.labels, self.keys = labels.numpy(), [str(i) for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> bytes:
        raise AssertionError("features come from the test")


class Toy:
    """Stands in for embed_source: Gaussian classes, with a little noise that differs from view to
    view."""

    def __init__(self, gap: float = 3.0, classes: int = 5, width: int = 12) -> None:
        draw = torch.Generator().manual_seed(0)
        self.centres = gap * torch.randn(classes, width, generator=draw)
        self.train = Labelled(torch.arange(100) % classes)
        self.test = Labelled(torch.arange(40) % classes)
        self.calls: list[tuple[str, list[int] | None]] = []

    def embed(
        self,
        frozen: FrozenEncoder,
        source: Labelled,
        numbers: list[int] | None,
        *,
        stage: str,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((stage, numbers))
        labels = torch.from_numpy(source.labels)
        rows = []
        for number in [-1] if numbers is None else numbers:
            draw = torch.Generator().manual_seed(1000 + number + len(source))
            rows.append(
                self.centres[labels]
                + torch.randn(len(source), self.centres.shape[1], generator=draw)
            )
        return torch.stack(rows), labels

    def probe(
        self, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **options: object
    ) -> dict[str, object]:
        monkeypatch.setattr(linear, "embed_source", self.embed)
        settings = {
            "epochs": 60,
            "warmup_epochs": 5,
            "batch_size": 10,
            "blr": 25.6,
            "train_views": 0,
            **options,
        }
        return linear.evaluate(FROZEN, self.train, self.test, seed=seed, **settings)  # type: ignore[arg-type]


# --- the parts ------------------------------------------------------------------------------------


def test_lars_is_maes_formula() -> None:
    """m <- 0.9 m + q g; w <- w - lr m; q = 0.001 |w| / |g| for the weight, 1 for the bias, no
    decay."""
    draw = np.random.default_rng(0)
    head = linear.Head(5, 3, seed=0)
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
    head = linear.Head(2, 2, seed=0)
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
    one, same, other = linear.Head(64, 500, 3), linear.Head(64, 500, 3), linear.Head(64, 500, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.linear.weight, same.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
    assert one.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not one.linear.bias.any()
    assert (one.norm.affine, one.norm.eps, one.norm.momentum) == (False, 1e-6, 0.1)
    assert {name for name, _ in one.named_parameters()} == {"linear.weight", "linear.bias"}


def test_training_normalises_by_the_batch_and_testing_by_running_statistics() -> None:
    head = linear.Head(3, 2, 0)
    features = 5 + 2 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weight = head.linear.weight.detach().clone()
    linear.train_epoch(
        head,
        linear.lars(head),
        features,
        torch.zeros(64, dtype=torch.int64),
        [torch.arange(64)],
        [0.0],
    )
    running_mean, running_var = 0.1 * features.mean(0), 0.9 + 0.1 * features.var(0)
    want = (features - running_mean) / (running_var + 1e-6).sqrt() @ weight.T
    torch.testing.assert_close(linear.predict(head, features, rows=10), want)
    torch.testing.assert_close(linear.predict(head, features), want)


# --- whole probes ---------------------------------------------------------------------------------


def test_separable_classes_are_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    got = Toy().probe(monkeypatch)
    assert got["top1"] == 100.0
    assert got["top5"] == 100.0
    assert got["train_loss"] < 1.2  # type: ignore[operator]  # ln 5 = 1.61 at the start
    fixed = {
        key: value for key, value in json.loads(json.dumps(got)).items() if key != "train_loss"
    }
    assert fixed == {
        "top1": 100.0, "top5": 100.0, "epochs": 60, "lr": 1.0, "blr": 25.6, "batch_size": 10,
        "warmup_epochs": 5, "train_views": 0, "n_train": 100, "n_test": 40, "classes": 5, "seed": 0,
        "features": "toy", "pool": "cls",
    }  # fmt: skip


def test_features_without_classes_stay_at_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Toy(gap=0.0).probe(monkeypatch)["top1"] < 45  # type: ignore[operator]


def test_few_classes_have_no_top5(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "top5" not in Toy(classes=4).probe(monkeypatch)


def test_the_same_seed_gives_the_same_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, object]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # the global generator has no say
        runs.append(Toy(gap=0.4).probe(monkeypatch, seed))
    assert runs[0] == runs[1]
    assert runs[0]["train_loss"] != runs[2]["train_loss"]


def test_batches_follow_the_epochs_order_and_the_rate_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100 pictures in batches of 32: three whole batches, the last 4 rows of the order are left
    out."""
    seen: list[tuple[list[Tensor], list[float]]] = []

    def record(
        head: linear.Head,
        optimizer: object,
        features: Tensor,
        labels: Tensor,
        batches: list[Tensor],
        learning_rates: list[float],
    ) -> float:
        seen.append((batches, learning_rates))
        return 1.0

    monkeypatch.setattr(linear, "train_epoch", record)
    # peak 8 * 32 / 256 = 1
    Toy().probe(monkeypatch, seed=6, epochs=5, warmup_epochs=1, batch_size=32, blr=8.0)
    for epoch, (batches, learning_rates) in enumerate(seen):
        assert [len(batch) for batch in batches] == [32, 32, 32]
        assert torch.cat(batches).tolist() == rng.permutation(100, 6, epoch)[:96].tolist()
        if epoch:  # half a cosine over the four epochs after the warm-up
            assert learning_rates == pytest.approx(
                [0.5 * (1 + math.cos(math.pi * (epoch - 1 + i / 3) / 4)) for i in range(3)]
            )
    assert seen[0][1] == pytest.approx([0, 1 / 3, 2 / 3])
    assert len(seen) == 5


def test_the_batch_is_cut_to_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    got = Toy().probe(monkeypatch, batch_size=16384, blr=0.1)
    assert (got["batch_size"], got["lr"]) == (100, 0.1 * 100 / 256)


def test_a_rate_too_small_for_few_pictures_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of one step, no warm-up: learning rates 1 and 0.5 of the peak 100 / 256 * blr,
    travel 0.01 * their sum."""
    few = {"epochs": 2, "warmup_epochs": 0, "batch_size": 100}
    got = Toy().probe(monkeypatch, **few, blr=0.256)
    assert got["note"] == (
        "the head could move only 0.0015 of its own length: --blr 0.256 over 2 epochs is too small "
        "for 100 pictures; try --blr 1e+03 with --batch-size 256 or less, or more --epochs"
    )
    assert "note" not in Toy().probe(monkeypatch, **few, blr=0.256 * 2000)


@pytest.mark.parametrize(
    ("train_views", "calls"),
    [
        (0, [("test", None), ("train", None)]),
        (2, [("test", None), ("train", [0, 1])]),
        (None, [("test", None), *((f"train, epoch {e + 1} of 3", [e]) for e in range(3))]),
    ],
)
def test_views_of_the_training_pictures(
    monkeypatch: pytest.MonkeyPatch,
    train_views: int | None,
    calls: list[tuple[str, list[int] | None]],
) -> None:
    toy = Toy()
    toy.probe(monkeypatch, epochs=3, warmup_epochs=1, train_views=train_views)
    assert toy.calls == calls


def test_stored_views_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stored views over three epochs are the same rows as a fresh view each epoch, so the
    probes are equal."""
    stored = Toy().probe(monkeypatch, epochs=3, warmup_epochs=1, train_views=3)
    fresh = Toy().probe(monkeypatch, epochs=3, warmup_epochs=1, train_views=None)
    assert (stored.pop("train_views"), fresh.pop("train_views")) == (3, None)
    assert stored == fresh


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
    frozen = FrozenEncoder(
        "colour", 8, "cls", lambda pixels: pixels.float().mean((2, 3)), lambda device: None
    )
    options = {"epochs": 100, "warmup_epochs": 2, "blr": 300.0, "batch_size": 4, "train_views": 2}
    got = [
        linear.evaluate(frozen, train, test, seed=0, batch_size_embed=b, **options) for b in (2, 64)
    ]  # type: ignore[arg-type]
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
        ({"blr": 0.0}, "base learning rate of 0: --blr is above 0"),
        ({"blr": math.nan}, "base learning rate of nan"),
        ({"train_views": -1}, "on -1 views: --train-views is 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    toy = Toy()
    with pytest.raises(UsageError, match=message):
        toy.probe(monkeypatch, **options)
    assert toy.calls == []


def test_a_loss_that_is_not_finite_stops_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    toy.centres[0] = math.nan
    with pytest.raises(UserError, match="diverged: loss in epoch 0 is nan"):
        toy.probe(monkeypatch)
