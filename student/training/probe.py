"""Probes train a head on features of a frozen encoder: BatchNorm without affine, then one Linear
layer, behind a pool of tokens where a protocol has one.

The protocol of MAE's linear probe (facebookresearch/mae main_linprobe.py) is that of all: a base
learning rate for a batch of 256, some epochs of linear warm-up, a half cosine. Several base
learning rates are trained in one pass over the features, each its own head; a tenth of the training
pictures, which no head learns from, then chooses among them.

n training pictures, V views, B batch, T tokens, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache import rng
from featcache.errors import UsageError, UserError, counted, near
from student.features.scores import hits, percent
from student.features.task import LabelledSet, Scored, Task, Visible
from student.training.optim import lars, warmup_cosine

MOST_EPOCHS, MOST_VIEWS, MOST_STEPS = 10_000, 1000, 10**7  # more is a mistake
HELD_BACK = 0.1  # of the training pictures, to choose a learning rate by
ROWS = 4096  # scored at once
# lengths of the weight; below it 1,437 digits lose points, ImageNet's protocol has 60 to 250
TRAVEL_LEAST = 3.0

OPTIONS: dict[str, tuple[Any, str]] = {
    "epochs": (90, "epochs of the head"),
    "blr": (
        "0.1",
        "base learning rate, lr = blr * batch / 256; several (0.03,0.1,0.3) are trained in one "
        "pass, and a held-out tenth of the training pictures chooses",
    ),
    "batch_size": (16384, "pictures a step, cut to the number of training pictures"),
    "warmup_epochs": (10, "epochs of linear warm-up from 0"),
    "train_views": (
        None,
        "augmented views embedded once, used in turn; 0: centre view; not given: fresh each epoch",
    ),
}


@dataclass(frozen=True)
class ProbeOptions:
    """Checks the options of a probe of `pictures` training pictures, before the first of them is
    read."""

    what: str
    pictures: int
    epochs: int
    blr: str
    batch_size: int
    warmup_epochs: int
    train_views: int | None
    min_lr: float = 0.0
    rates: tuple[float, ...] = field(init=False)  # the base learning rates of `blr`

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", parse_rates(self.blr))
        if self.epochs < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise UsageError(
                f"cannot train {counted(self.epochs, 'epoch')} with {self.warmup_epochs} of "
                "warm-up: warm-up is 0 or more and below the epochs; give --warmup-epochs "
                f"{max(0, self.epochs // 9)} or more epochs"
            )
        if self.epochs > MOST_EPOCHS or (self.train_views or 0) > MOST_VIEWS:
            raise UsageError(
                f"cannot train {counted(self.epochs, 'epoch')} on {self.train_views or 'fresh'} "
                f"views: {MOST_EPOCHS} epochs and {MOST_VIEWS} views at most are allowed"
            )
        if self.train_views is not None and self.train_views < 0:
            raise UsageError(
                f"cannot train on {counted(self.train_views, 'view')}: --train-views is 0 (centre "
                "view), 1 or more (augmented views, embedded once) or not given (a fresh view each "
                "epoch)"
            )
        self.check_batch(self.pictures)
        steps = self.epochs * (self.pictures // min(self.batch_size, self.pictures))
        if steps > MOST_STEPS:
            raise UsageError(
                f"cannot train {counted(steps, 'step')}: {MOST_STEPS} at most are allowed; give "
                "fewer --epochs or a larger --batch-size"
            )

    def check_batch(self, pictures: int) -> None:
        """Raise UsageError where BatchNorm would see one picture."""
        if min(self.batch_size, pictures) < 2:
            raise UsageError(
                f"cannot train the {self.what} probe with batches of "
                f"{min(self.batch_size, pictures)}: BatchNorm needs at least 2 pictures a step; "
                "give a larger --batch-size or more training pictures"
            )

    def learning_rates(self, blr: float, pictures: int) -> list[float]:
        """Return the learning rate of every step of a head that learns from so many pictures."""
        batch = min(self.batch_size, pictures)
        steps = pictures // batch
        return [
            warmup_cosine(
                step / steps,
                total=self.epochs,
                warmup=self.warmup_epochs,
                peak=blr * batch / 256,
                minimum=self.min_lr,
            )
            for step in range(self.epochs * steps)
        ]


def parse_rates(text: str) -> tuple[float, ...]:
    """Parse base learning rates parted by commas.

    >>> parse_rates("0.1,0.3")
    (0.1, 0.3)
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(
            f"cannot train at a base learning rate of {text}: --blr is a number above 0, or "
            "several parted by commas; give 0.1"
        )
    if len(set(rates)) < len(rates):
        raise UsageError(f"--blr {text}: a base learning rate is given twice; give each once")
    return rates


def parse_tokens(text: str) -> bool:
    """Tell whether a probe takes patches alone. Raises UsageError for neither `all` nor
    `patches`."""
    if text not in ("all", "patches"):
        raise UsageError(f"unknown tokens {text!r}: {near(text, ('all', 'patches'))}")
    return text == "patches"


