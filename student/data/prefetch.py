"""Host batches are brought to the device as a recipe takes them, one batch ahead of the step that
is being computed.

On a GPU a side stream copies the next batch from page-locked memory (uint8 pixels, targets as they
are stored) and normalises and decodes it there while the step runs; a teacher in the loop runs in
the step itself, on pixels that were copied before. On a CPU there is nothing to overlap with, and a
batch is made when it is taken. B batch, S pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from featcache.models.hooks import normalise_pixels
from featcache.reading.tensors import copy_to_device
from featcache.runtime import device as devices
from featcache.runtime.device_clock import Marks, Seconds, mark
from featcache.runtime.meter import meter
from student import masking
from student.config import TrainConfig
from student.data import device_queue
from student.data.device_queue import LateChecks, Rate
from student.models import drop_path
from student.targets.assemble import draw_for_masks, draw_masks, mask_of, masks_on_device
from student.targets.contract import HostBatch, Targets

MASK_ENTRIES = ("ids_keep", "ids_masked")


def to_device(
    config: TrainConfig,
    targets: Targets,
    host: HostBatch,
    device: torch.device,
    seed: int,
    checks: LateChecks | None = None,
) -> dict[str, Tensor]:
    """Return a host batch as the recipe takes it: normalised images (B, 3, S, S), decoded features,
    masks, drop path where it is drawn. Nothing in it shares memory with the host batch, which is
    filled again. What is wrong with attention is told by `checks`, or at once."""
    pixels = copy_to_device(host["pixels"], device).permute(0, 3, 1, 2)
    drawn = _drawn_on_device(config, host, device, seed)
    features, mask_inputs = targets.to_device({**host, "drawn": drawn}, device)
    if "images" in features:  # a source of targets that changes pictures on the device
        return {**features, **_taken(drawn)}
    if config.mask is not None and "ids_keep" not in drawn:
        drawn |= masks_on_device(config, drawn, mask_inputs, len(pixels))
        _check_attention(config, mask_inputs, checks or LateChecks(0))
    return {
        "images": normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        **features,
        **_taken(drawn),
    }


def _taken(drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a recipe takes of all that is random in a batch."""
    return {name: drawn[name] for name in (*MASK_ENTRIES, drop_path.ENTRY) if name in drawn}


def copy_batch(
    config: TrainConfig, targets: Targets, host: HostBatch, device: torch.device, seed: int
) -> HostBatch:
    """Return a host batch of which all that `to_device` reads on the device is there, each array
    copied once and without waiting."""
    names = ("pixels", *targets.device_arrays(host))
    copied = {name: copy_to_device(host[name], device) for name in names}
    return {**host, **copied, "drawn": _drawn_on_device(config, host, device, seed)}


