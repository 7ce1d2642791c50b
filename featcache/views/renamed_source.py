"""Pictures of a source under other keys and in another order, as a cache knows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.pictures.passed_over import PassedOver, passed_over
from featcache.pictures.source import Source
from featcache.views import pixel_path

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RenamedSource:
    """Gives picture `order[i]` of a source as picture i, under `keys[i]`; decoded as the source
    does."""

    source: Source
    keys: Sequence[str] = field(repr=False)
    order: I64 = field(repr=False)
    left_out: tuple[str, ...] = ()  # pictures of the source that are not among these, by its keys

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def pixel_path(self) -> dict[str, Any]:
        return pixel_path.pixel_path(self.source)

    @property
    def passed_over(self) -> tuple[PassedOver, ...]:
        return passed_over(self.source)

    @cached_property
    def labels(self) -> I64 | None:
        labels = self.source.labels
        return None if labels is None else labels[self.order]

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.order)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.order[index]))

    def picture(self, index: int) -> Any:
        """Decode a picture. Raises PictureError."""
        return pixel_path.decode_picture(self.source, int(self.order[index]))

    def picture_size(self, index: int) -> tuple[int, int]:
        """Return height and width of a picture, from its header. Raises PictureError."""
        return pixel_path.picture_size(self.source, int(self.order[index]))
