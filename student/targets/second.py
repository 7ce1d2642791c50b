"""A second teacher's targets, beside the first's: its arrays are an added part of the cache, NAME/features and so on.

    featcache extract --teacher dino-b16 --levels last:1 --add --out CACHE

One level of it, derived as the first teacher's is, of all tokens in image order: `second` (B,1+P,E) of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.reading.cache import Cache
from featcache.targets import codecs
from featcache.targets import levels as targets
from featcache.torch import raster, tensor
from student.config import RecipeConfig, from_overrides
from student.recipes import TargetSpec

I64 = npt.NDArray[np.int64]
Host = dict[str, Any]


@dataclass
class Second:
    """What is read of the second teacher, and what becomes of it."""

    cache: Cache
    spec: TargetSpec

    def __post_init__(self) -> None:
        self.place = f"{self.spec.second}/"
        identity = self.cache.manifest_of(self.spec.second)["identity"]
        self.codec = codecs.CODECS[identity["codec"]]
        self.coded = tuple(self.codec.arrays(identity["teacher"]["width"]))
        self.ranked = identity["tokens"] == "ranked"
        tail = self.cache.tail(self.spec.second) if self.spec.derive else {}
        self.tail = {name: torch.from_numpy(value) for name, value in tail.items()}
        self.stats = "eps" in tail and float(tail["eps"]) != float(np.float32(targets.EPS))
        names = (*self.coded, *(["feature_stats"] if self.stats else []), *(["mask_order"] if self.ranked else []))
        self.reads = tuple(self.place + name for name in names)

    def fetch(self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None) -> Host:
        """Its stored arrays of the rows, by the names that the cache has for them, in the memory of `out`."""
        memory = None if out is None else {name: out[name] for name in self.reads}
        return self.cache.read(rows, view, self.reads, (self.spec.second_level,), None, memory)

    def complete(self, host: Host, device: torch.device) -> dict[str, Tensor]:
        """`second` on the device."""
        coded = {name: self._tensor(host, name, device) for name in self.coded}
        h = self._in_raster(self.codec.decode(coded), host, device)
        if not self.spec.derive:
            return {"second": h}
        std = self._in_raster(self._tensor(host, "feature_stats", device), host, device) if self.stats else None
        tail = {name: value.to(device) if value.ndim else value for name, value in self.tail.items()}
        return {"second": targets.derive(self.spec.derive, h, tail, None if std is None else std[..., 1:])}

    def _tensor(self, host: Host, name: str, device: torch.device) -> Tensor:
        return tensor(host[self.place + name]).to(device, non_blocking=True)

    def _in_raster(self, values: Tensor, host: Host, device: torch.device) -> Tensor:
        """(B,1,T,...) as stored -> (B,T,...) in image order; a ranked teacher's order is its own."""
        return (raster(values, self._tensor(host, "mask_order", device)) if self.ranked else values)[:, 0]


def facts(kind: type[RecipeConfig], overrides: Sequence[str], cache: Cache) -> dict[str, Any]:
    """What a cache says of the second teacher that a configuration names (`joint`), where it has one."""
    if "joint" not in {field.name for field in dataclasses.fields(kind)}:
        return {}
    name = getattr(from_overrides(kind, overrides), "joint")  # noqa: B009  # of some recipes only
    if name not in cache.teachers[1:]:
        return {}
    teacher = cache.manifest_of(name)["identity"]["teacher"]
    return {"joint_depth": teacher["depth"], "joint_width": teacher["width"]}


def missing(cache: Cache, spec: TargetSpec) -> list[str]:
    """Why a cache that has the second teacher's arrays does not serve, in words."""
    name = spec.second
    if not name or f"{name}/features" not in cache.fields:  # which the missing field says
        return []
    identity = cache.manifest_of(name)["identity"]
    levels, views, patches = cache.levels_of(name), cache.views_of(name), identity["teacher"]["patches"]
    found = {
        f"level {spec.second_level} of {name} is missing, it has {', '.join(map(str, levels))}": spec.second_level
        not in levels,
        f"{views} of its {cache.views} views have {name}": views < cache.views,
        f"{name} has {patches} patches, {spec.patches} are needed": patches != spec.patches,
        f"of {name} it keeps {identity.get('keep')} patches, and others may be visible": keeps_few(cache, spec),
    }
    return [text for text, lacks in found.items() if lacks]


def keeps_few(cache: Cache, spec: TargetSpec) -> bool:
    """Whether only some patches of the second teacher are stored; in its own order, which is not the mask's."""
    there = spec.second and f"{spec.second}/features" in cache.fields
    return bool(there) and "keep" in cache.manifest_of(spec.second)["identity"]