def _drawn_on_device(
    config: TrainConfig, host: HostBatch, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Return all that is random in a batch; the masks, or what is random in them, are drawn here
    where the loader did not."""
    drawn = dict(host.get("drawn", {}))
    if config.mask is not None and not drawn.keys() & {"ids_keep", "exponentials"}:
        reads = masking.fields(config.mask)
        drawn |= draw_for_masks(config, host, seed) if reads else draw_masks(config, host, {}, seed)
    return {name: copy_to_device(each, device) for name, each in drawn.items()}


def _check_attention(
    config: TrainConfig, mask_inputs: Mapping[str, Tensor], checks: LateChecks
) -> None:
    """Have it told, now or later, when a mask was drawn from rows that cannot be sampled from."""
    if "attention" not in masking.fields(mask_of(config)):
        return
    attention = mask_inputs["attention"]
    checks.add(
        masking.unfit(attention).any(),
        lambda: masking.check_attention(attention.cpu().numpy()),
    )


@dataclass(frozen=True)
class PrefetchedBatch:
    """Holds a batch, its sample keys, and the seconds that the device waited for it (known once the
    device is there)."""

    batch: dict[str, Tensor]
    keys: list[str]
    waited: Seconds


class WaitShare:
    """Measures the share of a step's seconds that was spent waiting, from 0 to 1."""

    def __init__(self, waits: list[Seconds], whole: Seconds) -> None:
        self._waits, self._whole = waits, whole

    def item(self) -> float:
        waited = sum(wait.item() for wait in self._waits)
        return round(min(waited / max(self._whole.item(), 1e-9), 1.0), 4)


class BusySeconds:
    """Measures the seconds of a step that were not spent waiting for data."""

    def __init__(self, waits: list[Seconds], whole: Seconds) -> None:
        self._waits, self._whole = waits, whole

    def item(self) -> float:
        return max(self._whole.item() - sum(wait.item() for wait in self._waits), 0.0)


def step_speed(global_batch: int, seconds: Seconds, waits: list[Seconds]) -> dict[str, Any]:
    """Count the seconds that a step computed; return samples a second over all processes, and the
    share of the step that was spent waiting for data."""
    meter.device(BusySeconds(waits, seconds))
    return {"images_per_s": Rate(global_batch, seconds), "data_wait": WaitShare(waits, seconds)}


class Prefetcher:
    """Brings batches to the device. `take` gives the next; `bring`, called when the work on it is
    in the device's queue, prepares the one after meanwhile."""

    def __init__(
        self,
        config: TrainConfig,
        targets: Targets,
        batches: Iterator[HostBatch],
        device: torch.device,
        seed: int,
    ) -> None:
        self.config, self.targets, self.batches, self.device, self.seed = (
            config,
            targets,
            batches,
            device,
            seed,
        )
        self.checks = LateChecks(device_queue.lag(device))
        self._side = torch.cuda.Stream(device) if devices.is_gpu(device) else None
        self._next: tuple[HostBatch, list[Marks]] | None = None
        self._copied: torch.cuda.Event | None = None  # the last host batch has been read
        self._taken: deque[torch.cuda.Event] = deque()  # the device is done with the one before

    def take(self) -> PrefetchedBatch:
        """Return the next batch; StopIteration after the last. Its teacher, where one is in the
        loop, runs here, in the step it is a part of."""
        if self._side is None:
            start = time.perf_counter()
            host = next(self.batches)
            waited = Seconds(time.perf_counter() - start)
            return PrefetchedBatch(self._to_device(host), host["keys"], waited)
        main = torch.cuda.current_stream(self.device)
        self._keep_close()
        host, stalls = self._next or self._prepare(self._side, main)
        self._next = None
        free = mark(main)
        main.wait_stream(self._side)
        self._taken.append(mark(main))
        waited = Seconds(marks=[*stalls, (free, self._taken[-1])])
        batch = host["batch"] if self.targets.is_stored else self._to_device(host)
        for tensor in _tensors(host):
            tensor.record_stream(main)  # its memory is not given away while the step reads it
        return PrefetchedBatch(batch, host["keys"], waited)

    def _keep_close(self) -> None:
        """Wait until the device is near: batches that it has not come to yet take its memory."""
        while len(self._taken) >= device_queue.LATE_STEPS:
            self._taken.popleft().synchronize()

    def bring(self) -> None:
        """Queue the next batch's copies, and its decoding where no teacher has to run first, beside
        the step; nothing after the last one."""
        if self._side is not None and self._next is None:
            with contextlib.suppress(StopIteration):
                self._next = self._prepare(self._side, torch.cuda.current_stream(self.device))

    def _prepare(
        self, side: torch.cuda.Stream, main: torch.cuda.Stream
    ) -> tuple[HostBatch, list[Marks]]:
        """Return a batch that is being copied, with `batch` as the recipe takes it where all of it
        is stored."""
        host, marks = self._host(main)
        with torch.cuda.stream(side):
            copied = copy_batch(self.config, self.targets, host, self.device, self.seed)
            self._copied = mark(side)
            if self.targets.is_stored:
                copied = {"keys": host["keys"], "batch": self._to_device(copied)}
        return copied, [marks]

    def _to_device(self, host: HostBatch) -> dict[str, Tensor]:
        return to_device(
            self.config, self.targets, host, self.device, self.seed, checks=self.checks
        )

    def _host(self, main: torch.cuda.Stream) -> tuple[HostBatch, Marks]:
        """Return the next host batch, and marks around the wait for it. Asking gives the memory of
        the last one back, which must have been read."""
        if self._copied is not None:
            self._copied.synchronize()
        asked = mark(main)
        host = next(self.batches)
        return host, (asked, mark(main))


def _tensors(host: HostBatch) -> Iterator[Tensor]:
    """Yield the tensors of a batch, those of dictionaries in it as well."""
    for value in host.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)
