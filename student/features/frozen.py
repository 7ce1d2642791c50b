"""A frozen encoder gives features to labelled pictures.

An evaluation never looks at a run folder or a teacher: it takes a `FrozenEncoder`, which turns
uint8 pixels into one feature row a picture, and `embed_source`, which turns a source of pictures
into feature rows. A student's feature is its CLS token after the encoder's own final norm (MAE's
protocol; a MaskAlign student never trains that norm, and the published numbers read through it all
the same); a teacher's feature is its own output, f = gamma * LN(y_T) + beta.

n pictures, V views of each, S pixels a side, T = prefix + P tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError, near
from featcache.models.hooks import normalise_pixels

POOLS = ("cls", "mean")


@dataclass(frozen=True)
class FrozenEncoder:
    """Holds a frozen network: `forward` maps uint8 pixels to pooled features, `to` moves its
    weights to a device."""

    name: str
    img_size: int
    pool: str
    forward: Callable[[Tensor], Tensor]
    to: Callable[[str], object]

    def embed(self, pixels: Tensor) -> Tensor:
        """Map uint8 pixels (B,3,S,S) to features (B,D) float32, on the device of the pixels,
        without gradients."""
        with torch.no_grad():
            return self.forward(pixels).float()


def from_run(run: Path, pool: str = "cls", ema: bool = False) -> FrozenEncoder:
    """Freeze the encoder of a training run, or the average of its weights: CLS, or the mean of the
    patch tokens, after its final norm."""
    # imports the trainer's side; a teacher needs none of it
    from student.checkpoint import load_encoder

    _check_pool(pool)
    encoder, config = load_encoder(run, ema)
    return from_encoder(encoder, int(config["img_size"]), str(run), pool)


def from_encoder(encoder: nn.Module, img_size: int, name: str, pool: str = "cls") -> FrozenEncoder:
    """Freeze a timm VisionTransformer that reads ImageNet-normalised pixels."""
    _check_pool(pool)
    prefix = int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
    if pool == "cls" and prefix == 0:
        raise UsageError(
            f"cannot pool the CLS token of {name}: its encoder has none; give --pool mean"
        )
    encoder.eval().requires_grad_(False)

    def forward(pixels: Tensor) -> Tensor:
        tokens = encoder.forward_features(  # type: ignore[operator]  # (B,T,D), normed
            normalise_pixels(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        return _pooled(tokens, pool, prefix)

    return FrozenEncoder(name, img_size, pool, forward, encoder.to)


def from_teacher(spec: str, weights: str | None = None, pool: str = "cls") -> FrozenEncoder:
    """Freeze a teacher: its own output f = gamma * LN(y_T) + beta (CLIP's ln_post), before any
    projection."""
    _check_pool(pool)
    teacher = teachers.load(spec, weights)
    tail = {
        name: torch.from_numpy(np.array(value, np.float32))
        for name, value in teacher.tail().items()
    }
    if "gamma" not in tail:
        raise UserError(
            f"cannot take the output of teacher {spec!r}: it has no final norm on its tokens (it "
            "pools first); give a teacher with one, such as dino-b16"
        )

    def forward(pixels: Tensor) -> Tensor:
        (last,), _ = teacher(pixels, (teacher.depth,))  # y_T (B,1+P,D)
        gamma, beta = tail["gamma"].to(pixels.device), tail["beta"].to(pixels.device)
        f = F.layer_norm(last.float(), last.shape[-1:], gamma, beta, float(tail["eps"]))
        return _pooled(f, pool, prefix=1)

    return FrozenEncoder(spec, teacher.input_px, pool, forward, teacher.to)


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        raise UsageError(f"unknown pool {pool!r}: {near(pool, POOLS)}")


def _pooled(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """Pool (B,T,D) to (B,D); `prefix` tokens (CLS, registers) come before the patches."""
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(1)
