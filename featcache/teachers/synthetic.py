"""A teacher without a network computes exact block means, so that every batch size gives the same
bytes.

For tests, benchmarks and dry trials of a pipeline. Features are an affine map of each patch's
colours plus a position term, with a few outlier channels 60 times larger, as CLIP's residual stream
has. Options: `levels`, `tokens` (patches, a square number), `width`, `size` (input pixels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache import rng
from featcache.errors import UsageError
from featcache.models.architecture import MAX_PX
from featcache.models.contract import REGISTERED, ModelCard, Option
from featcache.models.spec import check_options

PREFIX = "synthetic"
NAMES = {
    "synthetic": ModelCard(
        "arithmetic on the picture, for trials", 224, 196, 64, 12, licence="apache-2.0"
    )
}
_DEFAULTS = {"levels": 12, "tokens": 196, "width": 64, "size": 224}
_MOST_NUMBERS = 1 << 27  # of float64: 1 GiB; ViT-g's 40 levels x 257 tokens x 1536 are 16 million
_OUTLIERS, _OUTLIER_GAIN = 3, 60.0


class Synthetic(nn.Module):
    """Compute y_k[t] = sum_c colour[t, c] * A_k[c] + B_k[t] with outlier channels; float64 sums in
    a fixed order, no BLAS."""

    name = "synthetic"
    weights = REGISTERED
    colours: Tensor  # (levels, 3, D)
    places: Tensor  # (levels, 1 + P, D)
    gain: Tensor  # (D,)

    def __init__(self, levels: int, tokens: int, width: int, size: int) -> None:
        super().__init__()
        self.input_px, self.patches, self.width, self.depth = size, tokens, width, levels
        self.pixel_mean, self.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.register_buffer(
            "colours", torch.from_numpy(_fixed_values("colours", levels, 3, width))
        )
        self.register_buffer(
            "places", torch.from_numpy(_fixed_values("places", levels, 1 + tokens, width))
        )
        gain = np.ones(width)
        gain[:: max(1, width // _OUTLIERS)][:_OUTLIERS] = _OUTLIER_GAIN
        self.register_buffer("gain", torch.from_numpy(gain))

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Map uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D) float32], attention (B, P) float32."""
        colour = self._colours(images)  # (B, 1 + P, 3) in [0, 1]
        ys = []
        for k in levels:
            y = self.places[k - 1] * 0.5
            # one product, one sum at a time: no fused or blocked arithmetic
            for channel in range(3):
                y = y + colour[..., channel, None] * self.colours[k - 1, channel]
            ys.append((y * self.gain).float())
        weight = (colour[:, 1:, 0] + 2 * colour[:, 1:, 1] + colour[:, 1:, 2] + 0.05) ** 2
        return ys, (0.8 * weight / (weight.cumsum(1)[:, -1:])).float()

    def _colours(self, images: Tensor) -> Tensor:
        """Compute exact block means: whole numbers summed, then one division. The first row is the
        whole picture's mean."""
        side = math.isqrt(self.patches)
        edge = images.shape[-1] // side
        blocks = images[..., : side * edge, : side * edge].to(torch.int64)
        sums = (
            blocks.unflatten(-1, (side, edge))
            .sum(-1)
            .unflatten(-2, (side, edge))
            .sum(-2)
            .flatten(-2)
        )  # (B, 3, P)
        rows = torch.cat([sums.sum(-1, keepdim=True), sums * self.patches], -1)
        return rows.transpose(1, 2).double() / (255 * edge * edge * self.patches)

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return a gamma and beta that are fixed for a width."""
        gamma, beta = (
            _fixed_values("gamma", 1, 1, self.width)[0, 0],
            _fixed_values("beta", 1, 1, self.width)[0, 0],
        )
        return {
            "gamma": (1 + gamma / 4).astype(np.float32),
            "beta": beta.astype(np.float32),
            "eps": np.array(1e-5, np.float32),
        }


def _fixed_values(name: str, *shape: int) -> npt.NDArray[np.float64]:
    """Return fixed numbers in [-1, 1): words of our own generator, so no version of a library
    changes them."""
    count = math.prod(shape)
    digest = rng.key_digests([f"synthetic:{name}:{shape}"])
    return (2 * rng.uniform(rng.words(digest, rng.stream("synthetic", 0), count)) - 1).reshape(
        shape
    )


def load(name: str, options: dict[str, Option], weights: str | None) -> Synthetic:
    """Load the teacher with the sizes that its options give; it has no weights."""
    if name != PREFIX:
        raise UsageError(
            f"teacher {name!r}: key=value options are needed, as in synthetic:levels=5,width=768"
        )
    if weights is not None:
        raise UsageError(
            f"teacher 'synthetic' is arithmetic and has no weights; {weights!r} is given: leave "
            "--weights out"
        )
    check_options(name, options, _DEFAULTS)
    values = {**_DEFAULTS, **options}
    bad = next((key for key, value in values.items() if type(value) is not int or value < 1), None)
    if bad is not None:
        raise UsageError(
            f"teacher 'synthetic': {bad}={values[bad]!r}; a whole number from 1 is needed"
        )
    levels, tokens, width, size = (
        int(values[key]) for key in ("levels", "tokens", "width", "size")
    )
    if math.isqrt(tokens) ** 2 != tokens or size < math.isqrt(tokens):
        raise UsageError(
            f"teacher 'synthetic': tokens={tokens}, size={size}; a square number of patches that "
            "fit is needed"
        )
    if size > MAX_PX:
        raise UsageError(f"teacher 'synthetic': size={size}; {MAX_PX} pixels at most")
    if levels * (4 + tokens) * width > _MOST_NUMBERS:
        raise UsageError(
            f"teacher 'synthetic': levels={levels}, tokens={tokens}, width={width} make more than "
            f"{_MOST_NUMBERS} numbers; give smaller sizes"
        )
    return Synthetic(levels, tokens, width, size)
