"""Train a linear probe of frozen features by MAE's protocol.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.1, as in the
released code: CLS after the encoder's final norm, BatchNorm without affine, one Linear layer, LARS
without weight decay at lr = blr * batch / 256, 10 warm-up epochs and a half cosine to 0 over 90,
batch 16384; training views are crops of (0.08, 1) by the released code's one-try sampler and flip,
test views the centre crop. MaskAlign takes blr 0.025, MILAN 0.05 over 100 epochs, MAE and CAE 0.1.

    student eval linear RUN --images LABELLED --blr 0.025

The backbone is frozen, so pictures are embedded first and the head is trained on the rows. Cost:
with fresh views (default) one forward of every training picture an epoch; `--train-views 4` pays
for 4 epochs and uses those views in turn; `--train-views 0` pays once and trains on the centre
crop.

The protocol is made for a million pictures. LARS moves the weight by 0.001 * lr of its own length a
step, so with few pictures the default base learning rate hardly leaves the start (1,437 digits:
42 % at --blr 0.1, 86 % at 1, 90 % at 3, whatever the batch size): the result then carries a `note`
that names a base learning rate to try.

What differs: every picture has its own counter, so a probe is repeatable; BatchNorm sees the whole
batch, the released code each process's share of it; the score is that of the last epoch, not the
best epoch on the test pictures; batches larger than the training set are cut to it.

n training pictures, V views, B batch, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.pictures.source import Source
from student.evals import hits, percent
from student.features.embed import CROP_PCT, EmbedProgress, embed_source
from student.features.frozen import FrozenEncoder
from student.features.labels import class_count, labels_as
from student.training.optim import warmup_cosine

OPTIONS: dict[str, tuple[Any, str]] = {
    "epochs": (90, "epochs of the head"),
    "blr": (0.1, "base learning rate: lr = blr * batch / 256"),
    "batch_size": (16384, "pictures a step, cut to the number of training pictures"),
    "warmup_epochs": (10, "epochs of linear warm-up from 0"),
    "train_views": (
        None,
        "augmented views embedded once, used in turn; 0: centre view; not given: fresh each epoch",
    ),
}

# lengths of the weight; below it the digits above lose points, ImageNet's protocol has 60 to 250
TRAVEL_LEAST = 3.0


# (source, numbers of views or None, stage=) -> features (V,n,D), labels (n,)
Embed = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProbeOptions:
    """Checks the options of a probe of `pictures` training pictures, before the first of them is
    read."""

    pictures: int
    epochs: int
    blr: float
    batch_size: int
    warmup_epochs: int
    train_views: int | None

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise UsageError(
                f"cannot train a linear probe with batches of {self.batch}: BatchNorm needs at "
                "least 2 pictures a step; give a larger --batch-size or more training pictures"
            )
        if self.epochs < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise UsageError(
                f"cannot train {self.epochs} epochs with {self.warmup_epochs} of warm-up: warm-up "
                "is 0 or more and below the epochs; give --warmup-epochs "
                f"{max(0, self.epochs // 9)} or more epochs"
            )
        if not (math.isfinite(self.blr) and self.blr > 0):
            raise UsageError(
                f"cannot train at a base learning rate of {self.blr:g}: --blr is above 0; give 0.1"
            )
        if self.train_views is not None and self.train_views < 0:
            raise UsageError(
                f"cannot train on {self.train_views} views: --train-views is 0 (centre view), 1 or "
                "more (augmented views, embedded once) or not given (a fresh view each epoch)"
            )

    @property
    def batch(self) -> int:
        return min(self.batch_size, self.pictures)

    @property
    def steps_per_epoch(self) -> int:
        return self.pictures // self.batch

    @property
    def peak_lr(self) -> float:
        return self.blr * self.batch / 256

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every step of the probe."""
        steps = self.steps_per_epoch
        return [
            warmup_cosine(
                step / steps, total=self.epochs, warmup=self.warmup_epochs, peak=self.peak_lr
            )
            for step in range(self.epochs * steps)
        ]


