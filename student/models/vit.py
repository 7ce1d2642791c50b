"""The MAE-style encoder and decoder are a timm VisionTransformer with MAE's stem, start values and
token selection.

    pictures -> take the visible patches -> embed -> CLS in front -> + positions -> blocks
                                                                                        (encode)
    encoder tokens -> narrow -> mask tokens behind them -> + positions -> blocks -> pixels
                                                                                        (Decoder)

The modules are timm's own, so an encoder's state dict loads into timm by name; the decoder's
parameters bear the names of MAE's released code, so a released decoder loads by name as well. Start
values come from torch's global generator, drop path from the batch (drop_path.py).

Shapes: B batch, P patches, V visible, D width, p pixels a side of a patch, G patches a side.
"""

from __future__ import annotations

import difflib
from functools import partial
from itertools import islice
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchDropout
from timm.models.beit import Beit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from featcache.errors import UsageError, near
from featcache.models import architecture
from student.models import drop_path as drops

SIZES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
TOKEN_STD = 0.02  # start of cls_token and mask_token
NORM = partial(nn.LayerNorm, eps=1e-6)


# --- building -------------------------------------------------------------------------------------


def build(
    encoder: str, *, img_size: int = 224, patch_size: int = 16, drop_path: float = 0.0
) -> VisionTransformer:
    """Build the encoder with MAE's stem and start values, without a classifier.

    `encoder` is tiny, small, base, large, a timm ViT name, or one with changes:
    vit_small_patch16_224,depth=6.
    """
    name, options = parse_encoder(encoder)
    fixed = {
        "pretrained": False,
        "num_classes": 0,
        "global_pool": "token",
        "drop_path_rate": drop_path,
    }
    sizes = {"img_size": img_size, "patch_size": patch_size}
    keywords = {"norm_layer": NORM, "act_layer": nn.GELU, **options, **fixed, **sizes}
    try:
        architecture.check_memory(
            lambda: timm.create_model(name, **keywords), f"cannot build encoder {encoder!r}"
        )
        vit: nn.Module = timm.create_model(name, **keywords)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # how timm refuses an option, or one that fits no other
        raise UsageError(
            f"cannot build encoder {encoder!r}: timm says {error}; allowed: a plain ViT and its "
            "options, such as tiny,depth=6,embed_dim=128,num_heads=4; change it with encoder=VALUE"
        ) from None
    extras = _unsupported_parts(vit)
    if extras or not isinstance(vit, VisionTransformer):
        raise UsageError(
            f"cannot use encoder {encoder!r}: it has {', '.join(extras)}; allowed: plain ViTs such "
            f"as {', '.join(SIZES)} or deit_small_patch16_224; choose one with encoder=NAME"
        )
    initialise(vit)
    drops.replace(vit)
    return vit


def parse_encoder(encoder: str) -> tuple[str, dict[str, Any]]:
    """Parse 'tiny,depth=2' into ('vit_tiny_patch16_224', {'depth': 2}); an unknown name is
    refused."""
    from featcache.models.spec import (
        parse_options,  # costs the teachers' imports, needed only when there are options to read
    )

    name, _, tail = encoder.partition(",")
    options: dict[str, Any] = dict(parse_options(tail)) if tail else {}
    for key in ("img_size", "patch_size", "drop_path_rate"):
        if key in options:
            raise UsageError(
                f"cannot build encoder {encoder!r}: it sets {key}; allowed: options of the "
                f"network; give {key.removesuffix('_rate')}=VALUE as a setting of its own"
            )
    architecture.check_keywords(f"cannot build encoder {encoder!r}", options)
    name = SIZES.get(name, name)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3)
        raise UsageError(
            f"unknown encoder {name!r}: {near(name, [*SIZES, *close])}, and any ViT in "
            "timm.list_models()"
        )
    return name, options


