"""CLIP's picture towers through open_clip (METHODS 0.8).

OpenAI's weights were trained with QuickGELU; the plain architecture with these weights is silently wrong and costs
points. Every registered name therefore fixes the pair, and a tag carries its own activation from open_clip's table.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache import targets, teachers
from featcache.errors import UsageError, near

NAMES = {
    "clip-b16": teachers.Row("open_clip ViT-B-16 openai (QuickGELU)", 224, 196, 768, 12),
    "clip-b32": teachers.Row("open_clip ViT-B-32 openai (QuickGELU)", 224, 49, 768, 12),
}
_ARCHITECTURES = {"clip-b16": "ViT-B-16", "clip-b32": "ViT-B-32"}
_TAG = "openai"


class Clip(nn.Module):
    """`visual`: an open_clip VisionTransformer, read through hooks: y_k of each block, the last [CLS] attention."""

    name = "clip"

    def __init__(self, visual: Any, weights: str, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.visual = visual
        self.weights = weights
        self.input_px = int(visual.image_size[0])
        self.patches = int(visual.grid_size[0] * visual.grid_size[1])
        self.width = int(visual.transformer.width)
        self.depth = len(visual.transformer.resblocks)
        self.pixel_mean = tuple(mean or open_clip.OPENAI_DATASET_MEAN)
        self.pixel_std = tuple(std or open_clip.OPENAI_DATASET_STD)
        self._attention = torch.empty(0)
        self._tap = teachers.Tap(visual.transformer.resblocks, self._see_last)

    def _see_last(self, block: Any, x: Tensor) -> None:
        x = block.ln_1(x)  # (B, T, D)
        weight, bias = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        query, keys = F.linear(x[:, 0], weight[0], bias[0]), F.linear(x, weight[1], bias[1])
        self._attention = targets.cls_attention(query, keys, block.attn.num_heads)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """uint8 (B, 3, S, S) -> [y_k (B, 1 + P, D)], attention (B, P)."""
        self.visual(teachers.pixels(images, self.pixel_mean, self.pixel_std))
        return self._tap.take(levels), self._attention

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        norm = self.visual.ln_post
        parts = {"gamma": norm.weight, "beta": norm.bias, "proj": self.visual.proj, "eps": torch.tensor(norm.eps)}
        return {name: part.detach().cpu().float().numpy() for name, part in parts.items()}


def load(name: str, options: dict[str, teachers.Option], weights: str | None) -> Clip:
    """`weights` None is the registered tag; a file is loaded into the QuickGELU architecture."""
    if options:
        raise UsageError(f"teacher {name!r} takes no options, {', '.join(options)} given")
    arch = _ARCHITECTURES[name]
    path = teachers.file_weights(weights)
    if path or (weights and teachers.is_random(weights)):
        visual = teachers.build(lambda: _create(arch, None, quick_gelu=True), weights)
        if path:
            state = teachers.read_state(path, name)
            own = {key.removeprefix("visual."): v for key, v in state.items() if key.startswith("visual.")} or state
            teachers.load_state(visual, own, path, name)
        return Clip(visual, str(weights))
    tag = weights or _TAG
    known = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in known:
        raise UsageError(f"unknown weights {tag!r} of {name}: {near(tag, known)}; or a file, or random:SEED")
    about = open_clip.get_pretrained_cfg(arch, tag)
    quick = bool(about.get("quick_gelu"))
    visual = teachers.fetch(lambda: _create(arch, tag, quick_gelu=quick), name, tag)
    return Clip(visual, weights or teachers.REGISTERED, about.get("mean"), about.get("std"))


def _create(arch: str, tag: str | None, *, quick_gelu: bool) -> nn.Module:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # open_clip warns that nothing was loaded, as was asked for
    try:
        model = open_clip.create_model(arch, pretrained=tag, force_quick_gelu=quick_gelu)
    finally:
        logging.disable(before)
    return model.visual
