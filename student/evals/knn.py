"""Classify frozen features by weighted k-nearest neighbours.

There is no training, no seed, one number.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), ICCV 2021: cosine
similarity between the centre views of test and training pictures; each of the k nearest training
pictures votes for its class with exp(similarity / 0.07); k = 20. Here ties go to the smaller class
number, and a class without a vote is never among the top 5 (in DINO's code such classes take the
free places in whatever order the sort leaves them).

    student eval knn RUN --images LABELLED

Several values (`--k 5,10,20 --temperature 0.04,0.07`) are compared on the training pictures, each
judged by the others (leave-one-out), and the best is used: no test picture has a say.

Cost: one forward of every picture, then n_test x n_train x D multiply-adds.

n test pictures, N training pictures (the bank), D width, C classes.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from featcache.errors import UsageError
from featcache.extraction.knn import TEMPERATURE, K, votes
from student.features.scores import hits, percent
from student.features.task import Outcome, Scored, Task

OPTIONS: dict[str, tuple[Any, str]] = {
    "k": (str(K), "nearest training pictures that vote; several, 5,10,20, are compared"),
    "temperature": (
        str(TEMPERATURE),
        "a neighbour votes with exp(cosine / temperature); several are compared",
    ),
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {}


def _numbers(k: str, temperature: str, bank: int) -> tuple[list[int], list[float]]:
    try:
        counts = [int(part) for part in k.split(",")]
        temperatures = [float(part) for part in temperature.split(",")]
    except ValueError:
        raise UsageError(
            f"cannot vote with --k {k} --temperature {temperature}: numbers parted by commas are "
            "needed; give --k 20 --temperature 0.07"
        ) from None
    for count in counts:
        if not 1 <= count <= bank:
            raise UsageError(
                f"cannot ask {count} nearest neighbours: there are {bank} training pictures, --k "
                f"is 1 to {bank}; give a smaller --k or more training pictures"
            )
    for each in temperatures:
        if not (math.isfinite(each) and each > 0):
            raise UsageError(
                f"cannot vote at temperature {each:g}: --temperature is above 0; give 0.07"
            )
    return counts, temperatures


def evaluate(task: Task, k: str = str(K), temperature: str = str(TEMPERATURE)) -> Outcome:
    """Score the test pictures by the votes of training pictures; the task's seed is not used:
    nothing here is random."""
    counts, temperatures = _numbers(k, temperature, len(task.train))
    (bank,), labels = task.pooled(task.train, stage="train")
    _numbers(k, temperature, len(bank))  # fewer where pictures were skipped
    bank = bank.to(task.device)
    grid = _compared(bank, labels, task.classes, counts, temperatures)
    best = max(grid, key=lambda each: grid[each])
    scored = []
    for test in task.tests:
        (rows,), own = task.pooled(test, stage=test.name)
        found = votes(
            rows.to(task.device), bank, labels, task.classes, k=best[0], temperature=best[1]
        )
        # a class without a vote is among nobody's best
        scored.append(Scored(test, torch.where(found > 0, found, -torch.inf), own))
    facts: dict[str, Any] = {"k": best[0], "temperature": best[1]}
    if len(grid) > 1:
        facts["grid"] = {f"k={k} temperature={t:g}": score for (k, t), score in grid.items()}
    return Outcome(scored, facts)


def _compared(
    bank: Tensor, labels: Tensor, classes: int, counts: list[int], temperatures: list[float]
) -> dict[tuple[int, float], float]:
    """Return top-1 of the training pictures, each judged by the others, for every pair; nothing is
    computed where there is one pair."""
    pairs = list(product(counts, temperatures))
    if len(pairs) == 1:
        return {pairs[0]: 0.0}
    return {
        (k, temperature): percent(
            hits(
                votes(
                    bank, bank, labels, classes, k=min(k, len(bank) - 1), temperature=temperature,
                    leave_one_out=True,
                ),
                labels,
                1,
            )
        )
        for k, temperature in pairs
    }  # fmt: skip
