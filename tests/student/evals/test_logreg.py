"""Logistic regression equals scikit-learn's own, and says what it compared."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import threadpoolctl
import torch
from sklearn.linear_model import LogisticRegression

from featcache.errors import UsageError
from student.evals import logreg
from student.features import scores
from tests.student import toy_task as toys


def test_it_is_scikit_learns() -> None:
    task = toys.toy_task(gap=0.6)
    (x,), y = task.pooled(task.train, stage="")
    (test,), own = task.pooled(task.tests[0], stage="")
    want = LogisticRegression(C=0.3, max_iter=1000).fit(x.double().numpy(), y.numpy())
    got = logreg.evaluate(task, C="0.3")
    np.testing.assert_allclose(
        got.scored[0].scores.exp(), want.predict_proba(test.double().numpy()), rtol=1e-9
    )
    right = 100 * want.score(test.double().numpy(), own.numpy())
    assert scores.of_test(got.scored[0])["top1"] == pytest.approx(right)
    assert got.head is not None
    np.testing.assert_array_equal(got.head["coef"], want.coef_)


def test_the_sweep_chooses_by_held_out_training_pictures_and_fits_all() -> None:
    task = toys.toy_task(gap=0.5)
    got = logreg.evaluate(task, C="1e-6,1,1e-5")
    grid = got.facts["grid"]
    assert list(grid) == ["1e-06", "1", "1e-05"]
    assert all(score % 10 == 0 for score in grid.values())  # of ten pictures, two of each class
    best = max(grid, key=lambda value: grid[value])
    assert got.facts["C"] == float(best)
    alone = logreg.evaluate(task, C=best)
    assert "grid" not in alone.facts
    assert torch.equal(got.scored[0].scores, alone.scored[0].scores)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({1.0: 80.0, 10.0: 90.0}, "the largest C that was compared, 10, is the best"),
        ({10.0: 80.0, 0.1: 90.0, 1.0: 80.0}, "the smallest C that was compared, 0.1, is the best"),
        ({1.0: 80.0, 10.0: 90.0, 100.0: 80.0}, ""),
        ({0.1: 90.0, 1.0: 90.0, 10.0: 80.0}, ""),  # an equal one is better known
    ],
)
def test_a_best_value_at_the_end_of_its_range_is_told(
    monkeypatch: pytest.MonkeyPatch, grid: dict[float, float], told: str
) -> None:
    monkeypatch.setattr(logreg, "_sweep", lambda *_: grid)
    note = logreg.evaluate(toys.toy_task(), C=",".join(map(str, grid))).facts.get("note", "")
    assert note == (f"{told}; give --C a wider range" if told else "")


def test_small_fits_take_one_thread_of_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are allowed around the evaluation, and are again after it."""
    fit, seen = LogisticRegression.fit, list[set[int]]()

    def threads() -> set[int]:
        return {each["num_threads"] for each in threadpoolctl.threadpool_info()}

    def watched(self: LogisticRegression, *given: object) -> LogisticRegression:
        seen.append(threads())
        return fit(self, *given)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    with threadpoolctl.threadpool_limits(2):
        logreg.evaluate(toys.toy_task(), C="1")
        assert threads() == {2}
        monkeypatch.setattr(logreg, "SMALL", 0)
        logreg.evaluate(toys.toy_task(), C="1")
    assert seen == [{1}, {2}]


def test_two_classes_and_a_class_that_train_lacks() -> None:
    """scikit-learn keeps one row of weights for two classes; the third cannot be chosen."""
    task = toys.toy_task(classes=2)
    few = toys.toy_task(classes=3)
    got = logreg.evaluate(task, C="1").scored[0]
    assert got.scores.shape == (40, 2)
    train = few.train
    object.__setattr__(train, "labels", np.where(train.labels == 2, 1, train.labels))
    found = logreg.evaluate(few, C="1").scored[0].scores
    assert (found[:, 2] == -torch.inf).all()
    assert found[:, :2].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"C": "0"}, "--C is a number from 1e-30"),
        ({"C": "a,b"}, "--C is a number from 1e-30"),
        ({"max_iter": 0}, "--max-iter is 0; at least 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        logreg.evaluate(toys.toy_task(), **options)  # type: ignore[arg-type]


def test_a_fit_that_has_not_converged_says_so() -> None:
    got = logreg.evaluate(toys.toy_task(gap=0.1), C="1000", max_iter=2)
    assert "had not converged after 2 iterations" in got.facts["note"]


def test_without_scikit_learn_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match="needs scikit-learn; run `pip install scikit-learn`"):
        logreg.evaluate(toys.toy_task(), C="1")
