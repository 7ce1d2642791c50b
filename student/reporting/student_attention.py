"""The attention of a student's [CLS], and its tokens, on whole views.

As MaskAlign's Figure 3 shows it: "the attention map of [CLS] token of the last self-attention
layer", of pictures without a mask; the mean over heads, as CAE's Figure 6 and as a cache has the
teacher's. METHODS 0.3 tells the arithmetic, which is that of the teachers.

n views, S pixels a side, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.models.timm_wrapper import attention_of_cls

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Looked:
    """Holds what a student makes of views: its tokens (n, P, D) after the last norm, without
    [CLS], and the attention (n, P) of [CLS] in its last block; None where it has no [CLS], or
    another kind of attention than is known here."""

    tokens: F32
    attention: F32 | None


def look(encoder: Any, images: Tensor) -> Looked:
    """Run an encoder, which is in eval mode, on normalised views (n, 3, S, S)."""
    kept: list[Tensor] = []
    prefix = int(encoder.num_prefix_tokens)
    attn: Any = getattr(_blocks(encoder)[-1], "attn", None)

    def keep(attn: nn.Module, given: tuple[Tensor, ...], more: Mapping[str, Any]) -> None:
        kept.append(attention_of_cls(attn, given[0], more, prefix))

    hooks = []
    if _has_cls(encoder) and is_known(attn):
        hooks.append(attn.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            tokens = encoder.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    return Looked(tokens[:, prefix:].float().numpy(), kept[0].float().numpy() if kept else None)


def is_known(attn: object) -> bool:
    """Return whether this is one of timm's layers of attention, which `attention_of_cls` reads."""
    from timm.layers.attention import Attention, AttentionRope
    from timm.models.beit import Attention as BeitAttention
    from timm.models.eva import EvaAttention

    return type(attn) in (Attention, AttentionRope, BeitAttention, EvaAttention)


def _has_cls(encoder: Any) -> bool:
    return getattr(encoder, "cls_token", None) is not None


def _blocks(encoder: Any) -> Any:
    return getattr(encoder, "blocks3", None) or encoder.blocks
