"""The tensors of transformers' vision towers get the names of the networks that are run here.

    CLIPModel, CLIPVisionModel(WithProjection)         ->  open_clip's VisionTransformer
    ViTModel, Dinov2Model, Dinov2WithRegistersModel    ->  dinov2's own, which timm reads; those of
                                                           a ViT are timm's
    DINOv3ViTModel                                     ->  timm's

Names are those that `save_pretrained` writes, which are the hub's. Query, key and value lie apart
there and are one here. D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "pre_layrnorm.": "ln_pre.",  # so spelled there
    "post_layernorm.": "ln_post.",
}
_CLIP_BLOCK = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_VIT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
_VIT_BLOCK = {
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_DINOV3 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "norm.": "norm.",
}
_DINOV3_BLOCK = {
    "attention.q_bias": "attn.q_bias",
    "attention.v_bias": "attn.v_bias",
    "attention.o_proj.": "attn.proj.",
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "mlp.up_proj.": "mlp.fc1.",
    "mlp.down_proj.": "mlp.fc2.",
    "layer_scale1.lambda1": "gamma_1",
    "layer_scale2.lambda1": "gamma_2",
}
_QKV = ("q", "k", "v")
_DINOV3_QKV = {f"attention.{part}_proj.": part for part in _QKV}
_CLIP_QKV = {f"self_attn.{part}_proj.": part for part in _QKV}
_VIT_QKV = {f"attention.attention.{name}.": name[0] for name in ("query", "key", "value")}
# of the whole model, beside its picture tower
_CLIP_OTHERS = ("text_model.", "text_projection.", "logit_scale", "embeddings.position_ids")
_VIT_OTHERS = ("pooler.", "classifier.")


def clip_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the picture tower of a CLIP under open_clip's names; ValueError for a name that is
    none of it. `proj` (D, E) is there where the file has a projection."""
    own = _without(state, "vision_model.")
    projection = own.pop("visual_projection.weight", None)
    kept = {name: value for name, value in own.items() if not name.startswith(_CLIP_OTHERS)}
    found = _renamed(
        kept, _CLIP, (r"encoder\.layers\.(\d+)\.", "transformer.resblocks."), _CLIP_BLOCK, _CLIP_QKV
    )
    found = {name.replace("attn.qkv.", "attn.in_proj_"): value for name, value in found.items()}
    return found if projection is None else {**found, "proj": projection.T.contiguous()}


def vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT or DINOv2 under dinov2's names, without its classifier and pooler; ValueError
    for a name that is none of it."""
    own = _without(_without(state, "vit."), "dinov2.")
    own = _without(own, "dinov2_with_registers.")
    kept = {name: value for name, value in own.items() if not name.startswith(_VIT_OTHERS)}
    return _renamed(kept, _VIT, (r"encoder\.layer\.(\d+)\.", "blocks."), _VIT_BLOCK, _VIT_QKV)


def dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a DINOv3 ViT under timm's names, without mask token and classifier; ValueError for a
    name that is none of it. Keys have no bias, so those of queries and values stay apart."""
    own = _without(_without(state, "model."), "dinov3_vit.")
    others = (*_VIT_OTHERS, "embeddings.mask_token")
    kept = {
        re.sub(r"attention\.([qv])_proj\.bias$", r"attention.\1_bias", name): value
        for name, value in own.items()
        if not name.startswith(others)
    }
    return _renamed(kept, _DINOV3, (r"layer\.(\d+)\.", "blocks."), _DINOV3_BLOCK, _DINOV3_QKV)


def _without(state: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Take a prefix off; two tensors that then have one name are a ValueError."""
    found = {name.removeprefix(start): value for name, value in state.items()}
    if len(found) != len(state):
        raise ValueError(f"two tensors have one name, with and without {start!r}")
    return found


def _renamed(
    state: Mapping[str, Tensor],
    top: Mapping[str, str],
    block: tuple[str, str],
    parts: Mapping[str, str],
    qkv: Mapping[str, str],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        within = re.match(block[0], name)
        rest = name[within.end() :] if within else name
        start = f"{block[1]}{within[1]}." if within else ""
        if within and (key := next((key for key in qkv if rest.startswith(key)), "")):
            whole = f"{start}attn.qkv.{rest.removeprefix(key)}"
            apart.setdefault(whole, {})[qkv[key]] = value
            continue
        table = parts if within else top
        old = next((old for old in table if rest.startswith(old)), None)
        if old is None:
            raise ValueError(f"{name[:100]!r} is no tensor of such a network")
        found[start + table[old] + rest.removeprefix(old)] = value
    return found | {name: _joined(name, values) for name, values in apart.items()}


def _joined(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Join query, key and value along their outputs."""
    if missing := [part for part in _QKV if part not in parts]:
        raise ValueError(f"{name[:100]!r} lacks its {', '.join(missing)}")
    values = [parts[part] for part in _QKV]
    if len({value.shape for value in values}) > 1 or values[0].ndim not in (1, 2):
        raise ValueError(f"{name[:100]!r} has query, key and value of different shapes")
    return torch.cat(values)
