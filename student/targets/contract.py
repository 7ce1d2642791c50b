"""Where a step's views and targets come from: a cache, or the teacher in the loop.

Both give the same views, the same fields and the same masks for a picture and an epoch; only the storage between
teacher and student differs. n rows of training pictures, B batch, V stored views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor

from featcache import rng, teachers
from featcache.errors import UsageError, UserError
from featcache.models import precision as running
from featcache.reading import join as joining
from featcache.reading.cache import Cache
from featcache.reading.crop_range import Turns
from featcache.targets import codecs
from featcache.targets import levels as targets
from featcache.torch import raster, tensor
from featcache.views import draw as views
from featcache.views.draw import stored_view
from student import masking
from student.config import RecipeConfig
from student.models import vit
from student.recipes import TargetSpec
from student.targets import buffers
from student.targets.second import Second

I64 = npt.NDArray[np.int64]
Host = dict[str, Any]  # arrays of a batch on the host
Moments = Callable[[I64, I64], npt.NDArray[np.float32]]  # of training pictures (n,) in views (n,)


class Stored(Protocol):
    """Rows that answer in place of the cache."""

    def fetch(self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None) -> Host:
        """Arrays of training pictures `at`."""
        ...

    def take(self, name: str, at: I64, view: I64) -> npt.NDArray[Any]:
        """One of them."""
        ...


class Targets(Protocol):
    """What the loader and the trainer ask of either kind."""

    policy: views.Policy
    is_stored: bool  # features come from storage, not from a teacher in the loop
    stored_pixels: bool  # so do pixels, and no picture is decoded

    @property
    def only_read(self) -> bool:
        """Whether all of a batch comes from files, as it lies there."""
        ...

    @property
    def moments(self) -> Moments | None:
        """Mean and variance (L, 2) of each level over training pictures in their views, the whole batch of a step; None
        where they are not asked for, or known only when the teacher has run."""
        ...

    def layout(self) -> buffers.Layout:
        """Shape and type of one sample of every array of a batch."""
        ...

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        """Which view each picture shows when it has been shown `rounds` times before: its epoch, where every picture
        is shown once in each."""
        ...

    def fetch(self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None) -> Host:
        """Stored arrays of training pictures `at`, in the memory of `out`; called in a loader thread."""
        ...

    def noted(self, at: I64) -> dict[str, int]:
        """What a row of metrics says of a step's pictures."""
        ...

    def sources(self, host: Host) -> dict[str, npt.NDArray[Any]]:
        """The arrays a mask is drawn from, where they are stored."""
        ...

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        """`pixels` (S, S, 3) of sample i, and `teacher_pixels` where a teacher in the loop wants another size. Not
        called where pixels are stored."""
        ...

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        """(m,) of the pixels the teacher saw; None where none are stored, and nothing is checked."""
        ...

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        """Raise when rendered pixels, of the `stored` hash, are not those the teacher saw."""
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
    turns: Turns | None = None  # of the views that are shown, where not all are
    is_stored = True

    def __post_init__(self) -> None:
        self.policy = views.from_dict(self.cache.identity["policy"])
        self.codec = codecs.CODECS[self.cache.identity["codec"]]
        coded = tuple(self.codec.arrays(self.cache.identity["teacher"]["width"]))
        self.coded = coded if "features" in self.spec.fields else ()
        self.ranked = bool(self.coded) and self.cache.identity["tokens"] == "ranked"
        order = ("mask_order",) if self.ranked else ()
        pixels = ("pixels",) if self.stored_pixels else views.Drawn._fields
        self.tail = as_tensors(self.cache.tail()) if self.spec.derive else {}
        stats = ("feature_stats",) if self.tail and float(self.tail["eps"]) != float(np.float32(targets.EPS)) else ()
        side = [field for field in (*self.spec.fields, *stats) if field.rpartition("/")[2] != "features"]
        self.second = Second(self.cache, self.spec) if self.spec.second else None
        self.own = tuple(dict.fromkeys((*self.coded, *side, *order, *pixels)))
        self.reads = self.own if self.second is None else (*self.own, *self.second.reads)
        self.stats = "feature_stats" in self.own
        self.resident: Stored | None = None

    def layout(self) -> buffers.Layout:
        return dict(self.stored_layout()) | ({} if self.stored_pixels else _pixels(self.policy.size))

    def stored_layout(self) -> buffers.Layout:
        """Shape and type of one sample of all that is read of the cache."""
        nothing = self._read(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
        return {name: (array.shape[1:], array.dtype) for name, array in nothing.items()}

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        return self.turns.view(digests, rounds) if self.turns else stored_view(digests, rounds, self.cache.views)

    @property
    def only_read(self) -> bool:
        return self.stored_pixels and self.resident is None

    def fetch(self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None) -> Host:
        return self._read(self.rows[at], view, out) if self.resident is None else self.resident.fetch(at, view, out)

    def _read(self, rows: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None) -> Host:
        memory = None if out is None else {name: out[name] for name in self.own}
        host = self.cache.read(rows, view, self.own, self.spec.levels or None, self.tokens, memory)
        return host if self.second is None else host | self.second.fetch(rows, view, out)

    @property
    def moments(self) -> Moments | None:
        return self._moments if self.spec.moments else None

    def _moments(self, at: I64, view: I64) -> npt.NDArray[np.float32]:
        field, levels = "feature_stats", self.spec.levels or None
        known = self.resident
        stats = known.take(field, at, view) if known else self.cache.read(self.rows[at], view, (field,), levels)[field]
        return targets.moments(targets.sums(stats, self.cache.identity["teacher"]["width"]))

    def noted(self, at: I64) -> dict[str, int]:
        return {}

    def sources(self, host: Host) -> dict[str, npt.NDArray[Any]]:
        return {name: host[name] for name in ("attention", "mask_order") if name in self.spec.fields}

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        parts = (host["crop"][i], host["flip"][i], host["jitter"][i])
        return {"pixels": views.render(picture, *parts, self.policy.size, self.policy.filter)}

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        # Its own checksum is left to `check`, which looks into every difference.
        return self.cache.read(self.rows[at], view, ("pixel_hash",), check=False)["pixel_hash"]

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        if views.pixel_hash(pixels) == stored:
            return
        option = "--pixel-tolerance LEVELS"
        joining.prove(self.cache, int(self.rows[at]), view, pixels, self.tolerance, option)

    def complete(self, host: Host, device: torch.device) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        out = {}
        for field in self.spec.fields:
            if field.rpartition("/")[2] == "token_ids":  # a tokenizer's part of a cache: NAME/token_ids
                out["token_ids"] = _token_ids(host[field], self.spec.vocabulary).to(device, non_blocking=True)
        if self.coded:
            coded = {name: torch.from_numpy(host[name]).to(device, non_blocking=True) for name in self.coded}
            features = self._in_raster(self.codec.decode(coded), host, device)
            stats = self._in_raster(_copied(host["feature_stats"], device), host, device) if self.stats else None
            self.tail = on_device(self.tail, device)
            seen = host["masks"]["ids_keep"].to(device) if self.spec.visible_only and "masks" in host else None
            out |= derived(self.spec, features, stats, self.tail, seen)
        if "moments" in host:
            out["moments"] = _copied(host["moments"], device)
        if self.second is not None:
            out |= self.second.complete(host, device)
        return out, self.sources(host)

    def _in_raster(self, values: Tensor, host: Host, device: torch.device) -> Tensor:
        """(B,L,T,...) as stored -> in image order."""
        return raster(values, tensor(host["mask_order"]).to(device, non_blocking=True)) if self.ranked else values


@dataclass
class Online:
    """Views drawn on the spot and, where the recipe needs targets, the teacher run on them: no cache is read."""

    policy: views.Policy
    spec: TargetSpec
    teacher: teachers.Teacher | None
    views: int | None  # as many as a cache would hold; None: a fresh view each epoch
    order: str = "attentive"  # of `mask_order`
    turns: Turns | None = None  # of the views of a cache that are shown, where not all are
    codec: codecs.Codec | None = None  # of a cache, through which features go as if they had been stored
    is_stored = False
    stored_pixels = only_read = False
    moments = None

    def __post_init__(self) -> None:
        lacking = set(self.spec.fields) - {"features", "feature_stats", "attention", "mask_order"}
        if lacking:
            raise UsageError(
                f"--teacher online computes no {', '.join(sorted(lacking))}; allowed: features and what derives from "
                "them; give a cache that holds it with --cache"
            )
        self.tail = as_tensors(self.teacher.tail()) if self.teacher is not None and self.spec.derive else {}

    def layout(self) -> buffers.Layout:
        return _pixels(self.policy.size) | (_pixels(self.teacher_px, "teacher_pixels") if self.teacher_px else {})

    @property
    def teacher_px(self) -> int:
        """The size the teacher wants where it is not the student's, else 0."""
        return self.teacher.input_px if self.teacher is not None and self.teacher.input_px != self.policy.size else 0

    def view(self, digests: rng.U64, rounds: int | I64) -> I64:
        if self.turns is not None:
            return self.turns.view(digests, rounds)
        if self.views is None:
            return np.broadcast_to(np.asarray(rounds, np.int64), len(digests)).copy()
        return stored_view(digests, rounds, self.views)

    def fetch(self, at: I64, view: I64, out: Mapping[str, npt.NDArray[Any]] | None = None) -> Host:
        return {}

    def noted(self, at: I64) -> dict[str, int]:
        return {}

    def sources(self, host: Host) -> dict[str, npt.NDArray[Any]]:
        return {}

    def render(self, picture: Image.Image, host: Host, i: int, key: str, digest: rng.U64, view: int) -> dict[str, Any]:
        size = np.array([(picture.height, picture.width)])
        drawn = views.draw(self.policy, digest[None], size, [view])
        parts = (drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0])
        out = {"pixels": views.render(picture, *parts, self.policy.size, self.policy.filter)}
        if self.teacher_px:
            out["teacher_pixels"] = views.render(picture, *parts, self.teacher_px, self.policy.filter)
        return out

    def hashes(self, at: I64, view: I64) -> npt.NDArray[np.uint64] | None:
        return None

    def check(self, pixels: npt.NDArray[np.uint8], at: int, view: int, stored: int) -> None:
        """Nothing is stored that the pixels could differ from."""

    def complete(self, host: Host, device: torch.device) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
        if self.teacher is None:
            return {}, {}
        pixels = torch.from_numpy(host.get("teacher_pixels", host["pixels"])).to(device).permute(0, 3, 1, 2)
        with torch.no_grad(), running.applied(self.teacher):  # as a cache's teacher ran, whatever the student runs in
            ys, attention = self.teacher(pixels.contiguous(), self.spec.levels)
            pairs = [targets.normalise(y) for y in ys]
        weights = attention.float().cpu().numpy()
        sources = {"attention": weights}
        if "mask_order" in self.spec.fields:
            args = (host["digests"], host["view"], self.policy.seed)
            sources["mask_order"] = targets.mask_order(self.order, weights, *args)
        if not pairs:
            return {}, sources
        features, stats = (torch.stack(each, 1) for each in zip(*pairs, strict=True))
        features = features if self.codec is None else self.codec.decode(self.codec.encode(features))
        self.tail = on_device(self.tail, device)
        out = derived(self.spec, features, stats, self.tail)
        return out | ({"moments": self._moments(stats)} if self.spec.moments else {}), sources

    def _moments(self, stats: Tensor) -> Tensor:
        """stats (B,L,1+P,2) -> (L,2) over the batches of all processes, which all come here. A step has one micro-batch
        (origin.choose sees to it): the others' targets would not be known yet."""
        assert self.teacher is not None
        own = torch.from_numpy(targets.sums(stats.cpu().numpy(), self.teacher.width)).to(stats.device)
        return tensor(targets.moments(reduce(own, "sum").cpu().numpy())).to(stats.device)


