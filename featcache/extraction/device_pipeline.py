"""A batch on its way: to the device, through the teacher, encoded, back to the host, and made into what is stored.

    launch   the caller's thread        pixels into pinned memory and over (copy), the teacher (teacher)
    land     a thread of its own        levels normalised and encoded (encode), back over (copy)
    items    the same                   orders and checksums (encode)

On CUDA each direction of copying has a stream beside the teacher's, and events put them in order: `launch` returns
while the device still works, so the next batch is copied and this one encoded meanwhile. On a CPU the same calls block
and only the threads overlap. The kernels and their order are the same for any overlap, and so are the bytes.

B batch (views), n of them kept, V views a picture, S pixels, L levels, T tokens, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import rng
from featcache.errors import UserError
from featcache.extraction.plan import Plan
from featcache.extraction.progress import Progress
from featcache.extraction.rendering import Rendered
from featcache.models import precision as running
from featcache.models import tokenizer
from featcache.storage.statistics import OfFeatures
from featcache.targets import codecs
from featcache.targets import levels as targets
from featcache.teachers import Teacher
from featcache.views import draw as views

Batch = list[tuple[Rendered, int]]  # (picture, view)
Host = dict[str, npt.NDArray[Any]]
FP16_LARGEST = 65504


@dataclass(frozen=True)
class Flight:
    """A batch whose answer may still be under way on the device."""

    batch: Batch
    answer: tuple[Tensor, ...]  # y_k (B, T, D) of each level and attention (B, P); or ids (B, P)
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)  # CUDA: (stage, event, event)


@dataclass(frozen=True)
class Encoded:
    """A batch on the host, as it will be stored, but for the order of tokens."""

    tokens: Host  # the codec's arrays, `features` (n, L, T, ...) among them, and `feature_stats` (n, L, T, 2)
    attention: npt.NDArray[np.float32]  # (n, P)
    about: OfFeatures  # h before encoding


class Lane:
    """The way of one plan's batches, with the streams they travel on."""

    def __init__(self, plan: Plan, batch_size: int, progress: Progress) -> None:
        self.plan, self.batch_size, self.progress = plan, batch_size, progress
        self.device = running.device_of(plan.teacher)
        self._cuda = self.device.type == "cuda"
        self._inward = torch.cuda.Stream(self.device) if self._cuda else None
        self._outward = torch.cuda.Stream(self.device) if self._cuda else None

    def launch(self, batch: Batch) -> Flight:
        """Start a batch; the last of a shard is padded with its last view, so that it is as large as the others."""
        spans: list[tuple[str, Any, Any]] = []
        with self._stage("copy", self._inward, spans):
            pixels = self._to_device(batch)
        main = torch.cuda.current_stream(self.device) if self._cuda else None
        self._hand_over([pixels], spans, main)
        with self._stage("teacher", main, spans):
            answer = ask(self.plan.teacher, pixels, self.plan.levels)
        return Flight(batch, answer, spans)

    def land(self, flight: Flight) -> Host:
        """The answer, encoded on the device, on the host; waits for it."""
        self._hand_over(flight.answer, flight.spans, self._outward)
        with self._stage("encode", self._outward, flight.spans):
            coded = encode(self.plan, flight.answer, len(flight.batch))
        with self._stage("copy", self._outward, flight.spans):
            host = {name: self._to_host(values) for name, values in coded.items()}
        if flight.spans:
            flight.spans[-1][2].synchronize()
        for stage, begin, end in flight.spans:
            self.progress.add(stage, begin.elapsed_time(end) / 1000)
        return {name: values.numpy() for name, values in host.items()}

    def _to_device(self, batch: Batch) -> Tensor:
        """(B, 3, S, S) uint8."""
        size, kind = self.plan.input_px, (self.plan.input_px, self.plan.filter)
        host = torch.empty((self.batch_size, size, size, 3), dtype=torch.uint8, pin_memory=self._cuda)
        places = host.numpy()
        for i in range(self.batch_size):
            picture, view = batch[min(i, len(batch) - 1)]
            places[i] = picture.pixels[kind][view]
        return host.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()

    def _to_host(self, values: Tensor) -> Tensor:
        if not self._cuda:
            return values.cpu()
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _hand_over(self, values: Sequence[Tensor], spans: list[tuple[str, Any, Any]], stream: Any) -> None:
        """`stream` goes on where the last stage ended, and the values' memory is not given away before it is done."""
        if stream is not None:
            stream.wait_event(spans[-1][2])
            for each in values:
                each.record_stream(stream)

    @contextmanager
    def _stage(self, name: str, stream: Any, spans: list[tuple[str, Any, Any]]) -> Iterator[None]:
        """Run on a stream between two of its events; without one, on the clock."""
        if stream is None:
            with self.progress.stage(name):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record(stream)
            yield
            end.record(stream)
        spans.append((name, begin, end))


# ------------------------------------------------------------ on the device


@torch.no_grad()
def ask(teacher: Teacher, pixels: Tensor, levels: Sequence[int]) -> tuple[Tensor, ...]:
    """uint8 (B, 3, S, S) -> y_k (B, T, D) of each level, then attention (B, P); of a tokenizer its ids (B, P)."""
    with running.applied(teacher):
        if isinstance(teacher, tokenizer.Tokenizer):
            return (teacher.ids(pixels),)
        ys, attention = teacher(pixels, levels)
    return (*ys, attention)