def _unsupported_parts(vit: nn.Module) -> list[str]:
    """Return what keeps a network from being MAE's plain ViT; no paper here says how such extras
    would be trained."""
    if type(vit) is not VisionTransformer:
        return [f"the class {type(vit).__name__}"]
    names = dict(vit.named_parameters())
    wrong = {
        "no block": len(vit.blocks) == 0,
        "other than three colours": vit.patch_embed.proj.in_channels != 3,
        # drawn from the process's generator, so that two processes would differ from one
        "dropout": any(map(_drops, vit.modules())),
        "no class token": not vit.has_class_token,
        "register tokens": vit.num_reg_tokens > 0,
        "a norm before the blocks": not isinstance(vit.norm_pre, nn.Identity),
        "no position for the class token": vit.no_embed_class or vit.pos_embed is None,
        "no final norm": isinstance(vit.norm, nn.Identity),
        "LayerScale": any(".ls1." in name for name in names),
        "no bias on q, k, v": "blocks.0.attn.qkv.bias" not in names,
        "norms of q and k": any("attn.q_norm" in name for name in names),
        "pictures of any size": vit.dynamic_img_size,
        "a width that 4 does not divide": vit.embed_dim % 4 > 0,
    }
    return [what for what, found in wrong.items() if found]


def _drops(part: nn.Module) -> bool:
    return isinstance(part, PatchDropout) or (isinstance(part, nn.Dropout) and part.p > 0)


@torch.no_grad()
def initialise(vit: VisionTransformer) -> None:
    """Set MAE's start values: fixed positions, Xavier on every Linear and on the flattened patch
    kernel.

    A fused qkv weight is one [3D, D] matrix, hence a smaller Xavier limit than three D x D ones.
    The patch kernel's bias keeps the framework's uniform start. (facebookresearch/mae
    models_mae.py:65-93.)
    """
    cls_token, positions = _tokens(vit)
    vit.apply(init_linear_and_norm)
    kernel = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(kernel.view(kernel.shape[0], -1))
    nn.init.normal_(cls_token, std=TOKEN_STD)
    init_fixed_positions(positions, vit.patch_embed.grid_size[0])


