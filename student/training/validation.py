"""Fine-tuning scores the test pictures while it trains, and keeps the weights of the best score.

    RUN/best.safetensors   weights of the highest top-1 on the first test set, with its step

Every process scores its share of the pictures. The model is put into eval mode and back, and no
number of the run depends on it. The best of many scores on test pictures is what the released codes
report; it is the higher for being chosen there, so the last is told beside it.

n pictures, C classes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from featcache.errors import UserError, counted
from featcache.models.hooks import normalise_pixels
from student.features import finetuned, scores
from student.features.embed import Rendering, Skipped, pixels_of
from student.features.labels import Subset
from student.features.task import Scored, TestSet
from student.training.set_aside import set_aside
from student.training.train_state import TrainState, sharded

Triple = tuple[float, float, float]
Network = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class ValidationPlan:
    """Says which pictures a run is scored on, how they are cut, and how often."""

    tests: tuple[TestSet, ...]
    rendering: Rendering
    mean: Triple
    std: Triple
    classes: int  # that the model knows
    batch_size: int
    every: int  # epochs
    skipped: Skipped

    @property
    def facts(self) -> str:
        pictures = ", ".join(f"{len(test)} of {test.source.spec}" for test in self.tests)
        pace = (
            f"every {counted(self.every, 'epoch')} and at the end"
            if self.every > 1
            else "after every epoch"
        )
        return f"{pictures}; {pace}"

    @contextlib.contextmanager
    def started(
        self, state: TrainState, out: Path, first: int, total: int, steps_per_epoch: int
    ) -> Iterator[Callable[[int], dict[str, float]]]:
        """Yield what scores the model at the end of an epoch, and keeps the best."""
        best = _Best(out, first)

        def after(step: int) -> dict[str, float]:
            epochs, rest = divmod(step, steps_per_epoch)
            if step != total and (rest or epochs % self.every):
                return {}
            return self._validate(state, best, step)

        yield after

    def _validate(self, state: TrainState, best: _Best, step: int) -> dict[str, float]:
        values = dict[str, float]()
        with set_aside(state):
            # DDP would exchange buffers in each forward, and processes may make unequally many
            network = state.model if sharded(state.acc) else state.module
            found = self.score(network, state.acc)
            values |= {_named("top1", each): scores.of_test(each)["top1"] for each in found}
            if state.average is not None:
                averaged = self.score(state.average.module, state.acc)
                values |= {
                    _named("ema_top1", each): scores.of_test(each)["top1"] for each in averaged
                }
        # all processes have all scores, and come to the same end
        if bool(found[0].scores.isfinite().all()):  # else it is no score of these weights
            best.take(state, step, values[_named("top1", found[0])])
        return values

    def score(self, model: Network, acc: Accelerator) -> list[Scored]:
        """Score every test set by a model in eval mode; every process returns the whole, or raises
        the UserError of a picture that is one too many to be left out."""
        return [self._scored(test, model, acc) for test in self.tests]

    def _scored(self, test: TestSet, model: Network, acc: Accelerator) -> Scored:
        share = math.ceil(len(test) / acc.num_processes)
        # each has as many pictures, the first ones once more: what is sharded waits for all
        rows = np.resize(np.arange(len(test)), share * acc.num_processes)
        own = rows[acc.process_index :: acc.num_processes]
        pictures = Subset(test.source, own.tolist(), test.source.spec)
        logits, seen = torch.zeros(share, self.classes), torch.zeros(share, dtype=torch.bool)
        skipped = Skipped(share)  # all of them: how many are too many, the sum of all says
        for at, pixels in pixels_of(
            pictures, [self.rendering], (self.rendering.size,), self.batch_size, skipped
        ):
            images = normalise_pixels(pixels[0][0].to(acc.device), self.mean, self.std)
            logits[at] = model({"images": images})["logits"].float().cpu()
            seen[at] = True
        errors = skipped.errors.get(pictures.spec, {})
        self._count_skipped(test, {int(own[row]): error for row, error in errors.items()}, acc)
        places = np.arange(len(rows)).reshape(-1, acc.num_processes).T.reshape(-1)
        order = np.argsort(places)[: len(test)]
        logits, good = (_gathered(each, acc)[order] for each in (logits, seen))
        return Scored(test, logits[good], torch.from_numpy(test.labels)[good])

    def _count_skipped(self, test: TestSet, errors: dict[int, UserError], acc: Accelerator) -> None:
        """Add the pictures that any process left out, by their rows of the test set."""
        texts = [(row, str(error)) for row, error in errors.items()]
        for row, text in sorted(set(gather_object(texts) if acc.num_processes > 1 else texts)):
            self.skipped.add(test.source, row, UserError(text))
        if len(self.skipped.errors.get(test.source.spec, {})) == len(test):
            raise UserError(
                f"cannot score {test.source.spec}: none of its "
                f"{counted(len(test), 'picture')} can be "
                "decoded; give others with --test"
            )


def _gathered(rows: Tensor, acc: Accelerator) -> Tensor:
    """Return the rows of all processes, one process after the other."""
    if acc.num_processes == 1:
        return rows
    whole: Tensor = acc.gather(rows.to(acc.device))
    return whole.cpu()


def _named(what: str, scored: Scored) -> str:
    return what if scored.of.name == "test" else f"{what}_{scored.of.name}"


class _Best:
    """Keeps the weights of the highest score."""

    def __init__(self, run: Path, first: int) -> None:
        self.path = run / finetuned.BEST
        found = finetuned.best_facts(run)
        # that of a step which is made again comes again
        self.top1 = found.top1 if found is not None and found.step <= first else -1.0

    def take(self, state: TrainState, step: int, top1: float) -> None:
        """Write the weights if no earlier score was as high; a collective."""
        if top1 <= self.top1:
            return
        self.top1 = top1
        weights = state.weights()
        if state.acc.is_main_process:
            finetuned.write_best(self.path, weights, step, top1)
