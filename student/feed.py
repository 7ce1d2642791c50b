"""From batches on the host to what a recipe takes on the device, one batch ahead of the step that is being computed.

On a GPU a side stream copies the next batch from page-locked memory (uint8 pixels, targets as they are stored) and
normalises and decodes it there while the step runs. On a CPU there is nothing to overlap with, and a batch is made when
it is taken. B batch, S pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from student.config import RecipeConfig
from student.targets import Host, Targets, draw_masks


def to_device(config: RecipeConfig, targets: Targets, host: Host, device: torch.device, seed: int) -> dict[str, Tensor]:
    """A host batch as the recipe takes it: normalised images (B, 3, S, S), decoded features, masks. Nothing in it
    shares memory with the host batch, which is filled again."""
    pixels = torch.from_numpy(host["pixels"]).to(device, non_blocking=True).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    features, sources = targets.complete(host, device)
    masks = host.get("masks") or draw_masks(config, host, sources, seed)
    return {
        "images": (pixels.float() / 255 - mean) / std,
        **features,
        **{name: ids.to(device, non_blocking=True) for name, ids in masks.items()},
    }


@dataclass(frozen=True)
class Taken:
    """A batch, its sample keys, and what the device waited for it in seconds (known once the device is there)."""

    batch: dict[str, Tensor]
    keys: list[str]
    waited: Wait


class Wait:
    """Seconds without work for want of a batch: on a GPU the time between two marks in its own queue."""

    def __init__(self, seconds: float = 0.0, marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None) -> None:
        self._seconds, self._marks = seconds, marks

    def item(self) -> float:
        """The number; waits until the device has passed the second mark."""
        if self._marks is not None:
            self._marks[1].synchronize()
            self._seconds, self._marks = self._marks[0].elapsed_time(self._marks[1]) / 1000, None
        return self._seconds


class Share:
    """The share of a step's seconds that was spent waiting, from 0 to 1."""

    def __init__(self, waits: list[Wait], seconds: float) -> None:
        self._waits, self._seconds = waits, seconds

    def item(self) -> float:
        return round(min(sum(wait.item() for wait in self._waits) / self._seconds, 1.0), 4)


class Feed:
    """Batches of `batches`, on the device. `take` gives the next; `launched` says that the work on it is in the
    device's queue, so that the one after can be brought meanwhile."""

    def __init__(
        self, config: RecipeConfig, targets: Targets, batches: Iterator[Host], device: torch.device, seed: int
    ) -> None:
        self.config, self.targets, self.batches, self.device, self.seed = config, targets, batches, device, seed
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: tuple[dict[str, Tensor], list[str]] | None = None
        self._copied: torch.cuda.Event | None = None  # the last host batch has been read
        self._launched: torch.cuda.Event | None = None  # end of the work on the batch before

    def take(self) -> Taken:
        """The next batch. Its teacher, where one is in the loop, runs here, in the step it is a part of."""
        if self._side is None:
            start = time.perf_counter()
            host = next(self.batches)
            waited = Wait(time.perf_counter() - start)
            return Taken(to_device(self.config, self.targets, host, self.device, self.seed), host["keys"], waited)
        main = torch.cuda.current_stream(self.device)
        if not self.targets.is_stored:
            host = self._host()
            begun = _mark(main)
            batch, keys = to_device(self.config, self.targets, host, self.device, self.seed), host["keys"]
            self._copied = _mark(main)
        else:
            batch, keys = self._next or self._bring()
            self._next = None
            main.wait_stream(self._side)
            for tensor in batch.values():
                tensor.record_stream(main)  # its memory is not given away while the step reads it
            begun = _mark(main)
        return Taken(batch, keys, Wait(marks=(self._launched, begun)) if self._launched is not None else Wait())

    def launched(self, last: bool = False) -> None:
        """The step's work is queued. Bring the next batch, unless this was the last."""
        if self._side is None:
            return
        self._launched = _mark(torch.cuda.current_stream(self.device))
        if not last and self.targets.is_stored:
            self._next = self._bring()

    def _bring(self) -> tuple[dict[str, Tensor], list[str]]:
        """Queue the next batch's copies and decoding beside the step."""
        assert self._side is not None
        host = self._host()
        with torch.cuda.stream(self._side):
            batch = to_device(self.config, self.targets, host, self.device, self.seed)
            self._copied = _mark(self._side)
        return batch, host["keys"]

    def _host(self) -> Host:
        """The next host batch. Asking for it gives the memory of the last one back, which must have been read."""
        if self._copied is not None:
            self._copied.synchronize()
        return next(self.batches)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
