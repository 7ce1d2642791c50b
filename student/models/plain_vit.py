"""A trained encoder is written as the plain ViT that other libraries know, under the names of MAE's
released checkpoints.

    LayerScale        x + g * (W a + b) = x + ((g W) a + g b): folded into a branch's last Linear
    no bias on keys   q_bias, 0, v_bias in one qkv.bias
    no bias at all    zeros

Whatever a plain ViT has not (relative positions, registers, a norm before the blocks, another
activation) cannot be folded and is refused by name.

D width, M width of the MLP, P patches, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GELU, Mlp
from timm.models import beit, vision_transformer
from torch import Tensor, nn

from featcache.errors import UserError


@dataclass(frozen=True)
class PlainVit:
    """Hold a plain ViT: its weights under MAE's names, and its sizes. Its activation is the exact
    GELU. `pool` is empty for an encoder, cls or mean for a classifier of `classes`."""

    state: dict[str, Tensor]
    width: int
    depth: int
    heads: int
    mlp_width: int
    img_px: int
    patch_px: int
    eps: float
    pool: str
    classes: int


def plain_vit(net: nn.Module, what: str, otherwise: str) -> PlainVit:
    """Return a network as a plain ViT. Raises UserError that names what `what` cannot express, and
    says `otherwise`, what to do instead."""
    if reasons := missing_parts(net):
        raise UserError(f"{what} cannot express {', '.join(reasons)}; {otherwise}")
    return _convert(net)


def missing_parts(net: Any) -> list[str]:
    """Return what a network has that a plain ViT has not, or the other way round."""
    if type(net) not in (beit.Beit, vision_transformer.VisionTransformer):
        return [f"the network {type(net).__name__[:80]}"]
    norms = [part for part in net.modules() if isinstance(part, nn.LayerNorm)]
    last = [part for part in (net.norm, net.fc_norm) if not isinstance(part, nn.Identity)]
    wrong = {
        "relative positions": _has_tables(net),
        "a network without absolute positions": net.pos_embed is None and not _has_tables(net),
        "another final norm than one LayerNorm": [isinstance(x, nn.LayerNorm) for x in last]
        != [True],
        "norms with different eps": len({part.eps for part in norms}) > 1,
        "patches or pictures that are not square": len(set(net.patch_embed.img_size)) > 1
        or len(set(net.patch_embed.patch_size)) > 1,
        "a norm of the embedded patches": not isinstance(net.patch_embed.norm, nn.Identity),
        "a head that is no Linear": not isinstance(net.head, nn.Linear | nn.Identity),
        "a norm on the other side of the pool": _pools_before_norm(net),
        **_vit_parts(net),
    }
    blocks = dict.fromkeys(name for block in net.blocks for name in _block_parts(block))
    return [name for name, found in wrong.items() if found] + list(blocks)


def _has_tables(net: Any) -> bool:
    return any("relative_position_bias_table" in name for name, _ in net.named_parameters())


def _pools_before_norm(net: Any) -> bool:
    """Tell whether a classifier norms on the other side of its pool than MAE's does."""
    if isinstance(net.head, nn.Identity):
        return isinstance(net.norm, nn.Identity)
    return isinstance(net.fc_norm, nn.Identity) != (net.global_pool == "token")


def _vit_parts(net: Any) -> dict[str, bool]:
    """Return what timm's VisionTransformer may have beyond its Beit."""
    if isinstance(net, beit.Beit):
        return {}
    return {
        "a network without a class token": not net.has_class_token,
        "register tokens": net.num_reg_tokens > 0,
        "a norm before the blocks": not isinstance(net.norm_pre, nn.Identity),
        "a class token without a position": net.no_embed_class,
        "attention pooling": net.attn_pool is not None,
        "a mean over prefix tokens": net.pool_include_prefix,
    }


_ATTENTION = (vision_transformer.Attention, beit.Attention)
_BLOCK = (vision_transformer.Block, beit.Block)