def check_parts(what: str, parts: int, width: int) -> None:
    """Raise UsageError unless a width can be cut into so many parts, which `--what` gives.

    >>> check_parts("heads", 12, 768)
    """
    if 1 <= parts <= width and width % parts == 0:
        return
    possible = ", ".join(str(each) for each in range(1, width + 1) if width % each == 0)
    raise UsageError(
        f"cannot cut tokens of width {width} into {parts} equal parts, one for each of --{what}; "
        f"give one of {possible}"
    )


# ------------------------------------------------------------ the head


class Head(nn.Module):
    """Scores features (B,D), or what `pool` makes of tokens (B,T,D), by BatchNorm without affine,
    then a Linear layer whose weight starts from `seed`."""

    def __init__(
        self,
        width: int,
        classes: int,
        seed: int,
        *,
        name: str = "linear",
        eps: float = 1e-6,
        truncated: bool = True,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm1d(width, affine=False, eps=eps)
        # skip_init: the layer's usual start would draw from (and move) torch's global generator.
        self.linear = nn.utils.skip_init(nn.Linear, width, classes)
        generator = torch.Generator().manual_seed(int(rng.stream(f"{name}-head", seed) >> 1))
        start = nn.init.trunc_normal_ if truncated else nn.init.normal_
        start(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B,D) or tokens (B,T,D) to logits (B,C)."""
        return self.linear(self.norm(features if self.pool is None else self.pool(features)))


# ------------------------------------------------------------ its training


class Take(Protocol):
    """Gives rows (B,) of the features of an epoch, as a tensor in host memory."""

    def __call__(self, rows: npt.NDArray[np.int64]) -> Tensor: ...


@dataclass(frozen=True)
class Probe:
    """Says how a protocol's heads are made and stepped."""

    options: ProbeOptions
    make: Callable[[int, int], Head]  # width, classes
    optimizer: Callable[[Head], torch.optim.Optimizer]
    tokens: bool  # heads take all tokens, not pooled features
    patches_only: bool = False  # of the tokens
    visible: Visible | None = None  # the patches that the encoder sees, of pooled features


@dataclass(frozen=True)
class Trained:
    """Holds the head that was chosen, and what is told of its training."""

    head: Head
    blr: float
    loss: float
    learning_rates: list[float]
    grid: dict[str, float]  # top-1 of each base learning rate on the pictures held back
    pictures: int  # that a head learned from


def run_probe(task: Task, probe: Probe) -> tuple[Trained, list[Scored]]:
    """Train the head of a protocol, and score every test set's centre crops with it."""
    # the test pictures first, so that a broken one stops the probe at its start
    tests = [(test, *_features(task, probe, test, None, test.name)) for test in task.tests]
    trained = _train(task, probe)
    scored = []
    for test, (rows,), labels in tests:
        logits = predict(trained.head, _taker(rows, task, probe), np.arange(len(labels)))
        scored.append(Scored(test, logits, labels))
    return trained, scored


def facts(probe: Probe, trained: Trained) -> dict[str, Any]:
    """Return what a result says of a probe's settings, and a note where its head could not move."""
    options = probe.options
    batch = min(options.batch_size, trained.pictures)
    note = _travel_note(options, trained) if probe.optimizer is lars else ""
    return {
        "epochs": options.epochs,
        "blr": trained.blr,
        "lr": trained.blr * batch / 256,
        "batch_size": batch,
        "warmup_epochs": options.warmup_epochs,
        "train_views": options.train_views,
        "train_loss": trained.loss,
        **({"grid": trained.grid} if trained.grid else {}),
        **({"note": note} if note else {}),
    }


def _travel_note(options: ProbeOptions, trained: Trained) -> str:
    """Return advice where LARS cannot move a head far enough, else nothing. A step moves a matrix
    by 0.001 lr of its own length, whatever the loss, ten times over by the momentum of 0.9."""
    moved = 0.01 * sum(trained.learning_rates)
    if moved >= TRAVEL_LEAST:
        return ""
    wanted = float(f"{2 * TRAVEL_LEAST * trained.blr / moved:.2g}")
    return (
        f"the head could move only {moved:.2g} of its own length: --blr {trained.blr:g} over "
        f"{counted(options.epochs, 'epoch')} is too small for "
        f"{counted(options.pictures, 'picture')}; try --blr "
        f"{wanted:g} with --batch-size 256 or less, or more --epochs"
    )


def _train(task: Task, probe: Probe) -> Trained:
    """Train a head for each base learning rate, and choose one."""
    options = probe.options
    epochs = _epochs(task, probe)
    take, labels = next(epochs)
    fit, held = _split(task, len(labels), len(options.rates) > 1)
    options.check_batch(len(fit))
    width = take(fit[:1]).shape[-1]
    heads = [probe.make(width, task.classes).to(task.device) for _ in options.rates]
    steppers = [probe.optimizer(head) for head in heads]
    plans = [options.learning_rates(blr, len(fit)) for blr in options.rates]
    losses = [math.nan] * len(heads)
    for epoch in range(options.epochs):
        if epoch:
            take, labels = next(epochs)
        losses = _train_epoch(task, take, labels, fit, heads, steppers, plans, options, epoch)
        if not any(map(math.isfinite, losses)):
            raise UserError(
                f"the {options.what} probe diverged: loss in epoch {epoch} is {losses[0]} at base "
                f"learning rate {options.blr}; lower --blr"
            )
    best, grid = 0, dict[str, float]()
    if len(heads) > 1:
        scored = [percent(hits(predict(head, take, held), labels[held], 1)) for head in heads]
        usable = [
            score if math.isfinite(loss) else -1.0
            for score, loss in zip(scored, losses, strict=True)
        ]
        best = int(np.argmax(usable))
        grid = {f"{blr:g}": score for blr, score in zip(options.rates, scored, strict=True)}
    return Trained(
        heads[best].eval(), options.rates[best], losses[best], plans[best], grid, len(fit)
    )


def _split(task: Task, count: int, several: bool) -> tuple[npt.NDArray[np.int64], Any]:
    """Return the rows that heads learn from, and those that choose among them."""
    rows = np.arange(count)
    if not several:
        return rows, rows[:0]
    words = rng.words(
        rng.key_digests([f"rows:{count}"]), rng.stream("probe-held", task.seed), count
    )
    order = np.argsort(words[0], kind="stable")
    held = max(1, round(HELD_BACK * count))
    if count - held < 2:
        raise UsageError(
            f"cannot choose among base learning rates with {count} training pictures: some are "
            "held back to choose by; give one --blr or more pictures"
        )
    return np.sort(order[held:]), np.sort(order[:held])


def _train_epoch(
    task: Task,
    take: Take,
    labels: Tensor,
    fit: npt.NDArray[np.int64],
    heads: Sequence[Head],
    steppers: Sequence[torch.optim.Optimizer],
    plans: Sequence[list[float]],
    options: ProbeOptions,
    epoch: int,
) -> list[float]:
    """Step every head through the batches of an epoch; return their mean losses. Pictures beyond
    the last whole batch are left out of the epoch."""
    batch = min(options.batch_size, len(fit))
    steps = len(fit) // batch
    order = fit[rng.permutation(len(fit), task.seed, epoch)][: steps * batch]
    totals = [0.0] * len(heads)
    for step, rows in enumerate(np.split(order, steps)):
        features, wanted = take(rows).to(task.device), labels[rows].to(task.device)
        for i, (head, stepper) in enumerate(zip(heads, steppers, strict=True)):
            for group in stepper.param_groups:
                group["lr"] = plans[i][epoch * steps + step]
            loss = F.cross_entropy(head.train()(features), wanted)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            totals[i] += loss.item()
    if task.progress is not None:
        task.progress("epochs", epoch + 1, options.epochs)
    return [total / steps for total in totals]


def _epochs(task: Task, probe: Probe) -> Iterator[tuple[Take, Tensor]]:
    """Yield the features and labels of each epoch: stored views in turn, or fresh ones."""
    views, epochs = probe.options.train_views, probe.options.epochs
    if views is not None:
        stored, labels = _features(task, probe, task.train, list(range(views)) or None, "train")
        for epoch in range(epochs):
            yield _taker(stored[epoch % len(stored)], task, probe), labels
        return
    for epoch in range(epochs):
        stage = f"train, epoch {epoch + 1} of {epochs}"
        (rows,), labels = _features(task, probe, task.train, [epoch], stage, keep=False)
        yield _taker(rows, task, probe), labels


def _features(
    task: Task,
    probe: Probe,
    of: LabelledSet,
    views: Sequence[int] | None,
    stage: str,
    keep: bool = True,
) -> tuple[Sequence[Any], Tensor]:
    if probe.tokens:
        return task.tokens(of, views, stage=stage, keep=keep)
    features, labels = task.pooled(of, views, stage=stage, keep=keep, visible=probe.visible)
    return list(features), labels


def _taker(rows: Any, task: Task, probe: Probe) -> Take:
    if isinstance(rows, Tensor):
        return lambda index: rows[index]
    first = task.frozen.prefix if probe.patches_only else 0
    return lambda index: torch.from_numpy(rows[index][:, first:].astype(np.float32))


@torch.no_grad()
def predict(head: Head, take: Take, rows: npt.NDArray[np.int64]) -> Tensor:
    """Return logits (m,C) of rows (m,) on the CPU, with the running statistics of the norm."""
    head.eval()
    device = head.linear.weight.device
    chunks = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    return torch.cat([head(take(chunk).to(device)).cpu() for chunk in chunks])
