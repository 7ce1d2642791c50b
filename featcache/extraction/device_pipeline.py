"""A batch goes to the device, through the teacher, is encoded, and comes back to the host.

    submit   the caller's thread    pixels into pinned memory and over (copy), the teacher (teacher)
    collect  a thread of its own    levels normalised and encoded (encode), back over (copy)
    items    the same               orders and checksums (encode)

On CUDA each direction of copying has a stream beside the teacher's, and events put them in order:
`submit` returns while the device still works, so the next batch is copied and this one encoded
meanwhile. On a CPU the same calls block and only the threads overlap. The kernels and their order
are the same for any overlap, and so are the bytes.

B batch (views), n of them kept, V views a picture, S pixels, L levels, T tokens, P patches, D
width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from featcache.extraction.forward import encode_outputs, run_teacher
from featcache.extraction.plan import Plan
from featcache.extraction.progress import ExtractProgress
from featcache.extraction.rows import Batch, Host
from featcache.models import precision
from featcache.runtime.meter import meter


@dataclass(frozen=True)
class InFlight:
    """Hold a batch whose outputs the device may still be computing."""

    batch: Batch
    answer: tuple[Tensor, ...]  # y_k (B, T, D) of each level and attention (B, P); or ids (B, P)
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)  # CUDA: (stage, event, event)


class DevicePipeline:
    """Run one plan's batches through its teacher, on streams of their own."""

    def __init__(self, plan: Plan, batch_size: int, progress: ExtractProgress) -> None:
        self.plan, self.batch_size, self.progress = plan, batch_size, progress
        self.device = precision.device_of(plan.teacher)
        self._cuda = self.device.type == "cuda"
        self._inward = torch.cuda.Stream(self.device) if self._cuda else None
        self._outward = torch.cuda.Stream(self.device) if self._cuda else None

    def submit(self, batch: Batch) -> InFlight:
        """Start a batch; the last of a shard is padded with its last view, so that it is as large
        as the others."""
        spans: list[tuple[str, Any, Any]] = []
        with self._stage("copy", self._inward, spans):
            pixels = self._to_device(batch)
        main = torch.cuda.current_stream(self.device) if self._cuda else None
        self._hand_over([pixels], spans, main)
        with self._stage("teacher", main, spans):
            answer = run_teacher(self.plan.teacher, pixels, self.plan.levels)
        meter.teacher(self.plan.teacher.name, 0.0, len(batch))
        return InFlight(batch, answer, spans)

    def collect(self, in_flight: InFlight) -> Host:
        """Encode a batch's outputs on the device and return them on the host; waits for them."""
        self._hand_over(in_flight.answer, in_flight.spans, self._outward)
        with self._stage("encode", self._outward, in_flight.spans):
            coded = encode_outputs(self.plan, in_flight.answer, len(in_flight.batch))
        with self._stage("copy", self._outward, in_flight.spans):
            host = {name: self._to_host(values) for name, values in coded.items()}
        if in_flight.spans:
            in_flight.spans[-1][2].synchronize()
        self.count(in_flight)
        return {name: values.numpy() for name, values in host.items()}

    def count(self, in_flight: InFlight) -> None:
        """Count the seconds of a batch that a GPU is done with."""
        for stage, begin, end in in_flight.spans:
            self._spend(stage, begin.elapsed_time(end) / 1000)
        in_flight.spans.clear()

    def _spend(self, stage: str, seconds: float) -> None:
        self.progress.add(stage, seconds)
        if stage == "teacher":
            meter.device(seconds)
            meter.teacher(self.plan.teacher.name, seconds, 0)

    def _to_device(self, batch: Batch) -> Tensor:
        """(B, 3, S, S) uint8."""
        size, kind = self.plan.input_px, (self.plan.input_px, self.plan.filter)
        host = torch.empty(
            (self.batch_size, size, size, 3), dtype=torch.uint8, pin_memory=self._cuda
        )
        rows = host.numpy()
        for i in range(self.batch_size):
            picture, view = batch[min(i, len(batch) - 1)]
            rows[i] = picture.pixels[kind][view]
        return host.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous()

    def _to_host(self, values: Tensor) -> Tensor:
        if not self._cuda:
            return values.cpu()
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
            values, non_blocking=True
        )

    def _hand_over(
        self, values: Sequence[Tensor], spans: list[tuple[str, Any, Any]], stream: Any
    ) -> None:
        """`stream` goes on where the last stage ended, and the values' memory is not given away
        before it is done."""
        if stream is not None:
            stream.wait_event(spans[-1][2])
            for each in values:
                each.record_stream(stream)

    @contextmanager
    def _stage(self, name: str, stream: Any, spans: list[tuple[str, Any, Any]]) -> Iterator[None]:
        """Run on a stream between two of its events; without one, on the clock."""
        if stream is None:
            begun = time.perf_counter()
            yield
            self._spend(name, time.perf_counter() - begun)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record(stream)
            yield
            end.record(stream)
        spans.append((name, begin, end))
