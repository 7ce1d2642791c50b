"""An exported model is compared with the run's own network on the same pictures.

The run's side is in float64, so that what is left of a difference is not the rounding of its own
kernels.

B pictures, S pixels a side, P patches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.models.hooks import normalise_pixels
from student.features.exported import Exported

Outputs = dict[str, Tensor]


def own_outputs(given: Exported, images: Tensor) -> Outputs:
    """Return tokens (B,1+P,D) after the final norm, and logits (B,C) of a classifier, of the run's
    network in the precision of `images`."""
    net: Any = given.net
    logits = {"logits": net(images)} if given.classes else {}
    return {"tokens": net.forward_features(images), **logits}


@dataclass(frozen=True)
class Comparison:
    """Says how a format is compared: which code reads it, by how much tokens and logits may differ,
    whether it takes normalised pixels or those from 0 to 1, and what it holds of the run's
    network."""

    reader: str
    most: float = 1e-5
    normalised: bool = True
    expected: Callable[[Exported, Tensor], Outputs] = own_outputs
    tokens: str = "tokens"  # in words
    logits: bool = True  # holds the head of a classifier

    @property
    def numbers(self) -> str:
        """Return the kind of numbers that the format's side computes in."""
        return "float64" if self.most <= 1e-5 else "float32 against float64"


def compare(
    given: Exported, how: Comparison, found: Callable[[Tensor], Outputs], pixels: Tensor
) -> float:
    """Return the largest difference of tokens and logits on pixels (B,3,S,S) uint8. Raises
    UserError for one above `how.most`, relative where values are above one."""
    images = normalise_pixels(pixels, *given.pixels).double()
    kept = next(given.net.parameters()).dtype
    with torch.no_grad():
        try:
            given.net.double()
            own = how.expected(given, images)
        finally:
            given.net.to(kept)
        theirs = found(images if how.normalised else pixels.double() / 255)
    return max(_gap(name, value, theirs[name], how.most) for name, value in own.items())


def _gap(name: str, own: Tensor, theirs: Tensor, most: float) -> float:
    same = theirs.shape == own.shape
    scale = max(1.0, float(own.abs().max()))
    gap = float((theirs - own).abs().max()) / scale if same else float("inf")
    if not gap <= most:
        raise UserError(
            f"the exported model gives other {name} than the run: they differ by {gap:.1e}, "
            f"{most:g} is allowed; nothing was written; take another --format"
        )
    return gap