def _tokens(vit: VisionTransformer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return cls_token (1,1,D) and pos_embed (1,1+P,D), which `build` has made sure of."""
    assert vit.cls_token is not None
    assert vit.pos_embed is not None
    return vit.cls_token, vit.pos_embed


def init_linear_and_norm(module: nn.Module) -> None:
    """Set Xavier-uniform Linears with bias 0; norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def init_fixed_positions(positions: nn.Parameter, grid: int, layout: str = "mae") -> None:
    """Set positions (1,1+P,D), or (1,P,D) without CLS, to sines and cosines that are not
    trained."""
    positions.copy_(sincos(positions.shape[-1], grid, layout)[-positions.shape[1] :].unsqueeze(0))
    positions.requires_grad_(False)


def sincos(width: int, grid: int, layout: str = "mae") -> Tensor:
    """Return fixed 2-D sin-cos positions (1 + grid^2, width) float64, a row of zeros for CLS first.

    With w_k = 10000^(-k / (width/4)), the patch at (row, col) has

        [ sin(col w) | cos(col w) | sin(row w) | cos(row w) ]

    column first, in MAE's layout. CAE's has the halves swapped and the same shape, so a checkpoint
    read with the wrong one is silently wrong. (facebookresearch/mae util/pos_embed.py:26-67; CAE
    models/modeling_cae_helper.py:229-248.)
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64).outer(frequency)  # (grid, width/4)
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    col, row = one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, dim=0)
    halves = {"mae": [col, row], "cae": [row, col]}[layout]
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), torch.cat(halves, dim=1)])


# --- encoding -------------------------------------------------------------------------------------


def embed_visible(encoder: VisionTransformer | Beit, images: Tensor, ids_keep: Tensor) -> Tensor:
    """Embed the visible patches: images (B,3,H,W), ids_keep (B,V) -> tokens with their positions
    (B,1+V,D), CLS first."""
    assert encoder.cls_token is not None
    assert encoder.pos_embed is not None
    x = encoder.patch_embed.norm(project_patches(encoder.patch_embed.proj, images, ids_keep))
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
    return x + gather_positions(encoder.pos_embed, prepend_cls_id(ids_keep))


def encode(
    vit: VisionTransformer, images: Tensor, ids_keep: Tensor, depth: int | None = None
) -> list[Tensor]:
    """Encode the visible patches: images (B,3,H,W), ids_keep (B,V) -> the output of every block, or
    of the first `depth`, (B,1+V,D) each, CLS first.

    This is the residual stream: `vit.norm` is not applied.
    """
    x, outputs = embed_visible(vit, images, ids_keep), []
    for block in islice(vit.blocks, depth):
        x = block(x)
        outputs.append(x)
    return outputs


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather tokens (B,N,D) at ids (B,M) -> (B,M,D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def gather_positions(table: Tensor, ids: Tensor) -> Tensor:
    """Gather positions (1,N,D) at ids (B,M) -> (B,M,D)."""
    return gather_tokens(table.expand(len(ids), -1, -1), ids)


def prepend_cls_id(ids: Tensor) -> Tensor:
    """Map ids (B,M) of patches -> ids (B,1+M) of tokens, of which CLS is the first."""
    return torch.cat([ids.new_zeros(len(ids), 1), ids + 1], dim=1)


def project_patches(conv: nn.Conv2d, images: Tensor, ids: Tensor) -> Tensor:
    """Apply a convolution whose stride is its kernel at patches alone: images (B,C,H,W), ids (B,N)
    of its output's cells -> (B,N,D).

    It multiplies no other pixels. Embedding all patches and choosing afterwards takes 2.4 times as
    long on a CPU where a quarter is visible.
    """
    kernel = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (D,p*p*C), as the patches have them
    return F.linear(gather_patches(images, ids, conv.kernel_size[0]), kernel, conv.bias)


def gather_patches(images: Tensor, ids: Tensor, patch_px: int) -> Tensor:
    """Gather patches of images (B,C,H,W) at ids (B,N), in raster order -> (B,N,p*p*C); inside one
    (row, column, channel), channel fastest. The other patches are not copied."""
    x = images.unflatten(2, (-1, patch_px)).unflatten(4, (-1, patch_px))  # (B,C,G,p,G,p)
    x, cols = x.permute(0, 2, 4, 3, 5, 1), x.shape[4]
    picture = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return x[picture, ids // cols, ids % cols].flatten(2)


# --- decoding -------------------------------------------------------------------------------------


def check_decoder(width: int, heads: int) -> None:
    """Refuse a width that the heads or 4 (sine and cosine of two axes) do not divide."""
    if width % heads or width % 4:
        raise UsageError(
            f"cannot build the decoder: decoder_width={width}, decoder_heads={heads}; allowed: a "
            "width that 4 and the heads divide; change one of them"
        )


class Decoder(nn.Module):
    """Decode as MAE does: plain self-attention over CLS and all patches, fixed positions, one
    Linear to the pixels.

    Parameter names are those of MAE's released code: a released state dict's `decoder_*` and
    `mask_token` load here. `cls_token=False` is for an encoder that has none, as ConvMAE's.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        depth: int,
        heads: int,
        patches_grid: int,
        out_dim: int,
        *,
        cls_token: bool = True,
    ) -> None:
        super().__init__()
        self.prefix = int(cls_token)
        self.decoder_embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = self.prefix + patches_grid**2
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=NORM)  # type: ignore[arg-type]  # a partial
            for _ in range(depth)
        )
        self.decoder_norm = NORM(width)
        self.decoder_pred = nn.Linear(width, out_dim)
        self.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        init_fixed_positions(self.decoder_pos_embed, patches_grid)

    def forward(self, tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Predict the masked patches (B,M,out), from tokens (B,1+V,D) of the encoder, ids_keep
        (B,V), ids_masked (B,M)."""
        return self.decoder_pred(self.masked_states(tokens, ids_keep, ids_masked))

    def predict_all(self, tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Predict (B,1+P,out) in the decoder's order: CLS, the visible, the masked."""
        x = self._run_blocks(tokens, ids_keep, ids_masked)
        return self.decoder_pred(self.decoder_norm(x))

    def masked_states(self, tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Return what the last Linear reads of the masked patches: (B,M,width)."""
        x = self._run_blocks(tokens, ids_keep, ids_masked)
        return self.decoder_norm(x[:, tokens.shape[1] :])

    def _run_blocks(self, tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Return (B,1+P,width): CLS, the visible, the masked. Attention asks for no order, so the
        positions are brought to the tokens, which are not sorted into those of the picture."""
        ids = torch.cat([ids_keep, ids_masked], dim=1)
        ids = prepend_cls_id(ids) if self.prefix else ids
        x = self.decoder_embed(tokens)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(*ids_masked.shape, -1)], dim=1)
        x = x + gather_positions(self.decoder_pos_embed, ids)
        for block in self.decoder_blocks:
            x = block(x)
        return x
