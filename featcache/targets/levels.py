"""What a student learns from: normalised levels, their statistics, the [CLS] attention, and what derives from them.

B batch, T tokens ([CLS] first, then P patches), D width, H heads, E projection width. y_k is the teacher's residual
stream after block k; only h_k and (mean, std) are stored, everything else is derived (METHODS 10.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache import errors, rng

EPS = 1e-5  # CLIP's LayerNorm eps and layer_norm's default; models with another are rescaled by the stored std
ORDERS = ("attentive", "topk", "uniform")


def normalise(y: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, T, D) -> h (B, T, D) = (y - mean) / std and stats (B, T, 2) = (mean, std), both at least float32.

    std = sqrt(biased variance + EPS) is the divisor itself, so y = h * std + mean. (MaskAlign's `whiten`, METHODS 1.4.)
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    mean = y.mean(-1, keepdim=True)
    centred = y - mean  # in two passes: torch.var_mean takes twelve times as long on a CPU, and is no more exact
    std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred.div_(std), torch.cat([mean, std], -1)


def sums(stats: npt.NDArray[np.floating], width: int) -> npt.NDArray[np.float64]:
    """stats (n, L, T, 2) of `normalise`, D channels -> (L, 3): of the numbers y of each level their count, their sum
    and the sum of their squares, over pictures, tokens and channels; what several batches give may be added."""
    mean, std = np.moveaxis(stats.astype(np.float64), -1, 0)  # each (n, L, T)
    squares = (std**2 - EPS + mean**2).sum((0, 2)) * width
    count = np.full(stats.shape[1], stats.shape[0] * stats.shape[2] * width, np.float64)
    return np.stack([count, mean.sum((0, 2)) * width, squares], 1)


def moments(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """`sums` (L, 3) -> (L, 2): mean and unbiased variance of each level (MaskAlign's whole-tensor `bn`, METHODS 14)."""
    count, total, squares = sums.T
    variance = (squares - total**2 / count) / (count - 1)
    return np.stack([total / count, variance], 1).astype(np.float32)


def cls_attention(query: Tensor, keys: Tensor, heads: int, prefix: int = 1) -> Tensor:
    """query (B, D) of [CLS], keys (B, T, D) -> (B, T - prefix) float32: softmax over all tokens, mean over heads,
    patches only, not renormalised (METHODS 0.3). Only one row of the attention map is computed."""
    batch, tokens, width = keys.shape
    q = query.reshape(batch, heads, 1, width // heads) * (width // heads) ** -0.5
    k = keys.reshape(batch, tokens, heads, width // heads).permute(0, 2, 3, 1)
    weights = (q @ k).softmax(-1, dtype=torch.float32)
    return weights.mean(1)[:, 0, prefix:]


def mask_order(
    kind: str, attention: npt.NDArray[np.float32], digests: rng.U64, view: int | npt.ArrayLike, seed: int
) -> npt.NDArray[np.unsignedinteger]:
    """(n, P) attention -> (n, P) permutation of the patches from each view's own counter; u1, or u2 beyond 256 patches.

    `attentive`: exponential race on the attention, the first m entries are the attentive mask at any ratio; `topk`: by
    falling attention; `uniform`: regardless of it.
    """
    patches = attention.shape[1]
    raw = rng.words(digests, rng.stream(f"order:{kind}", seed), patches, view=view)
    if kind == "attentive":
        order = rng.race(attention, raw)
    elif kind == "topk":
        order = np.argsort(-attention, axis=-1, kind="stable")
    elif kind == "uniform":
        order = np.argsort(raw, axis=-1, kind="stable")
    else:
        raise errors.UsageError(f"unknown mask order {kind!r}: {errors.near(kind, ORDERS)}")
    return order.astype(np.uint8 if patches <= 256 else np.uint16)


def derive(name: str, h: Tensor, tail: Mapping[str, Tensor], std: Tensor | None = None) -> Tensor:
    """The last level h (..., D) -> what a recipe asks for by name.

    `f` = gamma * h + beta, the teacher's final LayerNorm; `z` = f @ proj, CLIP's projection; `fd` = f normalised again
    without affine. A tail whose eps is not EPS needs `std` (..., 1), the stored divisor, to put its own in its place.
    """
    if name not in ("f", "z", "fd"):
        raise errors.UsageError(f"unknown derived target {name!r}: {errors.near(name, ('f', 'z', 'fd'))}")
    missing = {"gamma", "beta", "eps", *(["proj"] if name == "z" else [])} - set(tail)
    if missing:
        lacks = "no projection" if missing == {"proj"} else f"no {', '.join(sorted(missing))}"
        raise errors.UserError(
            f"target {name!r}: this teacher's tail has {lacks}; it has {', '.join(tail) or 'nothing'}"
        )
    if float(tail["eps"]) != float(np.float32(EPS)):
        if std is None:
            raise errors.UsageError(
                f"target {name!r}: this teacher's eps is {float(tail['eps']):g}, so `std` is needed"
            )
        h = h * std / (std**2 - EPS + tail["eps"]).sqrt()
    f = h * tail["gamma"] + tail["beta"]
    if name == "f":
        return f
    if name == "fd":
        return F.layer_norm(f, f.shape[-1:], eps=EPS)
    return f @ tail["proj"]