def _pixels(size: int, name: str = "pixels") -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return {name: ((size, size, 3), np.dtype(np.uint8))}


def as_tensors(tail: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
    """A teacher's tail for `derived`."""
    return {name: torch.from_numpy(value) for name, value in tail.items()}


def on_device(tail: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tail where the features are; its one number stays on the host, which looks at it."""
    return {name: value.to(device) if value.ndim else value for name, value in tail.items()}


def derived(
    spec: TargetSpec,
    features: Tensor,
    stats: Tensor | None,
    tail: Mapping[str, Tensor],
    ids_keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """features (B,L,1+P,D), stats (B,L,1+P,2) -> what a recipe takes: the levels, and their stats where it asks for
    them; or `targets` (B,1+P,E) derived from the only level. For these `stats`, mean and divisor, are looked at where
    the teacher's eps is not the cache's; with `ids_keep` (B,V) those of CLS and these patches, the rest is NaN: a
    projection of 197 tokens for 50 that are looked at costs a percent of kd's step."""
    if not spec.derive:
        asked = {"feature_stats": stats} if stats is not None and "feature_stats" in spec.fields else {}
        return {"features": features, **asked}
    assert features.shape[1] == 1, features.shape
    h, std = features[:, 0], None if stats is None else stats[:, 0, :, 1:]
    if ids_keep is None:
        return {"targets": targets.derive(spec.derive, h, tail, std)}
    ids = vit.with_cls(ids_keep)
    few = targets.derive(spec.derive, vit.select(h, ids), tail, None if std is None else vit.select(std, ids))
    out = few.new_full((*h.shape[:2], few.shape[-1]), float("nan"))
    return {"targets": out.scatter_(1, ids.unsqueeze(-1).expand(-1, -1, few.shape[-1]), few)}


def _copied(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """On the device, and never the host's own memory, which is filled again: on a CPU nothing else would copy it."""
    return tensor(values).to(device, non_blocking=True, copy=True)


def _token_ids(ids: npt.NDArray[np.unsignedinteger], vocabulary: int) -> Tensor:
    """ids (B,P) as stored -> int64; an id that the recipe has no class for is refused."""
    if ids.size and int(ids.max()) >= vocabulary:
        raise UserError(
            f"cannot predict token id {int(ids.max())} of the cache: vocabulary={vocabulary}; allowed: a vocabulary "
            "above every id; give vocabulary=N of the tokenizer that made them"
        )
    return tensor(ids).long()


def draw_masks(config: RecipeConfig, host: Host, sources: dict[str, npt.NDArray[Any]], seed: int) -> dict[str, Tensor]:
    """ids_keep and ids_masked of a batch, from (seed, round, key) and what the mask reads."""
    keep, masked = masking.draw(
        config.mask,
        digests=host["digests"],
        seed=seed,
        epoch=host["round"],
        n_visible=config.visible,
        n_patches=config.patches,
        **sources,
    )
    return {"ids_keep": torch.from_numpy(keep), "ids_masked": torch.from_numpy(masked)}