class Head(nn.Module):
    """Scores features by BatchNorm without affine, then a Linear layer that starts from `seed`."""

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        # skip_init: the layer's usual start would draw from (and move) torch's global generator.
        self.linear = nn.utils.skip_init(nn.Linear, width, classes)
        generator = torch.Generator().manual_seed(int(rng.stream("linear-head", seed) >> 1))
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B,D) to logits (B,C)."""
        return self.linear(self.norm(features))


def lars(head: Head) -> Lars:
    """Build LARS as MAE has it: m <- 0.9 m + q g, w <- w - lr m, q = 0.001 |w| / |g| for the weight
    and 1 for the bias.

    timm scales a group only if it has weight decay or `always_adapt`; eps 0 because MAE's ratio has
    none (a zero norm gives q = 1 in both).
    """
    groups = [
        {"params": [head.linear.weight], "always_adapt": True},
        {"params": [head.linear.bias], "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def travel(learning_rates: list[float]) -> float:
    """Return the most the weight can move, in its own lengths: 0.001 lr a step, ten times over by
    the momentum of 0.9."""
    return 0.01 * sum(learning_rates)


def train_epoch(
    head: Head,
    optimizer: Lars,
    features: Tensor,
    labels: Tensor,
    batches: list[Tensor],
    learning_rates: list[float],
) -> float:
    """Train one pass over `features` (n,D) in the given batches of rows; return the mean loss."""
    head.train()
    device = head.linear.weight.device
    total = 0.0
    for rows, lr in zip(batches, learning_rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(head(features[rows].to(device)), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(batches)


@torch.no_grad()
def predict(head: Head, features: Tensor, rows: int = 16384) -> Tensor:
    """Return logits (n,C) on the CPU, with the running statistics of the norm."""
    head.eval()
    return torch.cat(
        [head(chunk.to(head.linear.weight.device)).cpu() for chunk in features.split(rows)]
    )


def evaluate(
    frozen: FrozenEncoder,
    train: Source,
    test: Source,
    *,
    seed: int,
    device: str = "cpu",
    batch_size_embed: int = 256,
    crop_pct: float = CROP_PCT,
    progress: EmbedProgress | None = None,
    epochs: int = 90,
    blr: float = 0.1,
    batch_size: int = 16384,
    warmup_epochs: int = 10,
    train_views: int | None = None,
) -> dict[str, Any]:
    """Return top-1 (and top-5 from five classes on) of the test pictures after the last epoch."""
    options = ProbeOptions(len(train), epochs, blr, batch_size, warmup_epochs, train_views)
    classes, test_labels = class_count(train), torch.from_numpy(labels_as(test, train))
    embed = partial(
        embed_source, frozen, batch_size=batch_size_embed, device=device, progress=progress,
        crop_pct=crop_pct, seed=seed,
    )  # fmt: skip

    # the test pictures first, so that a broken one stops the probe at its start
    (test_rows,), _ = embed(test, None, stage="test")
    head = Head(test_rows.shape[1], classes, seed).to(device)
    loss = _train_head(head, _epoch_features(embed, train, options), options, seed, progress)
    scores = predict(head, test_rows)

    result: dict[str, Any] = {"top1": percent(hits(scores, test_labels, 1))}
    if classes >= 5:
        result["top5"] = percent(hits(scores, test_labels, 5))
    if note := _note(options):
        result["note"] = note
    return result | {
        "epochs": epochs,
        "lr": options.peak_lr,
        "blr": blr,
        "batch_size": options.batch,
        "warmup_epochs": warmup_epochs,
        "train_views": train_views,
        "train_loss": loss,
        "n_train": len(train),
        "n_test": len(test),
        "classes": classes,
        "seed": seed,
        "features": frozen.name,
        "pool": frozen.pool,
    }


def _epoch_features(
    embed: Embed, train: Source, options: ProbeOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (n,D) and labels (n,) for each epoch: stored views in turn, or fresh ones."""
    if options.train_views is not None:
        stored, labels = embed(train, list(range(options.train_views)) or None, stage="train")
    for epoch in range(options.epochs):
        if options.train_views is None:
            stage = f"train, epoch {epoch + 1} of {options.epochs}"
            stored, labels = embed(train, [epoch], stage=stage)  # (1,n,D)
        yield stored[epoch % len(stored)], labels


def _train_head(
    head: Head,
    features: Iterator[tuple[Tensor, Tensor]],
    options: ProbeOptions,
    seed: int,
    progress: EmbedProgress | None,
) -> float:
    """Train the head epoch by epoch; return the last epoch's mean loss."""
    optimizer, lrs, steps = lars(head), options.learning_rates(), options.steps_per_epoch
    loss = math.nan
    for epoch, (rows, labels) in enumerate(features):
        order = torch.from_numpy(rng.permutation(options.pictures, seed, epoch))
        batches = list(order[: steps * options.batch].split(options.batch))
        first = epoch * steps
        loss = train_epoch(head, optimizer, rows, labels, batches, lrs[first : first + steps])
        if not math.isfinite(loss):
            raise UserError(
                f"the linear probe diverged: loss in epoch {epoch} is {loss} at lr "
                f"{options.peak_lr:g}; lower --blr"
            )
        if progress is not None:
            progress("epochs", epoch + 1, options.epochs)
    return loss


def _note(options: ProbeOptions) -> str:
    """Return advice where the head cannot move far enough, else nothing."""
    moved = travel(options.learning_rates())
    if moved >= TRAVEL_LEAST:
        return ""
    return (
        f"the head could move only {moved:.2g} of its own length: --blr {options.blr:g} over "
        f"{options.epochs} epochs is too small for {options.pictures} pictures; try --blr "
        f"{2 * TRAVEL_LEAST * options.blr / moved:.2g} with --batch-size 256 or less, or more "
        "--epochs"
    )
