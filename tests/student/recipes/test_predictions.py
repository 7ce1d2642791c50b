"""What a recipe predicts of its teacher is what its loss compares: the loss's parts are computed
again from the pairs of `predictions`, by each paper's formula in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.student.recipes.test_recipes import TINY_SETTINGS, tiny_batch, tiny_model

F64 = npt.NDArray[np.float64]
Part = Callable[[F64, F64], float]


def cosine(p: F64, t: F64) -> F64:
    norms = np.sqrt((p**2).sum(-1) * (t**2).sum(-1))
    return np.asarray((p * t).sum(-1) / norms)


def smooth_l1(p: F64, t: F64) -> float:
    """Twice the mean, as MaskAlign's code."""
    e = np.abs(p - t)
    return float(np.where(e < 1, e**2, 2 * e - 1).mean())


def fd(p: F64, t: F64) -> float:
    e = np.abs(p - t)
    return float(np.where(e < 2, e**2 / 4, e - 1).mean())


def distance_at(times: float, tokens: slice) -> Part:
    return lambda p, t: float((times * (1 - cosine(p, t)))[:, tokens].mean())


def mse(p: F64, t: F64) -> float:
    return float(((p - t) ** 2).mean())


ALL, CLS, PATCHES = slice(None), slice(0, 1), slice(1, None)
LEVELS = [("cosine_2", 5, "level_2", smooth_l1), ("cosine_3", 5, "level_3", smooth_l1)]
CASES = [  # recipe, settings, [(name, tokens, part of the loss, its formula)]
    ("maskalign", (), LEVELS),
    ("maskalign", ("cls_loss=false", "loss=l2"), [("cosine_3", 4, "level_3", mse)]),
    ("mralign", (), LEVELS),
    ("kd", (), [("cosine_z", 5, "cls", distance_at(2, CLS))]),
    ("kd", ("target=f", "teacher_width=10"), [("cosine_f", 5, "visible", distance_at(2, PATCHES))]),
    ("milan", (), [("cosine_z", 5, "cls", distance_at(2, CLS))]),
    ("milan", (), [("cosine_z", 5, "visible", distance_at(2, PATCHES))]),
    ("caev2", (), [("cosine_z", 5, "visible", distance_at(1, PATCHES))]),
    (
        "caev2",
        ("align=masked", "loss=mse", "mask_ratio=0.75"),
        [("cosine_ln_z", 12, "masked", mse)],
    ),
    (
        "caev2",
        ("reduction=paper",),
        [("cosine_z", 4, "visible", distance_at(1, ALL))],
    ),
    ("milan", ("cls_loss=false",), [("cosine_z", 4, "visible", distance_at(2, ALL))]),
    ("mvp", ("mask_ratio=0.75",), [("cosine_z", 12, "masked", distance_at(1, ALL))]),
    ("cae", ("target=z", "teacher_out=10"), [("cosine_z", 12, "masked", distance_at(1, ALL))]),
    ("fd", (), [("cosine_fd", 17, "loss", fd)]),
    ("mrmae", (), [("cosine_fd", 4, "mimic", mse)]),
    ("mrmae", ("mimic_at=decoder",), [("cosine_fd", 12, "mimic", mse)]),
    ("mrmae", ("joint=dino-b16", "joint_width=6"), [("cosine_joint", 4, "joint", mse)]),
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("recipe", "settings", "wanted"), CASES)
def test_a_part_of_the_loss_is_that_of_its_pair(
    recipe: str, settings: tuple[str, ...], wanted: list[tuple[str, int, str, Part]]
) -> None:
    model, _ = tiny_model(recipe, *settings)
    batch = tiny_batch()
    parts = model(batch)
    with torch.no_grad():
        pairs = model.predictions(batch)
    for name, tokens, part, formula in wanted:
        predicted, target = (each.double().numpy() for each in pairs[name])
        assert predicted.shape == target.shape
        assert predicted.shape[:2] == (2, tokens)
        assert parts[part].item() == pytest.approx(formula(predicted, target), rel=1e-9)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("milan", ("target=pixels",)),
        ("mrmae", ("mimic_weight=0",)),
        ("cae", ()),
        ("cae", ("target=pixels",)),
    ],
)
def test_nothing_is_predicted_of_a_teacher_that_is_not_asked(
    recipe: str, settings: tuple[str, ...]
) -> None:
    model, _ = tiny_model(recipe, *settings)
    assert model.predictions(tiny_batch()) == {}


def test_a_second_teacher_is_left_out_where_the_batch_lacks_it() -> None:
    """Its loss still wants it."""
    model, _ = tiny_model("mrmae", "joint=dino-b16", "joint_width=6")
    batch = {name: value for name, value in tiny_batch().items() if name != "second"}
    assert list(model.predictions(batch)) == ["cosine_fd"]
    with pytest.raises(KeyError, match="second"):
        model(batch)


def test_recipes_without_a_teacher_level_have_none() -> None:
    without = [name for name in TINY_SETTINGS if not hasattr(tiny_model(name)[0], "predictions")]
    assert sorted(without) == ["mae"]
