"""Drop path (stochastic depth) is drawn for every sample of a step, not by every process.

Whether a sample skips a residual branch is a pure function of (seed, step, position in the global
batch, branch, encoding), drawn on the host beside the masks. So the same pictures lose the same
branches in one process of 16 or two of 8, in micro-batches, in a run that goes on, and in blocks
that are computed again in the backward pass.

    rates = attach(model) -> draw(rates, ...) -> batch["drop_path"] -> model(batch)

In training mode without that entry, or in a model that was not attached, torch's global generator
draws, as for timm's own module. In eval mode nothing is dropped.

Shapes: B batch, N branches with a rate above 0, in the order of the model's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import timm.layers
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from featcache import rng

ENTRY = "drop_path"  # of a batch: (B, N, 2) bool, true where the branch is kept
ENCODINGS = 2  # of one step; CAE encodes twice

_32 = np.uint64(32)


@dataclass
class Draws:
    """Holds the draws of the batch in hand, for all branches of a model."""

    kept: Tensor | None = None  # (B, N, 2)
    encoding: int = 0  # whose draws are used


class DropPath(timm.layers.DropPath):
    """Drop a residual branch sample by sample, as timm's does, by the draws of the batch. Called
    once in an encoding: a block with two branches has two."""

    draws: Draws | None = None
    number = 0  # of the branch in its model

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B,...) -> (B,...): zero where dropped, divided by the share that is kept
        elsewhere."""
        if not self.training or self.draws is None or self.draws.kept is None:
            return super().forward(x)
        keep = self.draws.kept[:, self.number, self.draws.encoding].to(x.dtype)
        if self.scale_by_keep:
            keep = keep / (1 - self.drop_prob)
        return x * keep.view(-1, *(1 for _ in range(x.ndim - 1)))


def branch(rate: float) -> nn.Module:
    """Build the drop path of one residual branch.

    >>> branch(0.0), branch(0.25)
    (Identity(), DropPath(drop_prob=0.250))
    """
    return DropPath(rate) if rate > 0 else nn.Identity()


def replace(model: nn.Module) -> None:
    """Put this module in the place of each of timm's own in a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is timm.layers.DropPath:
                setattr(parent, name, DropPath(child.drop_prob, child.scale_by_keep))


def attach(model: nn.Module) -> tuple[float, ...]:
    """Let the branches of a model take their draws from its batches; return their rates (N,)."""
    found = [module for module in model.modules() if isinstance(module, DropPath)]
    if found:
        draws = Draws()
        for number, module in enumerate(found):
            module.draws, module.number = draws, number
        model.register_forward_pre_hook(partial(_take, draws))
    return tuple(module.drop_prob for module in found)


def process_draws(model: nn.Module) -> list[str]:
    """Return the names of modules that draw from torch's generator, which is seeded for each
    process: those of a recipe of the user's own."""
    return [name for name, module in model.named_modules() if _draws_alone(module)]


def _draws_alone(module: nn.Module) -> bool:
    if isinstance(module, timm.layers.DropPath):
        return type(module) is not DropPath and (module.drop_prob or 0) > 0
    return isinstance(module, _DropoutNd) and module.p > 0


def _take(draws: Draws, model: nn.Module, args: tuple[Any, ...]) -> None:
    draws.kept = args[0].get(ENTRY)


def use_encoding(encoder: nn.Module, encoding: int) -> None:
    """Choose which of a step's draws, 0 or 1, the branches use from here on: two encodings of one
    picture are not alike."""
    for module in encoder.modules():
        if isinstance(module, DropPath) and module.draws is not None:
            module.draws.encoding = encoding


def draw(
    rates: Sequence[float], seed: int, step: int, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Draw (B, N, 2), true where a branch is kept, for rates (N,) and the positions (B,) of the
    samples in the step's global batch. Each encoding has half of a word."""
    digests = np.broadcast_to(rng.key_digests([ENTRY]), (len(positions), 2))
    stream = rng.stream(ENTRY, seed)
    words = rng.words(digests, stream, len(rates), view=positions, epoch=step)
    halves = np.stack([words >> _32, words & np.uint64(0xFFFFFFFF)], axis=-1)
    dropped = np.ceil(np.asarray(rates) * 2.0**32).astype(np.uint64)
    return halves >= dropped[:, None]
