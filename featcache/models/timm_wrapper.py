"""A timm transformer becomes a teacher that is read through hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.errors import UsageError, UserError
from featcache.models import position_embedding
from featcache.models.contract import Option
from featcache.models.hooks import BlockOutputs, normalise_pixels, tail_arrays
from featcache.targets.attention import cls_attention

DEFAULT_POS = "bicubic"


class TimmVit(nn.Module):
    """Read a timm transformer, `vit`, through hooks. `prefix` tokens come before the patches, [CLS]
    first if there."""

    name = "timm"

    def __init__(
        self, vit: Any, weights: str, mean: Any = None, std: Any = None, shrink_from: int = 0
    ) -> None:
        super().__init__()
        self.vit = vit
        self.weights = weights
        self._tower_px, self._shrinks = int(vit.patch_embed.img_size[0]), bool(shrink_from)
        self.input_px = shrink_from or self._tower_px
        self.patches = int(vit.patch_embed.num_patches)
        self.width, self.depth = int(vit.embed_dim), len(vit.blocks)
        self.pixel_mean = tuple(mean or vit.pretrained_cfg["mean"])
        self.pixel_std = tuple(std or vit.pretrained_cfg["std"])
        self.first_token = "mean" if vit.cls_token is None else "cls"
        self._attention = torch.empty(0)
        self._block_outputs = BlockOutputs(vit.blocks)
        if vit.cls_token is None:
            vit.norm.register_forward_hook(self._record_pool_attention)
        else:
            vit.blocks[-1].attn.register_forward_pre_hook(
                self._record_cls_attention, with_kwargs=True
            )

    def _record_cls_attention(
        self, attn: Any, inputs: tuple[Tensor, ...], more: Mapping[str, Any]
    ) -> None:
        """Keep the [CLS] row of the last block's attention, from its normed tokens (B, T, D)."""
        query, keys = _query_keys(attn, inputs[0], more.get("rope"))
        self._attention = cls_attention(query, keys, attn.num_heads, self.vit.num_prefix_tokens)

    def _record_pool_attention(
        self, norm: nn.Module, inputs: tuple[Tensor, ...], x: Tensor
    ) -> None:
        """Keep the attention of the pool's own query on the final norm's output (B, T, D)."""
        pool = self.vit.attn_pool
        x = x if pool.pos_embed is None else x + pool.pos_embed
        size = pool.num_heads * pool.head_dim
        bias = None if pool.kv.bias is None else pool.kv.bias[:size]
        query = pool.q_norm(pool.q(pool.latent[:, :1]).unflatten(-1, (pool.num_heads, -1))).flatten(
            1
        )  # (1, D)
        keys = pool.k_norm(
            F.linear(x, pool.kv.weight[:size], bias).unflatten(-1, (pool.num_heads, -1))
        ).flatten(2)
        query = query.expand(len(x), -1)
        self._attention = cls_attention(query, keys, pool.num_heads, self.vit.num_prefix_tokens)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Map uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P)."""
        pixels = normalise_pixels(images, self.pixel_mean, self.pixel_std)
        if self._shrinks:
            pixels = position_embedding.shrink_pixels(pixels, self._tower_px)
        self.vit.forward_features(pixels)
        return [self._stored_tokens(y) for y in self._block_outputs.take(levels)], self._attention

    def _stored_tokens(self, y: Tensor) -> Tensor:
        """Keep [CLS], or the mean of the patches, and the patches: (B, prefix + P, D) -> (B, 1 + P,
        D)."""
        prefix = self.vit.num_prefix_tokens
        patches = y[:, prefix:]
        if self.first_token == "mean":
            return torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return y if prefix == 1 else torch.cat([y[:, :1], patches], 1)

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the arrays of the final LayerNorm; none where the model has none on its tokens (it
        then pools first)."""
        norm = self.vit.norm
        if not isinstance(norm, nn.LayerNorm):
            return {}
        return tail_arrays(norm)


