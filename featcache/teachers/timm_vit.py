"""Any timm VisionTransformer with a [CLS] token: DINO by its short name, others as `timm:NAME[,key=value...]`.

The options after the name go to timm's constructor, so a small teacher of one's own is
`timm:vit_small_patch16_224,img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4` with `--weights FILE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from featcache import targets, teachers
from featcache.errors import UsageError, UserError, near

PREFIX = "timm"
NAMES = {
    "dino-b16": teachers.Row("timm vit_base_patch16_224.dino", 224, 196, 768, 12),
    "dino-s16": teachers.Row("timm vit_small_patch16_224.dino", 224, 196, 384, 12),
}
_ARCHITECTURES = {"dino-b16": "vit_base_patch16_224.dino", "dino-s16": "vit_small_patch16_224.dino"}


class TimmVit(nn.Module):
    """`vit`: a timm VisionTransformer, read through hooks; register tokens are dropped, [CLS] and patches are kept."""

    name = "timm"

    def __init__(self, vit: Any, weights: str) -> None:
        super().__init__()
        self.vit = vit
        self.weights = weights
        self.input_px = int(vit.patch_embed.img_size[0])
        self.patches = int(vit.patch_embed.num_patches)
        self.width, self.depth = int(vit.embed_dim), len(vit.blocks)
        self.pixel_mean, self.pixel_std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
        self._attention = torch.empty(0)
        self._tap = teachers.Tap(vit.blocks, self._see_last)

    def _see_last(self, block: Any, x: Tensor) -> None:
        attn, width = block.attn, self.width
        x = block.norm1(x)  # (B, T, D)
        bias = attn.qkv.bias if attn.qkv.bias is not None else x.new_zeros(3 * width)
        query = F.linear(x[:, 0], attn.qkv.weight[:width], bias[:width])
        keys = F.linear(x, attn.qkv.weight[width : 2 * width], bias[width : 2 * width])
        query = attn.q_norm(query.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
        keys = attn.k_norm(keys.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
        self._attention = targets.cls_attention(query, keys, attn.num_heads, self.vit.num_prefix_tokens)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P)."""
        self.vit.forward_features(teachers.pixels(images, self.pixel_mean, self.pixel_std))
        extra = self.vit.num_prefix_tokens - 1
        ys = self._tap.take(levels)
        return [torch.cat([y[:, :1], y[:, 1 + extra :]], 1) if extra else y for y in ys], self._attention

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Empty where the model has no final LayerNorm on its tokens (it then pools first)."""
        norm = self.vit.norm
        if not isinstance(norm, nn.LayerNorm):
            return {}
        parts = {"gamma": norm.weight, "beta": norm.bias, "eps": torch.tensor(norm.eps)}
        return {name: part.detach().cpu().float().numpy() for name, part in parts.items()}


def load(name: str, options: dict[str, teachers.Option], weights: str | None) -> TimmVit:
    """`weights` None is timm's registered tag; a classifier head in a file is not the teacher's and is left out."""
    arch = _ARCHITECTURES.get(name, name.removeprefix(f"{PREFIX}:"))
    _check_name(arch)
    path = teachers.file_weights(weights)
    if path or (weights and teachers.is_random(weights)):
        vit = teachers.build(lambda: _create(arch, options, pretrained=False), weights)
        if path:
            state = teachers.read_state(path, name)
            kept = vit.state_dict().keys()
            own = {k: v for k, v in state.items() if k in kept or not k.startswith(("head.", "fc_norm."))}
            teachers.load_state(vit, own, path, name)
        return TimmVit(_check_kind(vit, name), str(weights))
    if weights is not None:
        raise UsageError(
            f"weights {weights!r} of {name}: a file or random:SEED is allowed; a tag is part of timm's name"
        )
    tag = arch.partition(".")[2] or "default"
    vit = teachers.fetch(lambda: _create(arch, options, pretrained=True), name, tag)
    return TimmVit(_check_kind(vit, name), teachers.REGISTERED)


def _check_name(arch: str) -> None:
    bare = arch.partition(".")[0]
    if not arch.startswith(("hf-hub:", "local-dir:")) and bare not in timm.list_models():
        raise UsageError(f"unknown timm model {bare!r}: {_near_models(bare)}")


def _near_models(bare: str) -> str:
    return near(bare, timm.list_models("vit_*"))[:200] + " ... (timm.list_models('vit_*') lists all)"


def _check_kind(vit: Any, name: str) -> VisionTransformer:
    plain = type(vit) is VisionTransformer and type(vit.blocks[-1]) is Block and type(vit.blocks[-1].attn) is Attention
    if not plain or vit.cls_token is None:
        raise UserError(
            f"teacher {name!r} is a timm {type(vit).__name__} without what is read here: a VisionTransformer with a "
            "[CLS] token and plain attention is needed, such as vit_base_patch16_224"
        )
    return vit


def _create(arch: str, options: dict[str, teachers.Option], *, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(arch, pretrained=pretrained, num_classes=0, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # timm hands options to the constructor
        raise UsageError(
            f"timm model {arch!r} with options {options}: {error}; give its constructor's arguments"
        ) from error
