"""Components against scikit-learn's and against numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from featcache.drawing import pca

RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(300, 20)) * np.linspace(5, 0.1, 20) + 3


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:7], TOKENS.astype(np.float16)])
def test_the_components_are_those_of_scikit_learn(tokens: np.ndarray) -> None:
    """But for the sign."""
    theirs = PCA(3, svd_solver="full").fit(tokens.astype(np.float64))
    basis = pca.fit(tokens)
    assert np.allclose(np.abs(basis.components.T), np.abs(theirs.components_), atol=1e-9)
    assert np.allclose(basis.shares, theirs.explained_variance_ratio_)
    largest = np.abs(basis.components).argmax(0)
    assert (np.take_along_axis(basis.components, largest[None], 0) > 0).all()


def test_colours_by_hand() -> None:
    """Two components: 0..10 along the first axis, -1 and 1 along the second; the third tells
    nothing."""
    first = np.repeat(np.arange(11.0), 2)
    tokens = np.stack([first, np.tile([-1.0, 1.0], 11), 0 * first], 1)
    basis = pca.fit(tokens)
    assert np.allclose(basis.components, [[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    colours = pca.rgb([[5, 0, 0], [99, 1, 0], [-99, -1, 0], [5, np.nan, 0]], basis)
    assert colours.tolist() == [[[128, 128, 128], [255, 255, 128]], [[0, 0, 128], [0, 0, 0]]]


def test_one_basis_gives_one_token_one_colour() -> None:
    basis = pca.fit(TOKENS)
    one, two = pca.rgb(TOKENS[:4], basis), pca.rgb(TOKENS[[3, 2, 1, 0]], basis)
    assert np.array_equal(one.reshape(4, 3), two.reshape(4, 3)[::-1])
    assert one.std() > 0


def test_tokens_that_are_no_numbers_are_left_out() -> None:
    broken = np.concatenate([TOKENS, np.full((5, 20), np.nan), np.full((5, 20), np.inf)])
    assert np.array_equal(pca.fit(broken).components, pca.fit(TOKENS).components)
    with pytest.raises(ValueError, match="no token is finite"):
        pca.fit(broken[-5:])


def test_tokens_that_are_all_the_same_are_grey() -> None:
    basis = pca.fit(np.ones((9, 4)))
    assert (pca.rgb(np.ones((4, 4)), basis) == pca.UNKNOWN).all()
    assert np.isfinite(basis.shares).all()