@torch.no_grad()
def encode(plan: Plan, answer: tuple[Tensor, ...], count: int) -> dict[str, Tensor]:
    """What is needed on the host of the first `count` of an answer."""
    if plan.is_tokenizer:
        return {tokenizer.FIELD: answer[0][:count]}
    *ys, attention = answer
    return {**_levels(ys, plan.codec, count), "attention": attention[:count].float()}


def _levels(ys: Sequence[Tensor], codec: str, count: int) -> dict[str, Tensor]:
    """y_k (B, T, D) -> the codec's arrays and `feature_stats` (n, L, T, ...); of h its range (L, 2) and mean norms
    (n, L); whether all is `finite` (n, L)."""
    coded, stats, ranges, norms = [], [], [], []
    for y in ys:
        h, stat = targets.normalise(y[:count])
        ranges.append(torch.stack(h.aminmax()))
        norms.append(torch.linalg.vector_norm(h, dim=-1).mean(-1))
        coded.append(codecs.CODECS[codec].encode(h))
        stats.append(stat)
    arrays = {name: torch.stack([level[name] for level in coded], 1) for name in coded[0]}
    about = {"range": torch.stack(ranges).double(), "norms": torch.stack(norms, 1).float()}
    stacked = torch.stack(stats, 1)
    return {**arrays, "feature_stats": stacked, **about, "finite": codecs.in_range(arrays, stacked)}


def compute(
    teacher: Teacher, pixels: Tensor, levels: Sequence[int], codec: str, count: int
) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """uint8 (B, 3, S, S) -> the codec's arrays (n, L, T, ...), statistics (n, L, T, 2), attention (n, P), facts on h,
    all where the teacher is: what an extraction stores of pixels, for those who compare."""
    *ys, attention = ask(teacher, pixels, levels)
    with torch.no_grad():
        rest = _levels(ys, codec, count)
    coded = {name: rest.pop(name) for name in codecs.CODECS[codec].arrays(teacher.width)}
    return coded, rest.pop("feature_stats"), attention[:count].float(), rest


# ------------------------------------------------------------ on the host


def encoded(plan: Plan, batch: Batch, host: Host) -> Encoded:
    """A landed answer, once its numbers are found to be numbers; else a UserError that names the picture."""
    for row, level in np.argwhere(~host["finite"])[:1].tolist():
        raise UserError(
            f"teacher {plan.teacher.name!r} gave non-finite features for picture {_of(plan, batch, row)}, level "
            f"{plan.levels[level]}{_cure(plan)}"
        )
    weights = host["attention"]
    good = np.isfinite(weights).all(1) & (weights >= 0).all(1) & (weights.sum(1) <= 1 + 1e-3)
    for row in np.flatnonzero(~good)[:1].tolist():
        raise UserError(
            f"teacher {plan.teacher.name!r} gave [CLS] attention outside 0 to 1 for picture {_of(plan, batch, row)}; "
            f"weights of one softmax row are needed{_cure(plan)}"
        )
    names = (*codecs.CODECS[plan.codec].arrays(plan.teacher.width), "feature_stats")
    about = OfFeatures(float(host["range"][:, 0].min()), float(host["range"][:, 1].max()), host["norms"])
    return Encoded({name: host[name] for name in names}, weights, about)


def _of(plan: Plan, batch: Batch, row: int) -> str:
    picture, view = batch[row]
    return f"{picture.key!r}, view {plan.view_numbers[view]}"


def _cure(plan: Plan) -> str:
    if running.of(plan.teacher).precision == "fp16":
        return f"; --precision fp16 ends at {FP16_LARGEST}: give --precision bf16, which has fp32's range"
    return f"; finite values within {plan.codec}'s range are needed: check the weights"


def items(plan: Plan, batch: Batch, answer: Encoded) -> Host:
    """What is stored of a batch of features, but for the checksums."""
    digests = rng.key_digests(picture.key for picture, _ in batch)
    numbers = np.array([plan.view_numbers[view] for _, view in batch])
    order = targets.mask_order(plan.order, answer.attention, digests, numbers, plan.policy.seed)
    stored: Mapping[str, npt.NDArray[Any]] = answer.tokens
    if plan.tokens == "ranked":
        stored = {name: ranked(values, order, plan.stored_tokens) for name, values in stored.items()}
    pixels = {"pixels": np.stack([p.proofs[view] for p, view in batch if p.proofs is not None])} if plan.pixels else {}
    return {**stored, **pixels, "attention": answer.attention, "mask_order": order, **of_views(batch)}


def of_views(batch: Batch) -> Host:
    """What is stored of the views themselves."""
    drawn = {
        name: np.stack([getattr(picture.drawn, name)[0, view] for picture, view in batch])
        for name in views.Drawn._fields
    }
    return {
        **drawn,
        "pixel_hash": np.stack([picture.hashes[view] for picture, view in batch]),
        "thumbnail": np.stack([picture.thumbnails[view] for picture, view in batch]),
        "source_size": np.array([picture.source_size for picture, _ in batch], np.int32),
    }


def ranked(values: npt.NDArray[Any], order: npt.NDArray[np.unsignedinteger], count: int) -> npt.NDArray[Any]:
    """(n, L, 1 + P, ...) in image order -> (n, L, count, ...): [CLS], then patches as `order` (n, P) ranks them."""
    out = np.empty((*values.shape[:2], count, *values.shape[3:]), values.dtype)
    for item, ranks, target in zip(values, order, out, strict=True):
        target[:, 0] = item[:, 0]
        target[:, 1:] = item[:, 1 + ranks[: count - 1].astype(np.intp)]
    return out
