"""One teacher's features of a cache are read: `FeatureReader` names their arrays and makes them
float levels in image order.

    cache.read(rows, view, reader.fields)  ->  reader.to_device(...)
                                           ->  reader.features(...)   (B, L, 1 + P, D)

A codec may keep a level in several arrays, a ranked cache needs the order of its tokens, and a
derived target may need the stored statistics: `fields` names them all. B batch, L levels, T tokens,
P patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UserError
from featcache.reading.tensors import copy_to_device, tail_tensors, to_image_order
from featcache.targets.codecs import Codec, get_codec
from featcache.targets.derived import needs_stats


def _codec_of(about: Mapping[str, Any]) -> Codec:
    """Return the codec of a manifest. Raises UserError where its arrays are not those the codec
    writes."""
    identity = about["identity"]
    codec = get_codec(identity["codec"])
    for name, (dtype, item, _) in codec.arrays(identity["teacher"]["width"]).items():
        stored = about["arrays"].get(name, {"dtype": dtype, "item": [0, 0, *item]})
        if (stored["dtype"], tuple(stored["item"][2:])) != (dtype, item):
            raise UserError(
                f"array {name} of the cache of {identity['teacher']['name']} is "
                f"{stored['dtype']} {stored['item']}, codec {identity['codec']} writes {dtype} "
                f"{list(item)} of each token; extract again"
            )
    return codec


class HasTeachers(Protocol):
    """A `Cache` as `FeatureReader` sees it."""

    @property
    def teachers(self) -> list[str]: ...
    def manifest_of(self, teacher: str) -> dict[str, Any]: ...
    def levels_of(self, teacher: str) -> tuple[int, ...]: ...
    def tail(self, teacher: str | None = None) -> dict[str, npt.NDArray[np.float32]]: ...
    def codec_state(self, teacher: str, levels: Sequence[int]) -> dict[str, Tensor]: ...


def _take_tokens(values: Tensor, at: Tensor) -> Tensor:
    """Take tokens `at` (B, V) of values (B, L, T, *item)."""
    index = at.reshape(len(at), 1, -1, *[1] * (values.ndim - 3))
    return values.gather(2, index.expand(-1, values.shape[1], -1, *values.shape[3:]))


class FeatureReader:
    """Names the stored arrays of one teacher's levels and decodes them.

    `teacher`: one of `cache.teachers`, the cache's own by default. `levels`: those that will be
    read, in their order; all that are stored by default. `derive`: the target that is made of a
    level, which needs the teacher's tail, and the stored statistics where it is y or the tail
    `needs_stats`. `stats`: the statistics are read in any case.
    """

    def __init__(
        self,
        cache: HasTeachers,
        teacher: str | None = None,
        *,
        levels: Sequence[int] | None = None,
        derive: str = "",
        stats: bool = False,
    ) -> None:
        teacher = teacher or cache.teachers[0]
        identity = cache.manifest_of(teacher)["identity"]
        prefix = "" if teacher == cache.teachers[0] else f"{teacher}/"
        self.codec_name: str = identity["codec"]
        self.codec = _codec_of(cache.manifest_of(teacher))
        self._coded = {
            f"{prefix}{part}": part for part in self.codec.arrays(identity["teacher"]["width"])
        }
        self.state = cache.codec_state(teacher, levels or cache.levels_of(teacher))
        self._features_field = f"{prefix}features"
        tail = cache.tail(teacher) if derive else {}
        self.tail = tail_tensors(tail)
        of_stats = derive == "y" or (derive not in ("", "h") and needs_stats(tail))
        self.stats_field = f"{prefix}feature_stats" if stats or of_stats else ""
        self.order_field = f"{prefix}mask_order" if identity["tokens"] == "ranked" else ""

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays to read, by the names that `Cache.read` takes."""
        return (*self._coded, *filter(None, (self.stats_field, self.order_field)))

    def to_device(
        self, host: Mapping[str, npt.NDArray[Any] | Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        """Move the arrays of `fields` to the device, without waiting for the copies; those that are
        there already stay.

        Statistics may go on into a batch as they are, so they are never the host's own memory,
        which is filled again.
        """
        return {
            name: copy_to_device(host[name], device, own=name == self.stats_field)
            for name in self.fields
        }

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Decode arrays (..., L, T, *item) to (..., L, T, D) float32, tokens as they are stored."""
        coded = {part: arrays[name] for name, part in self._coded.items()}
        self._move_state(coded["features"].device)
        return self.codec.decode(coded, self.state)

    def through_codec(self, h: Tensor) -> Tensor:
        """Encode levels (..., L, T, D) and decode them again, as if they had been stored."""
        self._move_state(h.device)
        return self.codec.decode(self.codec.encode(h, self.state), self.state)

    def residual(self, h: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return what is left of levels (..., L, T, D) without the mean that the codec knows."""
        return h - self.state["mean"][:, None].cpu().numpy() if self.state else h

    def _move_state(self, device: torch.device) -> None:
        """Move the codec's state; once, with the first batch."""
        self.state = {name: values.to(device) for name, values in self.state.items()}

    def features(self, arrays: Mapping[str, Tensor], visible: Tensor | None = None) -> Tensor:
        """Decode arrays (B, L, T, *item) to (B, L, 1 + P, D) float32 in image order, NaN where a
        token was not read.

        With `visible` (B, V), patches in image order, a codec whose decoding takes time decodes
        [CLS] and these alone, and the others are NaN.
        """
        tokens = arrays[self._features_field].shape[2]
        if visible is None or not self.codec.tolerance or tokens <= 1 + visible.shape[1]:
            return self._in_image_order(self.decode(arrays), arrays)
        return self._decode_visible(arrays, visible.long())

    def _decode_visible(self, arrays: Mapping[str, Tensor], visible: Tensor) -> Tensor:
        first, tokens = arrays[self._features_field], arrays[self._features_field].shape[2]
        wanted = patches = F.pad(1 + visible, (1, 0))  # [CLS] is token 0
        count = tokens
        if self.order_field:  # where each patch lies
            order = arrays[self.order_field].long()
            wanted = F.pad(1 + order.argsort(1).gather(1, visible), (1, 0))
            count = 1 + order.shape[1]
        read = wanted < tokens
        at = torch.where(read, wanted, 0)
        chosen = {name: _take_tokens(arrays[name], at) for name in self._coded}
        h = torch.where(read[:, None, :, None], self.decode(chosen), torch.nan)
        out = h.new_full((*first.shape[:2], count, h.shape[-1]), torch.nan)
        return out.scatter_(2, patches[:, None, :, None].expand_as(h), h)

    def stats(self, arrays: Mapping[str, Tensor]) -> Tensor | None:
        """Return mean and std (B, L, 1 + P, 2) in image order; None where they are not among
        `fields`."""
        return self._in_image_order(arrays[self.stats_field], arrays) if self.stats_field else None

    def _in_image_order(self, values: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        return to_image_order(values, arrays[self.order_field]) if self.order_field else values