def _block_parts(block: Any) -> list[str]:
    if type(block) not in _BLOCK or type(block.attn) not in _ATTENTION:
        return [f"blocks of another kind ({type(block).__name__[:80]})"]
    attn, mlp = block.attn, block.mlp
    extra = [getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm")]
    heads_width = attn.qkv.out_features // 3
    wrong = {
        "norms inside the attention": any(
            part is not None and not isinstance(part, nn.Identity) for part in extra
        ),
        "heads that are not as wide as the network": heads_width != attn.qkv.in_features
        or attn.scale != (heads_width // attn.num_heads) ** -0.5,
        "an MLP of another kind": type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity),
        "another activation than the exact GELU": not _is_gelu(mlp.act),
        "norms other than LayerNorm": not all(
            isinstance(part, nn.LayerNorm) for part in (block.norm1, block.norm2)
        ),
    }
    return [name for name, found in wrong.items() if found]


def _is_gelu(act: nn.Module) -> bool:
    return type(act) is GELU or (type(act) is nn.GELU and act.approximate == "none")


# --- conversion -----------------------------------------------------------------------------------


def _convert(net: Any) -> PlainVit:
    width, classes = int(net.embed_dim), int(getattr(net.head, "out_features", 0))
    mean = classes and net.global_pool != "token"
    first = net.blocks[0]
    return PlainVit(
        _state(net, "fc_norm" if mean else "norm"),
        width=width,
        depth=len(net.blocks),
        heads=int(first.attn.num_heads),
        mlp_width=int(first.mlp.fc1.out_features),
        img_px=int(net.patch_embed.img_size[0]),
        patch_px=int(net.patch_embed.patch_size[0]),
        eps=float(first.norm1.eps),
        pool="" if not classes else "mean" if mean else "cls",
        classes=classes,
    )


def _state(net: Any, norm: str) -> dict[str, Tensor]:
    state = {"cls_token": net.cls_token, "pos_embed": net.pos_embed}
    state |= _linear("patch_embed.proj", net.patch_embed.proj)
    for i, block in enumerate(net.blocks):
        state |= {f"blocks.{i}.{name}": value for name, value in _block(block).items()}
    last = net.norm if isinstance(net.fc_norm, nn.Identity) else net.fc_norm
    state |= {f"{norm}.weight": last.weight, f"{norm}.bias": last.bias}
    if isinstance(net.head, nn.Linear):
        state |= _linear("head", net.head)
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _block(block: Any) -> dict[str, Tensor]:
    one, two = _scales(block)
    return {
        "norm1.weight": block.norm1.weight,
        "norm1.bias": block.norm1.bias,
        "attn.qkv.weight": block.attn.qkv.weight,
        "attn.qkv.bias": _qkv_bias(block.attn),
        **_linear("attn.proj", block.attn.proj, one),
        "norm2.weight": block.norm2.weight,
        "norm2.bias": block.norm2.bias,
        **_linear("mlp.fc1", block.mlp.fc1),
        **_linear("mlp.fc2", block.mlp.fc2, two),
    }


def _scales(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the LayerScale (D,) of both branches; None where there is none."""
    if isinstance(block, beit.Block):
        return block.gamma_1, block.gamma_2
    return getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None)


def _qkv_bias(attn: Any) -> Tensor:
    """Return the bias (3D,) of q, k and v, with zeros where there is none."""
    if isinstance(attn, beit.Attention) and attn.q_bias is not None:
        return torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    return _bias(attn.qkv)


def _linear(name: str, layer: Any, scale: Tensor | None = None) -> dict[str, Tensor]:
    weight, bias = layer.weight, _bias(layer)
    if scale is not None:
        weight, bias = scale.unsqueeze(1) * weight, scale * bias
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _bias(layer: Any) -> Tensor:
    """Return the bias of a layer, zeros where it has none."""
    bias: Tensor | None = layer.bias
    return layer.weight.new_zeros(len(layer.weight)) if bias is None else bias
