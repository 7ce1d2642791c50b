"""Losses equal numbers worked out by hand, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featcache.errors import UsageError
from student.models import losses
from student.models.alignment_levels import expand_level_weights


def test_smooth_l1_by_hand() -> None:
    """e = 0.5, -2, 1, 0: e^2 within 1, 2|e| - 1 beyond: 0.25 + 3 + 1 + 0 = 4.25, over four."""
    pred = torch.tensor([[0.5, -1.0], [3.0, 4.0]])
    target = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    assert losses.smooth_l1(pred, target).item() == 1.0625


def test_norm_pix_by_hand() -> None:
    """Mean 2.5, unbiased variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5/3."""
    got = losses.norm_pix(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(5 / 3 + 1e-6)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-14)


def test_norm_pix_of_a_flat_patch_is_zero() -> None:
    assert losses.norm_pix(torch.full((2, 4), 0.7)).abs().max() == 0


def test_pixel_mse_by_hand() -> None:
    """Errors 1, 1 and 0, 4 -> (1 + 2) / 2."""
    pred = torch.tensor([[[1.0, 1.0], [3.0, 7.0]]])
    patches = torch.tensor([[[0.0, 2.0], [3.0, 5.0]]])
    assert losses.pixel_mse(pred, patches, normalise=False).item() == 1.5


def test_pixel_mse_normalised_in_numpy() -> None:
    rng = np.random.default_rng(0)
    pred, patches = rng.normal(size=(2, 5, 12)), rng.normal(2, 3, size=(2, 5, 12))
    terms = []
    for b, i in np.ndindex(2, 5):
        patch = patches[b, i]
        target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        terms.append(((pred[b, i] - target) ** 2).mean())
    got = losses.pixel_mse(torch.tensor(pred), torch.tensor(patches))
    assert got.item() == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_is_promoted_and_float64_kept(given: torch.dtype, kept: torch.dtype) -> None:
    x, y = torch.zeros(1, 2, 4, dtype=given), torch.ones(1, 2, 4, dtype=given)
    assert losses.upcast(x).dtype == kept
    assert losses.smooth_l1(x, y).dtype == kept
    assert losses.norm_pix(x).dtype == kept
    assert losses.pixel_mse(x, y).dtype == kept


def test_small_errors_survive_half_precision_and_autocast() -> None:
    """1e-4 squared is below float16's smallest number."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = losses.smooth_l1(torch.full((8,), 1e-4, dtype=torch.float16), torch.zeros(8))
    assert loss.item() == pytest.approx(1e-8, rel=1e-2)


def test_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 6, dtype=torch.float64) * 2
    assert torch.autograd.gradcheck(lambda x: losses.smooth_l1(x, y), x)
    assert torch.autograd.gradcheck(lambda x: losses.pixel_mse(x, y), x)
    assert torch.autograd.gradcheck(losses.norm_pix, x)


@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("top:5", 12, [0] * 7 + [0.2] * 5),
        ("top:2", 2, [0.5, 0.5]),
        ("top:1", 3, [0, 0, 1]),
        ("mean", 4, [0.25] * 4),
        ("last", 3, [0, 0, 1]),
        ("last", 1, [1]),
        ("linear-decay", 4, [0, 1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_level_weights(name: str, n: int, expected: list[float]) -> None:
    assert expand_level_weights(name, n) == pytest.approx(expected, abs=0)
    assert sum(expand_level_weights(name, n)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("top5", 12, "unknown level_weights 'top5': did you mean top:K"),
        ("top:0", 12, "unknown level_weights 'top:0'"),
        ("top:x", 12, "unknown level_weights 'top:x'"),
        ("linear_decay", 12, "did you mean linear-decay"),
        ("top:6", 5, "top:6 needs 6 levels, 5 are aligned"),
        ("linear-decay", 1, "is 0 everywhere"),
    ],
)
def test_level_weights_that_cannot_be(name: str, n: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand_level_weights(name, n)


def test_l2_and_l1_by_hand() -> None:
    """e = (0.5, -3): (0.25 + 9) / 2 and (0.5 + 3) / 2; in float32 whatever comes in."""
    pred, target = torch.tensor([[1.5, 1.0]]).half(), torch.tensor([[1.0, 4.0]]).bfloat16()
    assert losses.l2(pred, target).item() == 4.625
    assert losses.l1(pred, target).item() == 1.75
    assert losses.l2(pred, target).dtype == losses.l1(pred, target).dtype == torch.float32
