"""A tokenizer takes a teacher's place in an extraction (CAE's DALL-E encoder, METHODS 4.2): its
token ids are added to a cache of features.

    featcache extract --add --teacher dvae --weights FILE --images SRC --out CACHE

`TokenizerTeacher` makes a teacher of what a family of tokenizers loads. Its part of the cache has
one array, `token_ids`, read as `NAME/token_ids`. Crops are the cache's own, rendered from the
stored boxes at the tokenizer's size with the tokenizer's filter.

B batch, S = input_px, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from featcache.models.contract import Tokenizer

FIELD = "token_ids"
LEVELS = (1,)  # its only block, as the manifest has it
LARGEST = 2**16


class TokenizerTeacher:
    """Wrap a tokenizer with the facts that an extraction asks of a teacher.

    The width is the vocabulary's size. There is one level, no tail, and pixels go in as they are,
    since a tokenizer maps them itself.
    """

    depth = 1

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.name, self.weights = tokenizer.name, tokenizer.weights
        self.input_px, self.patches = tokenizer.input_px, tokenizer.patches
        self.width, self.filter = tokenizer.vocabulary, tokenizer.pixel_filter
        self.pixel_mean, self.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.code: str = getattr(tokenizer, "code", "")  # of a user's own file, for its hash

    def ids(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> (B, P) whole numbers from 0 to width - 1, patches in raster
        order."""
        return self.tokenizer(images)

    def __call__(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        raise TypeError(f"tokenizer {self.name!r} gives token ids and no levels")

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.tokenizer.state_dict()

    def to(self, device: str) -> TokenizerTeacher:
        self.tokenizer.to(device)
        return self


def network_of(teacher: Any) -> Any:
    """Return what computes: the tokenizer of a `TokenizerTeacher`, any other teacher itself.

    Compilation, precision and the weight hash look at a network's modules and parameters.
    """
    return teacher.tokenizer if isinstance(teacher, TokenizerTeacher) else teacher
