"""An open_clip picture tower becomes a teacher that is read through hooks.

B batch, T tokens, P patches, D width, S input pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models import position_embedding
from featcache.models.contract import Option
from featcache.models.hooks import BlockOutputs, normalise_pixels, tail_arrays
from featcache.models.timm_wrapper import DEFAULT_POS, check_architecture
from featcache.models.timm_wrapper import wrap as wrap_timm
from featcache.models.transformers_folder import Architecture, activation_of
from featcache.targets.attention import cls_attention

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class OpenClipVit(nn.Module):
    """Read an open_clip VisionTransformer, `visual`, through hooks: y_k of each block, and the last
    block's [CLS] attention."""

    name = "clip"

    def __init__(
        self, visual: Any, weights: str, mean: Any = None, std: Any = None, shrink_from: int = 0
    ) -> None:
        super().__init__()
        self.visual = visual
        self.weights = weights
        self._tower_px, self._shrinks = int(visual.image_size[0]), bool(shrink_from)
        self.input_px = shrink_from or self._tower_px
        self.patches = int(visual.grid_size[0] * visual.grid_size[1])
        self.width = int(visual.transformer.width)
        self.depth = len(visual.transformer.resblocks)
        self.pixel_mean, self.pixel_std = tuple(mean or OPENAI_MEAN), tuple(std or OPENAI_STD)
        self._attention = torch.empty(0)
        self._block_outputs = BlockOutputs(visual.transformer.resblocks)
        visual.transformer.resblocks[-1].attn.register_forward_pre_hook(self._record_cls_attention)

    def _record_cls_attention(self, attn: Any, inputs: tuple[Tensor, ...]) -> None:
        """Keep the [CLS] row of the last block's attention, from its normed tokens (B, T, D): one
        query, all keys."""
        x, biases = inputs[0], (None, None)
        weights = attn.in_proj_weight.chunk(3)
        if attn.in_proj_bias is not None:
            biases = attn.in_proj_bias.chunk(3)[:2]
        query, keys = F.linear(x[:, :1], weights[0], biases[0]), F.linear(x, weights[1], biases[1])
        if hasattr(attn, "ln_q"):  # open_clip's own attention, with norms or identities
            query = attn.ln_q(query.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
            keys = attn.ln_k(keys.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
        self._attention = cls_attention(query[:, 0], keys, attn.num_heads)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Map uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P)."""
        pixels = normalise_pixels(images, self.pixel_mean, self.pixel_std)
        if self._shrinks:
            pixels = position_embedding.shrink_pixels(pixels, self._tower_px)
        self.visual(pixels)
        return self._block_outputs.take(levels), self._attention

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the arrays of the final norm and, where the weights have one, the projection; none
        where a pool of its own comes before the norm (CoCa)."""
        if self.visual.attn_pool is not None:
            return {}
        proj = self.visual.proj
        return tail_arrays(self.visual.ln_post, **({} if proj is None else {"proj": proj}))


def wrap(
    visual: Any,
    name: str,
    options: Mapping[str, Option],
    default_px: int | None,
    weights: str,
    mean: Any = None,
    std: Any = None,
) -> nn.Module:
    """Return the tower as a teacher at the input size and with the positions that the options name.

    open_clip builds some of its towers by timm; those are read as timm's. A tower whose attention
    is not known here is a UserError.
    """
    from open_clip.timm_model import TimmModel

    pos = options.get("pos")
    if isinstance(visual, TimmModel):
        check_architecture(visual.trunk, name)
        patch_px = int(visual.trunk.patch_embed.patch_size[0])
        px = position_embedding.resolve_input_px(name, options, patch_px, default_px)
        return wrap_timm(visual.trunk, name, px, pos, weights, mean, std)
    _check_attention(visual, name)
    native, patch_px = int(visual.image_size[0]), int(visual.patch_size[0])
    px = position_embedding.resolve_input_px(name, options, patch_px, default_px) or native
    shrink_from = position_embedding.rendered_px(name, pos, native, px)
    if px != native:
        side, positions = px // patch_px, visual.positional_embedding.detach()[None]
        mode = str(pos or DEFAULT_POS)
        grid = position_embedding.resize_positions(positions, side, mode, 1)
        set_positions(visual, grid[0], side)
    return OpenClipVit(visual, weights, mean, std, shrink_from)


def _check_attention(visual: Any, name: str) -> None:
    """Refuse a tower without the plain attention that the hooks read."""
    from open_clip.transformer import Attention, VisionTransformer

    attn: Any = (
        visual.transformer.resblocks[-1].attn if isinstance(visual, VisionTransformer) else None
    )
    if type(attn) is not nn.MultiheadAttention and (
        type(attn) is not Attention or attn.scaled_cosine
    ):
        raise UserError(
            f"teacher {name!r} is an open_clip {type(visual).__name__} without what is read here: "
            "a VisionTransformer with plain attention is needed, such as ViT-B-16"
        )


def architecture_of(visual: Any, name: str) -> Architecture:
    """Return the sizes of a tower, its activation and eps, as transformers' config has them."""
    _check_attention(visual, name)
    block = visual.transformer.resblocks[0]
    return Architecture(
        width=int(visual.transformer.width),
        depth=len(visual.transformer.resblocks),
        heads=int(block.attn.num_heads),
        mlp_width=int(block.mlp.c_fc.out_features),
        patch_px=int(visual.patch_size[0]),
        registers=0,
        activation=activation_of(block.mlp.gelu),
        layer_norm_eps=float(visual.ln_post.eps),
    )


def set_positions(visual: Any, values: Tensor, side: int) -> None:
    """Set the positions (1 + side * side, D), and the grid and input size that go with them."""
    visual.positional_embedding = nn.Parameter(values.clone(), requires_grad=False)
    visual.grid_size = (side, side)
    visual.image_size = (side * int(visual.patch_size[0]),) * 2
