"""Host batches are brought to the device as a recipe takes them, one batch ahead of the step that
is being computed.

On a GPU a side stream copies the next batch from page-locked memory (uint8 pixels, targets as they
are stored) and normalises and decodes it there while the step runs. On a CPU there is nothing to
overlap with, and a batch is made when it is taken. B batch, S pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from featcache.models.hooks import normalise_pixels
from student.config import RecipeConfig
from student.targets.assemble import draw_masks
from student.targets.contract import HostBatch, Targets

Marks = tuple[torch.cuda.Event, torch.cuda.Event]


def to_device(
    config: RecipeConfig, targets: Targets, host: HostBatch, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Return a host batch as the recipe takes it: normalised images (B, 3, S, S), decoded features,
    masks, drop path where it is drawn. Nothing in it shares memory with the host batch, which is
    filled again."""
    pixels = torch.from_numpy(host["pixels"]).to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean, std = _statistics(device)
    features, sources = targets.to_device(host, device)
    drawn = {
        **(host.get("masks") or draw_masks(config, host, sources, seed)),
        **host.get("drawn", {}),
    }
    return {
        "images": normalise_pixels(pixels, mean, std),
        **features,
        **{name: ids.to(device, non_blocking=True) for name, ids in drawn.items()},
    }


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ImageNet's mean and std, (3,) each; made once, since making them waits for the
    stream."""
    mean, std = (
        torch.tensor(values, device=device)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return mean, std


@dataclass(frozen=True)
class PrefetchedBatch:
    """Holds a batch, its sample keys, and the seconds that the device waited for it (known once the
    device is there)."""

    batch: dict[str, Tensor]
    keys: list[str]
    waited: WaitTime


class WaitTime:
    """Measures seconds without work for want of a batch: on a GPU those between two marks in its
    own queue."""

    def __init__(self, seconds: float = 0.0, marks: Sequence[Marks] = ()) -> None:
        self._seconds, self._marks = seconds, marks

    def item(self) -> float:
        """Return the number; waits until the device has passed the last mark."""
        for begun, ended in self._marks:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._marks = ()
        return self._seconds


class WaitShare:
    """Measures the share of a step's seconds that was spent waiting, from 0 to 1."""

    def __init__(self, waits: list[WaitTime], seconds: float) -> None:
        self._waits, self._seconds = waits, seconds

    def item(self) -> float:
        return round(min(sum(wait.item() for wait in self._waits) / self._seconds, 1.0), 4)

    def __float__(self) -> float:
        return self.item()


class Prefetcher:
    """Brings batches to the device. `take` gives the next; `bring`, called when the work on it is
    in the device's queue, prepares the one after meanwhile."""

    def __init__(
        self,
        config: RecipeConfig,
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
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[HostBatch, dict[str, Tensor], list[Marks]] | None = None
        self._copied: torch.cuda.Event | None = None  # the last host batch has been read

    def take(self) -> PrefetchedBatch:
        """Return the next batch; StopIteration after the last. Its teacher, where one is in the
        loop, runs here, in the step it is a part of."""
        if self._side is None:
            start = time.perf_counter()
            host = next(self.batches)
            waited = WaitTime(time.perf_counter() - start)
            return PrefetchedBatch(
                to_device(self.config, self.targets, host, self.device, self.seed),
                host["keys"],
                waited,
            )
        main = torch.cuda.current_stream(self.device)
        if not self.targets.is_stored:
            host, marks = self._host(main)
            batch = to_device(self.config, self.targets, host, self.device, self.seed)
            self._copied = _mark(main)
            return PrefetchedBatch(batch, host["keys"], WaitTime(marks=[marks]))
        host, batch, stalls = self._next or self._prepare(self._side, main)
        self._next = None
        free = _mark(main)
        main.wait_stream(self._side)
        for tensor in batch.values():
            tensor.record_stream(main)  # its memory is not given away while the step reads it
        return PrefetchedBatch(batch, host["keys"], WaitTime(marks=[*stalls, (free, _mark(main))]))

    def bring(self) -> None:
        """Queue the next batch's copies and decoding beside the step; nothing after the last
        one."""
        if self._side is not None and self.targets.is_stored and self._next is None:
            with contextlib.suppress(StopIteration):
                self._next = self._prepare(self._side, torch.cuda.current_stream(self.device))

    def _prepare(
        self, side: torch.cuda.Stream, main: torch.cuda.Stream
    ) -> tuple[HostBatch, dict[str, Tensor], list[Marks]]:
        host, marks = self._host(main)
        with torch.cuda.stream(side):
            batch = to_device(self.config, self.targets, host, self.device, self.seed)
            self._copied = _mark(side)
        return {"keys": host["keys"]}, batch, [marks]

    def _host(self, main: torch.cuda.Stream) -> tuple[HostBatch, Marks]:
        """Return the next host batch, and marks around the wait for it. Asking gives the memory of
        the last one back, which must have been read."""
        if self._copied is not None:
            self._copied.synchronize()
        asked = _mark(main)
        host = next(self.batches)
        return host, (asked, _mark(main))


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
