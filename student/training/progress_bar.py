"""What a person at a terminal sees of a run: epoch, step, the loss and its parts, rate, images a
second, the share of a step spent waiting for data, memory, and the time that is left. Quiet where
stderr is no terminal.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

EVERY = 20  # steps between two looks at a loss that lies on a GPU: each look waits for the device
# of a row of metrics
NOT_PARTS = ("step", "epoch", "loss", "lr", "images_per_s", "data_wait")


class TrainProgress:
    """A bar with a line behind it."""

    def __init__(self, bar: Any, steps_per_epoch: int) -> None:
        self.bar = bar
        self.steps_per_epoch = steps_per_epoch

    def update_with(self, row: dict[str, Any]) -> None:
        late = isinstance(row["loss"], Tensor) and row["loss"].device.type == "cuda"
        if not self.bar.disable and not (late and row["step"] % EVERY):
            self.bar.set_postfix_str(line(row, self.steps_per_epoch), refresh=False)
        self.bar.update()


def line(row: dict[str, Any], steps_per_epoch: int) -> str:
    """What stands behind the bar, which itself shows steps, the time passed and the time left."""
    epoch = row["step"] / steps_per_epoch
    parts = {
        name: value
        for name, value in row.items()
        if name not in NOT_PARTS and not name.startswith("level_")
    }
    losses = [
        f"loss {float(row['loss']):.4f}",
        *(f"{name} {float(value):.4g}" for name, value in parts.items()),
    ]
    return (
        f"epoch {epoch:.2f}  {' '.join(losses)}  lr {row['lr']:.2e}  {row['images_per_s']:.0f} "
        f"images/s  waiting for data {float(row['data_wait']):.0%}  {memory_bytes() / 1e9:.1f} GB"
    )


def memory_bytes() -> int:
    """The most that this process has used so far: of the GPU where there is one, else of the
    host."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return host_bytes()


def host_bytes() -> int:
    """The most resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def shown(total: int, first: int, steps_per_epoch: int, speaks: bool) -> Iterator[TrainProgress]:
    """Steps `first` to `total` of a run, in the process that `speaks`."""
    from tqdm import tqdm

    quiet = not speaks or not sys.stderr.isatty()
    with tqdm(
        total=total, initial=first, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.1
    ) as bar:
        yield TrainProgress(bar, steps_per_epoch)