def _query_keys(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map normed tokens x (B, T, D) -> the [CLS] query (B, H d) and all keys (B, T, H d), normed
    and rotated."""
    (wq, bq), (wk, bk) = _projections(attn)
    query = attn.q_norm(F.linear(x[:, :1], wq, bq).unflatten(-1, (attn.num_heads, -1)))
    keys = attn.k_norm(F.linear(x, wk, bk).unflatten(-1, (-1, query.shape[-1])))  # (B, T, H, d)
    # prefix tokens, [CLS] and so the query among them, have no position and are not rotated
    if rope is not None:
        from timm.layers import apply_rot_embed_cat

        prefix = attn.num_prefix_tokens
        patches = apply_rot_embed_cat(keys[:, prefix:].transpose(1, 2), rope, half=attn.rotate_half)
        keys = torch.cat([keys[:, :prefix], patches.transpose(1, 2).to(keys.dtype)], 1)
    shared = query.shape[2] // keys.shape[2]  # heads that share a key (grouped queries)
    return query.flatten(1), keys.repeat_interleave(shared, 2).flatten(2)


def _projections(attn: Any) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Return weight and bias of the query and of the key, however the layer keeps them."""
    if attn.qkv is None:
        return (attn.q_proj.weight, attn.q_proj.bias), (attn.k_proj.weight, attn.k_proj.bias)
    size = attn.num_heads * attn.head_dim
    weights = attn.qkv.weight.split(size)
    if getattr(attn, "q_bias", None) is not None:
        return (weights[0], attn.q_bias), (weights[1], attn.k_bias)
    biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(size)
    return (weights[0], biases[0]), (weights[1], biases[1])


def wrap(
    vit: Any,
    name: str,
    px: int | None,
    pos: Option | None,
    weights: str,
    mean: Any = None,
    std: Any = None,
) -> TimmVit:
    """Return the teacher at `px` input pixels, positions resized as `pos` says."""
    check_architecture(vit, name)
    native = int(vit.patch_embed.img_size[0])
    px = px or native
    shrink_from = position_embedding.rendered_px(name, pos, native, px)
    if pos not in (None, "tensor-bicubic") and vit.pos_embed is None:
        raise UsageError(
            f"teacher {name!r}: pos={pos}, but its positions are rotary, none are resized; leave "
            "pos out"
        )
    if px != native:
        _resize(vit, px, str(pos or DEFAULT_POS))
    return TimmVit(vit, weights, mean, std, shrink_from)


def _resize(vit: Any, px: int, mode: str) -> None:
    """Set another input size: timm adapts the grid and what is rotary, the learned positions are
    resized by our rule."""
    before = None if vit.pos_embed is None else vit.pos_embed.detach().clone()
    vit.set_input_size(img_size=(px, px))
    if before is not None:
        prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
        resized = position_embedding.resize_positions(
            before, int(vit.patch_embed.grid_size[0]), mode, prefix
        )
        vit.pos_embed = nn.Parameter(resized, requires_grad=False)


def check_architecture(vit: Any, name: str) -> None:
    """Refuse layers whose attention is not known here: they would be read wrongly, and nobody would
    notice."""
    from timm.layers.attention import Attention, AttentionRope
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    known = (
        (VisionTransformer, Block, Attention), (VisionTransformerDistilled, Block, Attention),
        (Eva, EvaBlock, EvaAttention), (Eva, EvaBlock, AttentionRope),
    )  # fmt: skip
    last = vit.blocks[-1] if len(getattr(vit, "blocks", ())) else None
    plain = (
        type(vit),
        type(last),
        type(getattr(last, "attn", None)),
    ) in known and vit.in_chans == 3
    if not plain or (vit.cls_token is None and not _has_attention_pool(vit)):
        raise UserError(
            f"teacher {name!r} is a timm {type(vit).__name__} without what is read here: a "
            "VisionTransformer or Eva with plain attention, three colours, and a [CLS] token or an "
            "attention pool is needed, such as vit_base_patch16_224"
        )


def _has_attention_pool(vit: Any) -> bool:
    """Return whether one query of an attention pool looks at the tokens."""
    from timm.layers import AttentionPoolLatent

    return type(vit.attn_pool) is AttentionPoolLatent and vit.attn_pool.latent_len == 1
