"""Features as colours: three principal components of many tokens become red, green and blue.

One basis is fitted for all pictures of a level, so that a colour means the same in each of them.

N tokens to fit, P = g * g patches of a view, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.drawing.pictures import grid_side

F64 = npt.NDArray[np.float64]

OUTLIERS = 1.0  # percent of tokens at either end that may be darker or lighter than can be shown
UNKNOWN = 128  # a component that tells nothing: fewer than three in the tokens


@dataclass(frozen=True)
class Basis:
    """Projects tokens to three numbers, and knows what is dark and what is light in each."""

    mean: F64  # (D,)
    components: F64  # (D, 3), orthonormal, or zero where there is none
    low: F64  # (3,)
    high: F64  # (3,)
    shares: F64  # (3,) of the variance


def fit(tokens: npt.ArrayLike) -> Basis:
    """Return the basis of tokens (N, D); those that are not finite are left out.

    The sign of a component is such that its largest weight is positive. Raises ValueError where no
    token is finite.
    """
    known = np.asarray(tokens, np.float64)
    known = known[np.isfinite(known).all(-1)]
    if not len(known):
        raise ValueError("no token is finite")
    mean = known.mean(0)
    # the R of a QR has the singular values and right vectors of the tokens at a fraction of the
    # cost: N is tens of thousands, D a thousand
    _, values, vectors = np.linalg.svd(np.linalg.qr(known - mean, mode="r"))
    real = values > values[0] * max(known.shape) * np.finfo(np.float64).eps
    found = vectors[: len(values)][real][:3]
    at = np.abs(found).argmax(1, keepdims=True)
    components = np.zeros((known.shape[1], 3))
    components[:, : len(found)] = (found * np.sign(np.take_along_axis(found, at, 1))).T
    shares = np.zeros(3)
    shares[: len(found)] = (values**2 / max(float((values**2).sum()), 1e-300))[real][:3]
    low, high = np.percentile((known - mean) @ components, [OUTLIERS, 100 - OUTLIERS], axis=0)
    return Basis(mean, components, low, high, shares)


def rgb(tokens: npt.ArrayLike, basis: Basis) -> npt.NDArray[np.uint8]:
    """Return the colours (g, g, 3) of a view's patches (P, D); a patch that is not finite is black,
    for the caller to hatch."""
    given = np.asarray(tokens, np.float64)
    side = grid_side(len(given))
    known = np.isfinite(given).all(-1, keepdims=True)
    places = (np.where(known, given, basis.mean) - basis.mean) @ basis.components
    width = basis.high - basis.low
    told = basis.components.any(0) & (width > 0)
    scaled = np.clip((places - basis.low) / np.where(told, width, 1), 0, 1) * 255
    colours = np.where(known, np.where(told, np.round(scaled), UNKNOWN), 0)
    return colours.astype(np.uint8).reshape(side, side, 3)
