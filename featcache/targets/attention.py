"""The [CLS] attention over the patches is computed, and mask orders are drawn from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import errors, rng

ORDERS = ("attentive", "topk", "uniform")


def cls_attention(
    query: Tensor, keys: Tensor, heads: int, prefix: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Compute the attention (B, T - prefix) float32 of [CLS] from query (B, D) and keys (B, T, D):
    softmax over all tokens, mean over heads, patches only, not renormalised (METHODS 0.3). Only one
    row of the attention map is computed. `bias` (H, T), of relative positions, is added before the
    softmax."""
    batch, tokens, width = keys.shape
    q = query.reshape(batch, heads, 1, width // heads) * (width // heads) ** -0.5
    k = keys.reshape(batch, tokens, heads, width // heads).permute(0, 2, 3, 1)
    logits = q @ k  # (B, H, 1, T)
    if bias is not None:
        logits = logits + bias[:, None]
    return logits.softmax(-1, dtype=torch.float32).mean(1)[:, 0, prefix:]


def mask_order(
    kind: str,
    attention: npt.NDArray[np.float32],
    digests: rng.U64,
    view: int | npt.ArrayLike,
    seed: int,
) -> npt.NDArray[np.unsignedinteger]:
    """Draw a permutation (n, P) of the patches from attention (n, P) and each view's own counter;
    u1, or u2 beyond 256 patches.

    `attentive`: exponential race on the attention, the first m entries are the attentive mask at
    any ratio; `topk`: by falling attention; `uniform`: regardless of it.
    """
    patches = attention.shape[1]
    drawn = draw_for_order(kind, patches, digests, view, seed)
    order = order_by(kind, drawn, attention)
    return order.astype(np.uint8 if patches <= 256 else np.uint16)


def draw_for_order(
    kind: str, patches: int, digests: rng.U64, view: int | npt.ArrayLike, seed: int
) -> npt.NDArray[np.float64 | np.int64]:
    """Draw what an order needs beside the attention: exponentials (n, P) for `attentive`, nothing
    (n, 0) for `topk`, the order (n, P) itself for `uniform`."""
    if kind not in ORDERS:
        raise errors.UsageError(f"unknown mask order {kind!r}: {errors.near(kind, ORDERS)}")
    count = 0 if kind == "topk" else patches
    raw = rng.words(digests, rng.stream(f"order:{kind}", seed), count, view=view)
    return np.argsort(raw, axis=-1, kind="stable") if kind == "uniform" else rng.exponentials(raw)


def order_by(kind: str, drawn: Any, attention: Any) -> Any:
    """Order the patches (n, P) by what was drawn and the attention (n, P), arrays or tensors: the
    same order on every device."""
    if kind == "topk":
        return (-attention).argsort(stable=True)
    return drawn if kind == "uniform" else rng.finish_order(drawn, attention)
