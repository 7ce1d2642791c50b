"""The encoders of the CAE and BEiT families are timm's Beit with each family's positions and start
values.

Both have LayerScale on the two branches of a block and no bias on the keys. They differ in where
positions come from:

    cae     fixed sines and cosines, rows first (vit.sincos, layout cae), added to the tokens;
            Xavier start
    beit    one table of relative positions, shared by all blocks, added to the attention; no
            absolute positions; truncated normals, the ends of both branches scaled down with depth
            (Feature Distillation's student)

An encoder's state dict loads into timm by name: timm.create_model("beit_base_patch16_224",
num_classes=0, global_pool="token", use_rel_pos_bias=False, ...) with use_abs_pos_emb=True, or with
use_shared_rel_pos_bias=True.

Shapes: B batch, V visible, P patches, D width.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from featcache.errors import UsageError, counted, near
from featcache.models import architecture
from featcache.models.spec import parse_options
from student.models import drop_path as drops
from student.models import vit

FAMILIES = {
    "cae": {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": False},
    "beit": {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
}
# Width, blocks, heads. CAE's tiny and small have 12 heads, where timm's have 3 and 6.
SIZES = {
    "tiny": (192, 12, 12),
    "small": (384, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
OPTIONS = ("embed_dim", "depth", "num_heads", "mlp_ratio")
STD = 0.02  # of truncated normals, cut at one std


# --- building -------------------------------------------------------------------------------------


def build(
    encoder: str,
    family: str,
    *,
    img_size: int = 224,
    patch_size: int = 16,
    drop_path: float = 0.0,
    layer_scale: float = 0.1,
    xavier: bool = True,
    rel_pos: bool = False,
) -> Beit:
    """Build an encoder of the family, without a classifier.

    `encoder` is tiny, small, base or large, or one of these with changes:
    tiny,depth=6,embed_dim=128. `xavier=False` leaves CAE's encoder at BEiT's start values.
    `rel_pos` gives each block a table of relative positions, at zero, beside absolute ones or in
    place of the shared table: for fine-tuning.
    """
    options = parse_encoder(encoder)
    fixed: dict[str, Any] = {
        "num_classes": 0,
        "global_pool": "token",
        "norm_layer": vit.NORM,
        **FAMILIES[family],
        **({"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False} if rel_pos else {}),
    }
    sizes: dict[str, Any] = {
        "img_size": img_size,
        "patch_size": patch_size,
        "drop_path_rate": drop_path,
    }

    def create() -> nn.Module:
        keywords = {"init_values": layer_scale, **fixed, **sizes, **options}
        return timm.create_model("beit_base_patch16_224", **keywords)

    try:
        architecture.check_memory(create, f"cannot build encoder {encoder!r}")
        beit = create()
    except (
        ArithmeticError,
        AssertionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # how timm refuses what does not fit together
        raise UsageError(
            f"cannot build encoder {encoder!r}: timm says {error}; allowed: {', '.join(SIZES)} and "
            f"their options {', '.join(OPTIONS)}; change it with encoder=VALUE"
        ) from None
    assert isinstance(beit, Beit)
    initialise(beit, xavier=xavier and family == "cae")
    drops.replace(beit)
    return beit


def parse_encoder(encoder: str) -> dict[str, Any]:
    """Parse 'tiny,depth=2' into {'embed_dim': 192, 'depth': 2, 'num_heads': 12}; what cannot be
    meant is refused."""
    name, _, tail = encoder.partition(",")
    if name not in SIZES:
        raise UsageError(
            f"unknown encoder {encoder!r} for this recipe: {near(name, SIZES)}, and their options "
            "such as tiny,depth=6,embed_dim=128,num_heads=4; choose one with encoder=NAME"
        )
    given = dict(parse_options(tail))
    for key in given:
        if key not in OPTIONS:
            raise UsageError(
                f"cannot build encoder {encoder!r}: unknown option {key!r}, {near(key, OPTIONS)}"
            )
    architecture.check_keywords(f"cannot build encoder {encoder!r}", given)
    width, depth, heads = SIZES[name]
    options: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads, **given}
    if not options["depth"]:
        raise UsageError(f"cannot build encoder {encoder!r}: depth=0; allowed: at least one block")
    check_heads("encoder", options["embed_dim"], options["num_heads"])
    return options


def check_heads(what: str, width: int, heads: int) -> None:
    """Refuse a width that the heads or 4 (sine and cosine of two axes) do not divide."""
    if width % heads or width % 4:
        raise UsageError(
            f"cannot build the {what}: width {width}, {counted(heads, 'head')}; "
            "allowed: a width that 4 and "
            "the heads divide; change one of them"
        )


@torch.no_grad()
def initialise(beit: Beit, *, xavier: bool) -> None:
    """Set the start values of the released codes; norms at 1 and 0, LayerScale and the table of
    positions as timm made them.

    CAE (Atten4Vis/CAE models/modeling_cae.py:85-112) first takes BEiT's values, then draws every
    Linear anew from Xavier's, so that only the patch kernel and the CLS token keep the truncated
    normals.
    """
    init_weights(beit)
    rescale_by_depth(beit.blocks, "attn.proj", "mlp.fc2")
    if xavier:
        beit.apply(vit.init_linear_and_norm)
    init_truncated_normal(beit.cls_token)
    if beit.pos_embed is not None:
        vit.init_fixed_positions(beit.pos_embed, beit.patch_embed.grid_size[0], layout="cae")


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Set BEiT's start values of every Linear, patch kernel and norm in a module."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            init_truncated_normal(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            vit.init_linear_and_norm(part)


@torch.no_grad()
def rescale_by_depth(blocks: nn.Module, *ends: str) -> None:
    """Divide the last Linears of both branches of block i = 1, 2, ... by the root of 2 i."""
    for i, block in enumerate(blocks.children(), 1):
        for end in ends:
            block.get_submodule(end).get_parameter("weight").div_(math.sqrt(2 * i))


def init_truncated_normal(x: Tensor) -> None:
    """Draw a parameter from the truncated normal."""
    nn.init.trunc_normal_(x, std=STD, a=-STD, b=STD)


# --- encoding -------------------------------------------------------------------------------------


def encode(beit: Beit, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Encode the visible patches: images (B,3,H,W), ids_keep (B,V) -> (B,1+V,D), CLS first, after
    the final norm; family cae."""
    x = vit.embed_visible(beit, images, ids_keep)
    for block in beit.blocks:
        x = block(x)
    return beit.norm(x)


def encode_all(beit: Beit, patches: Tensor) -> Tensor:
    """Encode all patches: embedded ones (B,P,D), some of which may be mask tokens -> (B,1+P,D)
    after the final norm; family beit."""
    x = torch.cat([beit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    assert beit.rel_pos_bias is not None
    positions = beit.rel_pos_bias()
    for block in beit.blocks:
        x = block(x, shared_rel_pos_bias=positions)
    return beit.norm(x)
