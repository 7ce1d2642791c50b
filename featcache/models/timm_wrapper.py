"""A timm transformer becomes a teacher that is read through hooks.

The first prefix token is [CLS] wherever timm names one, and registers are left out. RADIO has a
summary token for each of the models that it was distilled from: its authors call them cls tokens
(`ClsToken`, one per teacher), read each with its own teacher's head and give their concatenation as
the picture's summary; none is the model's only [CLS]. timm takes the first for its `cls_token` and
the others for registers, and so does this: the authors' lists of teachers begin with the CLIP
(DFN CLIP, SigLIP2), whose token is the one of semantics, by which they classify without examples.

Where the model pools its tokens by one learned query, that query's attention is stored, else that
of [CLS] in the last block, else there is none. Perception Encoder's core has both a [CLS] and a
pool: its published embedding of a picture is the pool's output, so that the pool's weights say
which patches make it, and [CLS] is one more token that the pool looks at.
"""

from __future__ import annotations

import warnings
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
from featcache.models.hooks import (
    BlockOutputs,
    normalise_pixels,
    rms_tail_arrays,
    tail_arrays,
)
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
        self.has_attention = True
        self._attention = torch.empty(0)
        self._block_outputs = BlockOutputs(vit.blocks)
        _norm_in_weights_dtype(vit)
        if _has_attention_pool(vit):
            vit.norm.register_forward_hook(self._record_pool_attention)
        elif vit.cls_token is not None:
            vit.blocks[-1].attn.register_forward_pre_hook(
                self._record_cls_attention, with_kwargs=True
            )
        else:
            self.has_attention = False

    def _record_cls_attention(
        self, attn: Any, inputs: tuple[Tensor, ...], more: Mapping[str, Any]
    ) -> None:
        """Keep the [CLS] row of the last block's attention, from its normed tokens (B, T, D)."""
        self._attention = attention_of_cls(attn, inputs[0], more, self.vit.num_prefix_tokens)

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
        """Map uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P), or (B, 0) where the
        model has none."""
        pixels = normalise_pixels(images, self.pixel_mean, self.pixel_std)
        if self._shrinks:
            pixels = position_embedding.shrink_pixels(pixels, self._tower_px)
        self.vit.forward_features(pixels)
        attention = self._attention if self.has_attention else pixels.new_empty(len(pixels), 0)
        return [self._stored_tokens(y) for y in self._block_outputs.take(levels)], attention

    def _stored_tokens(self, y: Tensor) -> Tensor:
        """Keep [CLS], or the mean of the patches, and the patches: (B, prefix + P, D) -> (B, 1 + P,
        D)."""
        prefix = self.vit.num_prefix_tokens
        patches = y[:, prefix:]
        if self.first_token == "mean":
            return torch.cat([patches.mean(1, keepdim=True), patches], 1)
        return y if prefix == 1 else torch.cat([y[:, :1], patches], 1)

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the arrays of the final norm on the tokens, or that there is none: RADIO's and
        PE-Spatial's tokens are as the last block gives them, and so are those that are pooled
        before they are normed. Nothing is returned of another kind of norm."""
        from timm.layers import RmsNorm

        norm = self.vit.norm
        if isinstance(norm, nn.LayerNorm):
            return tail_arrays(norm)
        if isinstance(norm, RmsNorm):
            return rms_tail_arrays(norm)
        return {"identity": np.array(1, np.float32)} if isinstance(norm, nn.Identity) else {}


def _norm_in_weights_dtype(vit: nn.Module) -> None:
    """Let RMS norms run in float32 under autocast, as torch lets a LayerNorm; else nothing
    changes. Torch would mix the two dtypes, slowly, and warn of it."""
    from timm.layers import RmsNorm

    for module in vit.modules():
        if isinstance(module, RmsNorm):
            module.register_forward_pre_hook(
                lambda norm, given: (given[0].to(norm.weight.dtype), *given[1:])
            )


def attention_of_cls(attn: Any, x: Tensor, more: Mapping[str, Any], prefix: int) -> Tensor:
    """Compute the [CLS] row (B, P) of a timm layer of attention, from its normed tokens x (B, T, D)
    and what else it was called with; `targets.attention.cls_attention` says of what kind it is."""
    query, keys = _query_keys(attn, x, more.get("rope"))
    bias = _position_bias(attn, more.get("shared_rel_pos_bias"))
    return cls_attention(query, keys, attn.num_heads, prefix, bias)


def _query_keys(attn: Any, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
    """Map normed tokens x (B, T, D) -> the [CLS] query (B, H d) and all keys (B, T, H d), normed
    and rotated."""
    (wq, bq), (wk, bk) = _projections(attn)
    query = F.linear(x[:, :1], wq, bq).unflatten(-1, (attn.num_heads, -1))
    keys = F.linear(x, wk, bk).unflatten(-1, (-1, query.shape[-1]))  # (B, T, H, d)
    if hasattr(attn, "q_norm"):  # BEiT's has none
        query, keys = attn.q_norm(query), attn.k_norm(keys)
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
    size = attn.qkv.weight.shape[0] // 3
    weights = attn.qkv.weight.split(size)
    if getattr(attn, "q_bias", None) is not None:
        return (weights[0], attn.q_bias), (weights[1], attn.k_bias)
    biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(size)
    return (weights[0], biases[0]), (weights[1], biases[1])


def _position_bias(attn: Any, shared: Tensor | None) -> Tensor | None:
    """Return the [CLS] row of BEiT's biases of relative positions (H, T): the block's own (1, H, T,
    T), and those that all blocks share (H, T, T)."""
    own = getattr(attn, "relative_position_bias_table", None) is not None
    biases = [attn._get_rel_pos_bias()] if own else []
    biases += [] if shared is None else [shared]
    return (
        torch.stack([bias[..., 0, :].flatten(0, -2) for bias in biases]).sum(0) if biases else None
    )


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
            f"teacher {name!r}: pos={pos}, but its positions are rotary or relative, none are "
            "resized by it; leave pos out"
        )
    if px != native:
        _resize(vit, px, str(pos or DEFAULT_POS))
    return TimmVit(vit, weights, mean, std, shrink_from)


def _resize(vit: Any, px: int, mode: str) -> None:
    """Set another input size: timm adapts the grid and what is rotary or relative, the learned
    positions are resized by our rule."""
    before = None if vit.pos_embed is None else vit.pos_embed.detach().clone()
    set_input_px(vit, px)
    if before is not None:
        resized = position_embedding.resize_positions(
            before, int(vit.patch_embed.grid_size[0]), mode, position_prefix(vit)
        )
        vit.pos_embed = nn.Parameter(resized, requires_grad=False)


def set_input_px(vit: Any, px: int) -> None:
    """Let timm set another input size, and resize what it holds of positions."""
    with warnings.catch_warnings():  # of torch, on how timm resizes BEiT's tables
        warnings.filterwarnings("ignore", category=UserWarning, module=r"timm\.")
        vit.set_input_size(img_size=(px, px))


def position_prefix(vit: Any) -> int:
    """Count the prefix tokens that have learned positions."""
    return 0 if getattr(vit, "no_embed_class", False) else int(vit.num_prefix_tokens)


def check_architecture(vit: Any, name: str) -> None:
    """Refuse layers whose attention is not known here: they would be read wrongly, and nobody would
    notice."""
    from timm.layers.attention import Attention, AttentionRope
    from timm.models import beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva, EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block, VisionTransformer

    known = (
        (VisionTransformer, Block, Attention), (VisionTransformerDistilled, Block, Attention),
        (Eva, EvaBlock, EvaAttention), (Eva, EvaBlock, AttentionRope),
        (beit.Beit, beit.Block, beit.Attention),
    )  # fmt: skip
    last = vit.blocks[-1] if len(getattr(vit, "blocks", ())) else None
    plain = (
        type(vit),
        type(last),
        type(getattr(last, "attn", None)),
    ) in known and vit.in_chans == 3
    if not plain:
        raise UserError(
            f"teacher {name!r} is a timm {type(vit).__name__} without what is read here: a "
            "VisionTransformer, Eva or Beit with plain attention and three colours is needed, such "
            "as vit_base_patch16_224"
        )


def _has_attention_pool(vit: Any) -> bool:
    """Return whether one query of an attention pool looks at the tokens."""
    from timm.layers import AttentionPoolLatent

    pool = getattr(vit, "attn_pool", None)  # a Beit has none
    return type(pool) is AttentionPoolLatent and pool.latent_len == 1
