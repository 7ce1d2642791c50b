"""Where a step's views and targets come from: a cache, or the teacher in the loop.

Both give the same views, the same fields and the same masks for a picture and an epoch; only the storage between
teacher and student differs. n rows of training pictures, B batch, V stored views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from featcache import codecs, joining, rng, running, targets, teachers, views
from featcache.reader import Cache
from featcache.torch import raster, tensor
from featcache.views import stored_view
from student import masking
from student.config import RecipeConfig
from student.recipes import TargetSpec

I64 = npt.NDArray[np.int64]
Host = dict[str, Any]  # arrays of a batch on the host


class Targets(Protocol):
    """What the loader and the trainer ask of either kind."""

    policy: views.Policy

    def view(self, digests: rng.U64, epoch: int) -> I64:
        """Which view each picture shows in an epoch."""
        ...

    def fetch(self, at: I64, view: I64) -> Host:
        """Stored arrays of training pictures `at`; called in a loader thread."""
        ...

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        """`pixels` (S, S, 3) of sample i, and `teacher_pixels` where a teacher in the loop wants another size. Not
        called where `fetch` gave the pixels."""
        ...

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int) -> None:
        """Raise when rendered pixels are not those the teacher saw."""
        ...

    def complete(self, host: Host, device: torch.device) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        """Tensors on the device (features), and the arrays a mask is drawn from."""
        ...


@dataclass
class Cached:
    """Rows of a cache: `rows` (n,) joins training picture and cache row.

    Recipes get features in image order whatever the cache's. From a ranked cache the first `tokens` of each level are
    enough where the stored order is the mask: one range of bytes a level, and NaN for what was not read.
    """

    cache: Cache
    spec: TargetSpec
    rows: I64
    tolerance: float = 0.0  # mean difference of block means, in levels of 255, that is let pass
    tokens: int | None = None  # of each level, CLS first; None: all that are stored
    stored_pixels: bool = False  # take the pixels the cache stores, decode nothing

    def __post_init__(self) -> None:
        self.policy = views.from_dict(self.cache.identity["policy"])
        self.codec = codecs.CODECS[self.cache.identity["codec"]]
        coded = tuple(self.codec.arrays(self.cache.identity["teacher"]["width"]))
        self.coded = coded if "features" in self.spec.fields else ()
        self.ranked = bool(self.coded) and self.cache.identity["tokens"] == "ranked"
        order = ("mask_order",) if self.ranked else ()
        pixels = ("pixels",) if self.stored_pixels else views.Drawn._fields
        side = [field for field in self.spec.fields if field != "features"]
        self.reads = tuple(dict.fromkeys((*self.coded, *side, *order, *pixels)))

    def view(self, digests: rng.U64, epoch: int) -> I64:
        return stored_view(digests, epoch, self.cache.views)

    def fetch(self, at: I64, view: I64) -> Host:
        return self.cache.read(self.rows[at], view, self.reads, self.spec.levels or None, self.tokens)

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        parts = (host["crop"][i], host["flip"][i], host["jitter"][i])
        return {"pixels": views.render(picture, *parts, self.policy.size, self.policy.filter)}

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int) -> None:
        option = "--pixel-tolerance LEVELS"
        joining.prove(self.cache, int(self.rows[at]), view, pixels, self.tolerance, option)

    def complete(self, host: Host, device: torch.device) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        sources: dict[str, npt.NDArray[Any]] = {
            name: host[name] for name in ("attention", "mask_order") if name in self.spec.fields
        }
        if not self.coded:
            return {}, sources
        coded = {name: torch.from_numpy(host[name]).to(device, non_blocking=True) for name in self.coded}
        features = self.codec.decode(coded)
        if self.ranked:
            features = raster(features, tensor(host["mask_order"]).to(device, non_blocking=True))
        return {"features": features}, sources


@dataclass
class Online:
    """Views drawn on the spot and, where the recipe needs targets, the teacher run on them: no cache is read."""

    policy: views.Policy
    spec: TargetSpec
    teacher: teachers.Teacher | None
    views: int | None  # as many as a cache would hold; None: a fresh view each epoch
    order: str = "attentive"  # of `mask_order`

    def view(self, digests: rng.U64, epoch: int) -> I64:
        if self.views is None:
            return np.full(len(digests), epoch, np.int64)
        return stored_view(digests, epoch, self.views)

    def fetch(self, at: I64, view: I64) -> Host:
        return {}

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        size = np.array([(picture.height, picture.width)])
        drawn = views.draw(self.policy, digest[None], size, [view])
        parts = (drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0])
        out = {"pixels": views.render(picture, *parts, self.policy.size, self.policy.filter)}
        if self.teacher is not None and self.teacher.input_px != self.policy.size:
            out["teacher_pixels"] = views.render(picture, *parts, self.teacher.input_px, self.policy.filter)
        return out

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int) -> None:
        """Nothing is stored that the pixels could differ from."""

    def complete(self, host: Host, device: torch.device) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        if self.teacher is None:
            return {}, {}
        pixels = torch.from_numpy(host.get("teacher_pixels", host["pixels"])).to(device).permute(0, 3, 1, 2)
        with torch.no_grad(), running.applied(self.teacher):  # as a cache's teacher ran, whatever the student runs in
            ys, attention = self.teacher(pixels.contiguous(), self.spec.levels)
            features = torch.stack([targets.normalise(y)[0] for y in ys], 1) if ys else None
        weights = attention.float().cpu().numpy()
        sources = {"attention": weights}
        if "mask_order" in self.spec.fields:
            args = (host["digests"], host["view"], self.policy.seed)
            sources["mask_order"] = targets.mask_order(self.order, weights, *args)
        return ({} if features is None else {"features": features}), sources


def draw_masks(config: RecipeConfig, host: Host, sources: dict[str, npt.NDArray[Any]], seed: int) -> dict[str, Tensor]:
    """ids_keep and ids_masked of a batch, from (seed, epoch, key) and what the mask reads."""
    keep, masked = masking.draw(
        config.mask,
        digests=host["digests"],
        seed=seed,
        epoch=host["epoch"],
        n_visible=config.visible,
        n_patches=config.patches,
        **sources,
    )
    return {"ids_keep": torch.from_numpy(keep), "ids_masked": torch.from_numpy(masked)}
