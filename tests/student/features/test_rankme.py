"""RankMe is tested against numbers by hand and against numpy's float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from student.features.rankme import rankme


def reference(features: np.ndarray) -> float:
    """Take the singular values from the eigenvalues of the smaller Gram matrix."""
    small = features if len(features) < features.shape[1] else features.T
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(small @ small.T), 0, None))
    p = [value / sum(sigma) + 1e-7 for value in sigma]
    return math.exp(-sum(each * math.log(each) for each in p))


def test_numbers_by_hand() -> None:
    """p = (3/4, 1/4) has exp(entropy) = 4 / 3^(3/4); 1e-7 more of each p moves the entropy by
    -1e-7 * (2 + ln 3/4 + ln 1/4) = -3.26e-8."""
    features = torch.tensor([[0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    assert rankme(features) == pytest.approx(4 / 3**0.75 * (1 - 3.26e-8), rel=1e-10)
    assert rankme(features) == pytest.approx(1.754765293, rel=1e-9)
    # sigma = (5, 0): -1.0000001 ln 1.0000001 - 1e-7 ln 1e-7 = -1e-7 + 16.118096e-7
    one_direction = torch.tensor([[3.0, 4.0]]).expand(7, 2)
    assert rankme(one_direction) == pytest.approx(1 + 15.1181e-7, rel=1e-11)
    # 8 equal sigma: p = 1/8 + 1e-7, -8 p ln p = ln 8 + 8e-7 (ln 8 - 1)
    assert rankme(torch.eye(8)) == pytest.approx(8 * (1 + 8.6355e-7), rel=1e-10)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (9, 9), (1, 5), (5, 1)])
def test_random_features_agree_with_numpy(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(0.5, 2.0, shape)
    assert rankme(torch.from_numpy(features)) == pytest.approx(reference(features), rel=1e-9)
    half = features.astype(np.float16)
    want = reference(half.astype(np.float64))
    assert rankme(torch.from_numpy(half)) == pytest.approx(want, rel=1e-9)


def test_features_of_low_rank_are_found_so_in_float32() -> None:
    """300 x 256 features of rank 3: in float32 the 253 others would come out above 0."""
    draw = np.random.default_rng(1)
    # whole numbers: their products are exact in float32
    factors = draw.integers(-8, 9, (300, 3)), draw.integers(-8, 9, (3, 256))
    features = (factors[0] @ factors[1]).astype(np.float32)
    sigma = np.linalg.svd(features.astype(np.float64), compute_uv=False)[:3]
    p = sigma / sigma.sum()
    absent = 253 * 1e-7 * -math.log(1e-7)
    want = math.exp(-(p * np.log(p)).sum() + absent - 1e-7 * (3 + np.log(p).sum()))
    assert rankme(torch.from_numpy(features)) == pytest.approx(want, rel=1e-8)


def test_scale_and_rotation_change_nothing_and_the_mean_does() -> None:
    draw = np.random.default_rng(2)
    features = draw.normal(size=(50, 8))
    turn, _ = np.linalg.qr(draw.normal(size=(8, 8)))
    rank = rankme(torch.from_numpy(features))
    assert rankme(torch.from_numpy(1e-12 * features @ turn)) == pytest.approx(rank, rel=1e-9)
    assert rankme(torch.from_numpy(features + 100.0)) < 1.5 < rank


def test_features_without_a_rank() -> None:
    assert rankme(torch.zeros(4, 3)) == 0.0
    for bad in (math.nan, math.inf, -math.inf):
        features = torch.ones(4, 3)
        features[2, 1] = bad
        assert math.isnan(rankme(features))


def test_gradients_and_the_features_stay_as_they_are() -> None:
    features = torch.arange(12.0).reshape(4, 3).requires_grad_()
    assert isinstance(rankme(features), float)
    assert torch.equal(features.detach(), torch.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes features \(n,D\), at least one of each; given "):
        rankme(torch.zeros(shape))
