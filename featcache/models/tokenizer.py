"""Discrete tokens: a tokenizer in place of a teacher (CAE's DALL-E encoder, METHODS 4.2), added to
a cache of features.

    featcache extract --add --teacher dvae --weights FILE --images SRC --out CACHE

What runs in place of a teacher has `ids` and `filter`; all else is as for a teacher: name, weights,
input_px, patches, width (the vocabulary's size), depth 1, pixel_mean, pixel_std, an empty `tail`.
`as_teacher` makes it of what a family of tokenizers loads. Its part of the cache has one array,
`token_ids`, read as `NAME/token_ids`. Crops are the cache's own, rendered from the stored boxes at
the tokenizer's size with the tokenizer's filter.

B batch, S = input_px, P patches.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

FIELD = "token_ids"
LEVELS = (1,)  # its only block, as the manifest has it
LARGEST = 2**16


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer has beside a teacher's facts."""

    filter: str  # by which a crop is resized for it, such as `lanczos`

    def ids(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> (B, P) whole numbers from 0 to width - 1, patches in raster
        order."""
        ...


def as_teacher(network: Any) -> Any:
    """A family's tokenizer (`teachers.Tokenizer`), with what the extraction asks of a teacher; the
    same object."""
    network.ids, network.tail = lambda images: network(images), dict
    network.filter, network.width, network.depth = network.pixel_filter, network.vocabulary, 1
    # it maps pixels itself
    network.pixel_mean, network.pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return network
