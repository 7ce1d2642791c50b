"""Classify frozen features by logistic regression.

A sweep chooses its regularisation.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP),
ICML 2021, appendix A.3: scikit-learn's logistic regression by L-BFGS, its C swept on a logarithmic
scale over held-out training pictures, at most 1,000 iterations; then it is fitted again to all
training pictures. Features are taken as they are, as there.

    student eval logreg RUN --images LABELLED --pool mean

A tenth of the training pictures, of every class by its share, chooses C. With one C nothing is held
back. Cost: one forward of every picture, then a convex fit for each C and one more; minutes for
some ten thousand pictures, and not made for a million.

n training pictures, D width, C (of the classes) C.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.errors import UsageError
from student.features.scores import percent
from student.features.task import Outcome, Scored, Task

OPTIONS: dict[str, tuple[Any, str]] = {
    "C": (
        "1e-3,1e-2,1e-1,1,10,100",
        "inverse strength of the L2 penalty; several are compared on a held-out tenth",
    ),
    "max_iter": (1000, "iterations of L-BFGS"),
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {}
LEAST, MOST = 1e-30, 1e30  # of C, whose inverse must be a number
HELD_BACK = 0.1
# Numbers in the features, times classes. Below it an iteration takes milliseconds on one core, and
# threads of BLAS cost more than they bring: 1,400 pictures of 128 numbers take 0.1 s on one core,
# and 26 s on two that something else uses as well.
SMALL = 10**8


def evaluate(task: Task, C: str = "1", max_iter: int = 1000) -> Outcome:
    """Fit the training pictures' pooled features, and score the test pictures."""
    values = _values(C)
    if max_iter < 1:
        raise UsageError(f"--max-iter is {max_iter}; at least 1 is needed: give 1000")
    (bank,), labels = task.pooled(task.train, stage="train")
    x, y = bank.double().numpy(), labels.numpy()
    _check_classes(task, y)
    tests = [(test, *task.pooled(test, stage=test.name)) for test in task.tests]
    grid = _sweep(x, y, values, max_iter, task.seed) if len(values) > 1 else {values[0]: 0.0}
    best = max(grid, key=lambda value: grid[value])
    fitted = _fit(x, y, best, max_iter)
    if task.progress is not None:
        task.progress("fits", len(values) + 1, len(values) + 1)
    facts: dict[str, Any] = {"C": best, "iterations": int(fitted.n_iter_.max())}
    if len(grid) > 1:
        facts["grid"] = {f"{value:g}": score for value, score in grid.items()}
    if note := _note(best, grid, facts["iterations"], max_iter):
        facts["note"] = note
    scored = []
    for test, (rows,), own in tests:
        scores = np.full((len(rows), task.classes), -np.inf)
        scores[:, fitted.classes_] = fitted.predict_log_proba(rows.double().numpy())
        scored.append(Scored(test, torch.from_numpy(scores), own))
    weights = {"coef": fitted.coef_, "intercept": fitted.intercept_, "classes": fitted.classes_}
    head = {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in weights.items()}
    return Outcome(scored, facts, head)


def _note(best: float, grid: dict[float, float], iterations: int, max_iter: int) -> str:
    """Say where the fit had not ended, or the best C may lie beyond those that were compared."""
    if iterations >= max_iter:
        return f"the fit had not converged after {max_iter} iterations; raise --max-iter"
    alone = list(grid.values()).count(grid[best]) == 1
    if len(grid) > 1 and alone and best in (min(grid), max(grid)):
        side = "largest" if best == max(grid) else "smallest"
        return f"the {side} C that was compared, {best:g}, is the best; give --C a wider range"
    return ""


def _values(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(LEAST <= value <= MOST for value in values):
        raise UsageError(
            f"cannot fit with C={text}: --C is a number from {LEAST:g} to {MOST:g}, or several "
            "parted by commas; give 0.1,1,10"
        )
    return values


def _check_classes(task: Task, labels: npt.NDArray[np.int64]) -> None:
    if len(np.unique(labels)) < 2:
        raise UsageError(
            f"cannot fit {task.train.source.spec}: its pictures are of one class, two at least are "
            "needed; give pictures of more classes"
        )


def _sweep(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.int64],
    values: list[float],
    max_iter: int,
    seed: int,
) -> dict[float, float]:
    """Return top-1 on held-out training pictures for each C."""
    split = _import("sklearn.model_selection")
    held = max(math.ceil(HELD_BACK * len(y)), len(np.unique(y)))
    counts = np.unique(y, return_counts=True)[1]
    if counts.min() < 2 or held >= len(y) - len(counts):
        raise UsageError(
            f"cannot compare several C with {len(y)} training pictures: some of every class are "
            "held back to choose by; give one --C, or more pictures"
        )
    fit, pick = split.train_test_split(
        np.arange(len(y)), test_size=held, stratify=y, random_state=seed % (1 << 32)
    )
    return {
        value: percent(
            torch.from_numpy(_fit(x[fit], y[fit], value, max_iter).predict(x[pick]) == y[pick])
        )
        for value in values
    }


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], value: float, max_iter: int) -> Any:
    linear_model, exceptions = _import("sklearn.linear_model"), _import("sklearn.exceptions")
    threads = _import("threadpoolctl").threadpool_limits  # of BLAS; None leaves them as they are
    small = x.size * len(np.unique(y)) < SMALL
    with warnings.catch_warnings(), threads(1 if small else None):
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # the result tells
        return linear_model.LogisticRegression(C=value, max_iter=max_iter).fit(x, y)


def _import(name: str) -> Any:
    """Import a part of scikit-learn, or what it comes with: nothing else of an installation needs
    it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            "student eval logreg needs scikit-learn; run `pip install scikit-learn` (or `pip "
            "install 'featcache[quickstart]'`)"
        ) from error
