"""`student train --probe` scores the encoder on labelled pictures while it is trained.

The main process probes at the end of an epoch; the others wait for it in their next collective.
Nothing of the run is touched: the model is put into eval mode and back, generators are as they
were, and only the row of metrics is longer. By default the time of all probes stays under BUDGET of
the time of training; `--probe-every E` probes every E epochs whatever it costs.

    decode, run the teacher once, probe the untrained encoder -> a note
    step ... step -> due at the end of an epoch, and within the budget? -> the row of that step
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from featcache.console.text import say
from featcache.errors import UserError, counted
from featcache.models.hooks import normalise_pixels
from featcache.pictures.source import Source
from featcache.runtime import device as devices
from student.features import online
from student.features.online import U8, ProbeRows
from student.training.set_aside import generators_kept, set_aside
from student.training.train_state import TrainState

BUDGET = 0.03  # of the seconds of training, for all probes together

Batches = Sequence[dict[str, Tensor]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class ProbePlan:
    """Says which pictures a run is probed on and how often; `align` makes batches with a teacher's
    targets of the first held-out crops (n,S,S,3)."""

    source: Source
    rows: ProbeRows
    img_size: int
    every: int | None  # epochs; None: as the budget allows
    align: Callable[[U8], Batches]
    say: Callable[[str], None] = say  # takes notes

    @contextlib.contextmanager
    def started(
        self, state: TrainState, out: Path, first: int, total: int, steps_per_epoch: int
    ) -> Iterator[Callable[[int], dict[str, float]]]:
        """Yield what gives each step's row its extra values; nothing in other processes than the
        first, or where no step is left. Notes tell pictures, time and the share that it took."""
        if not state.acc.is_main_process or first >= total:
            yield lambda step: {}
            return
        probe = OnlineProbe(self, state, total, steps_per_epoch)
        values = ", ".join(f"{name} {value:.4g}" for name, value in probe.values.items())
        self.say(
            f"note: probe: {self.facts}; {probe.prepared_s:.1f} s to prepare, {probe.last_s:.2f} s "
            f"a probe; before the first step {values}"
        )
        yield probe.after
        share = probe.spent_s / max(probe.trained_s, 1e-9)
        count = f"{probe.count} probe{'s' * (probe.count > 1)}"
        self.say(f"note: {count} took {probe.spent_s:.1f} s, {share:.1%} of the time of training")

    @property
    def facts(self) -> str:
        """Return pictures and pace in words."""
        pace = (
            f"after epochs, at most {BUDGET:.0%} of the time"
            if self.every is None
            else f"every {counted(self.every, 'epoch')} and at the end"
            if self.every > 1
            else "after every epoch"
        )
        count = f"{len(self.rows.train)} + {len(self.rows.test)} held-out pictures"
        return (
            f"{count} of {counted(self.rows.classes, 'class', 'classes')} of "
            f"{self.source.spec}; {pace}"
        )


class OnlineProbe:
    """Holds the pictures of a run's probes and what they have cost so far."""

    def __init__(
        self,
        plan: ProbePlan,
        state: TrainState,
        total: int,
        steps_per_epoch: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Decode the pictures, make the teacher's targets of some and probe the encoder as it is.
        Raises UserError for an encoder or pictures that cannot be probed."""
        self.plan, self.state, self.clock = plan, state, clock
        self.total, self.steps_per_epoch = total, steps_per_epoch
        if not hasattr(state.module.encoder, "forward_features"):
            raise UserError(
                "--probe: the encoder of this recipe has no forward_features(images), which gives "
                "the tokens after its last norm; give it one, or leave --probe out"
            )
        begun = clock()
        self.train, self.test = (
            online.centre_crops(plan.source, rows, plan.img_size)
            for rows in (plan.rows.train, plan.rows.test)
        )
        with generators_kept(state.acc.device):
            self.batches = plan.align(self.test)
        self.prepared_s = clock() - begun
        self.count, self.spent_s, self.last_s = 0, 0.0, 0.0
        self.values = self._probe()
        self._before_s, self._begun = self.spent_s, clock()

    @property
    def trained_s(self) -> float:
        """Return the seconds of training so far, without those of the probes."""
        return self.clock() - self._begun - (self.spent_s - self._before_s)

    def after(self, step: int) -> dict[str, float]:
        """Return what the row of metrics of a step, counted from 1, gets: mostly nothing."""
        if not self._is_due(step):
            return {}
        return self._probe() | {"probe_s": round(self.last_s, 4)}

    def _is_due(self, step: int) -> bool:
        epochs, rest = divmod(step, self.steps_per_epoch)
        is_last = step == self.total
        if self.plan.every is not None:
            return is_last or (rest == 0 and epochs % self.plan.every == 0)
        if rest and not is_last:
            return False
        return self.spent_s + self.last_s <= BUDGET * self.trained_s

    def _probe(self) -> dict[str, float]:
        _wait(self.state.acc.device)  # for the step, whose time this is not
        begun = self.clock()
        values = self._measure()
        self.last_s = self.clock() - begun
        self.spent_s += self.last_s
        self.count += 1
        return values

    def _measure(self) -> dict[str, float]:
        module: Any = self.state.module
        device, found = self.state.acc.device, dict[str, float]()
        with set_aside(self.state):
            train, test = (
                online.embed(module.encoder, crops, device) for crops in (self.train, self.test)
            )
            if self.batches:
                found = online.cosines(module.predictions, self._aligned(device))
        return online.scores(train, test, self.plan.rows) | found

    def _aligned(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Yield the batches on the device, with the images of their crops."""
        start = 0
        for batch in self.batches:
            crops = self.test[start : start + len(batch["ids_keep"])]
            start += len(crops)
            pixels = torch.from_numpy(crops).to(device).permute(0, 3, 1, 2)
            images = normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
            yield {"images": images} | {name: value.to(device) for name, value in batch.items()}


def _wait(device: torch.device) -> None:
    if devices.is_gpu(device):
        torch.cuda.synchronize(device)
