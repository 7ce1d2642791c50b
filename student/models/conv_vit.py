"""ConvMAE and MR-MAE train a masked-convolution encoder: two stages of convolutions before the
blocks of a ViT.

    pixels -> C1 x 4G x 4G -> C2 x 2G x 2G -> D x G x G -> + positions, the visible ones -> blocks3
      224     56, 2 CBlocks   28, 2 CBlocks      14

The mask is drawn on the coarsest grid and each of its cells is repeated over the 4 x 4 and 2 x 2
finer cells that it covers, so a patch is visible or hidden at every scale. All steps from one grid
to the next have their stride as kernel and stay inside a patch; only the depth-wise 5 x 5
convolutions look beside it, and they are given zeros where the mask hides. So no output at a
visible patch depends on a hidden pixel, to the bit.

Parameters bear the names of the released code (Alpha-VL/ConvMAE, models_convmae.py,
vision_transformer.py:64-196).

Shapes: B batch, G patches a side, P = G * G, V visible, C1 and C2 channels of the two stages, D
width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from featcache.errors import UsageError, near
from featcache.models import architecture
from featcache.models.spec import parse_options
from student.models import drop_path as drops
from student.models import vit

FAMILY = "conv_vit"
# Channels of both stages and their MLPs' ratio; width, blocks and heads of the third. Base is
# ConvMAE's own code. Its authors published no code of the others: small is that of a fork of
# FastConvMAE, large agrees with two reimplementations (whose ratio of 8 is not the paper's 4); tiny
# is ours. Huge is that of one reimplementation, whose third stage is MAE's ViT-H without a block;
# the published checkpoint has, as that of large, another ratio than the paper, and another patch
# size too (ConvMAE issue 32). We leave patch_size to the settings: 16, or another that 4 divides,
# so not ViT-H's 14.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "stage1": 64,
        "stage2": 128,
        "stage_mlp": 4,
        "embed_dim": 192,
        "depth": 11,
        "num_heads": 3,
    },
    "small": {
        "stage1": 128,
        "stage2": 256,
        "stage_mlp": 4,
        "embed_dim": 384,
        "depth": 11,
        "num_heads": 6,
    },
    "base": {
        "stage1": 256,
        "stage2": 384,
        "stage_mlp": 4,
        "embed_dim": 768,
        "depth": 11,
        "num_heads": 12,
    },
    "large": {
        "stage1": 384,
        "stage2": 768,
        "stage_mlp": 8,
        "embed_dim": 1024,
        "depth": 23,
        "num_heads": 16,
    },
    "huge": {
        "stage1": 768,
        "stage2": 1024,
        "stage_mlp": 8,
        "embed_dim": 1280,
        "depth": 31,
        "num_heads": 16,
    },
}
STAGE_BLOCKS = 2  # CBlocks of each of the two stages
Stages = tuple[Tensor, Tensor]  # their maps, (B,C1,4G,4G) and (B,C2,2G,2G)


# --- building -------------------------------------------------------------------------------------


def build(
    encoder: str,
    *,
    img_size: int = 224,
    patch_size: int = 16,
    drop_path: float = 0.0,
    cls_token: bool = False,
    network: type[ConvViT] | None = None,
) -> ConvViT:
    """Build the encoder at its start values.

    `encoder` is tiny, small, base, large or huge, or one of these with changes:
    tiny,depth=4,stage1=16. `cls_token` gives it a CLS token, as the published MR-MAE checkpoints
    have one. `network` is its class.
    """
    sizes = parse_encoder(encoder)

    def create() -> ConvViT:
        return (network or ConvViT)(sizes, img_size, patch_size, drop_path, cls_token)

    architecture.check_memory(create, f"cannot build encoder {encoder!r}")
    net = create()
    initialise(net)
    drops.replace(net)
    return net


def parse_encoder(encoder: str) -> dict[str, int]:
    """Parse 'base,depth=2' into the sizes of base with two blocks; what cannot be meant is
    refused."""
    name, _, tail = encoder.partition(",")
    if name not in SIZES:
        raise UsageError(
            f"unknown encoder {encoder!r} of family conv_vit: {near(name, SIZES)}, and their "
            "options such as tiny,depth=4,stage1=16; choose one with encoder=NAME"
        )
    sizes: dict[str, Any] = dict(SIZES[name])
    for key, value in parse_options(tail).items():
        if key not in sizes:
            raise UsageError(
                f"cannot build encoder {encoder!r}: unknown option {key!r}, {near(key, sizes)}"
            )
        most = architecture.MAX_DEPTH if key in ("depth", "stage_mlp") else architecture.MAX_WIDTH
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(
                f"cannot build encoder {encoder!r}: {key}={value}; allowed: a whole number from 1 "
                f"to {most}"
            )
        sizes[key] = value
    if sizes["embed_dim"] % sizes["num_heads"] or sizes["embed_dim"] % 4:
        raise UsageError(
            f"cannot build encoder {encoder!r}: embed_dim={sizes['embed_dim']}, "
            f"num_heads={sizes['num_heads']}; allowed: a width that 4 and the heads divide; change "
            "one of them"
        )
    return sizes


def check_patch(patch_size: int) -> None:
    """Refuse a patch size that 4 does not divide: the first grid is four times as fine as the
    patches."""
    if patch_size % 4:
        raise UsageError(
            f"cannot build family=conv_vit: patch_size={patch_size}; allowed: one that 4 divides, "
            "such as 16; take a teacher of 16-pixel patches, or one on that grid "
            "(clip-l14,grid=14), or family=mae"
        )


@torch.no_grad()
def initialise(net: ConvViT) -> None:
    """Set ConvMAE's start values: Xavier on every Linear and on the flattened kernel of the third
    embedding, norms 1 and 0, fixed positions; all other convolutions keep the framework's
    (models_convmae.py:75-103)."""
    kernel = net.patch_embed3.proj.weight
    nn.init.xavier_uniform_(kernel.view(kernel.shape[0], -1))
    net.apply(vit.init_linear_and_norm)
    vit.init_fixed_positions(net.pos_embed, net.grid)
    if net.cls_token is not None:
        nn.init.normal_(net.cls_token, std=vit.TOKEN_STD)


# --- modules --------------------------------------------------------------------------------------


def channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a norm to the channels of a map (B,C,H,W)."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Apply a convolution whose stride is its kernel, then norm and GELU."""

    def __init__(self, channels_in: int, channels: int, cell_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels_in, channels, cell_px, stride=cell_px)
        # eps 1e-5, as in the CBlocks; the transformer blocks have 1e-6
        self.norm = nn.LayerNorm(channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(channel_norm(self.norm, self.proj(x)))

    def embed_visible(self, x: Tensor, ids_keep: Tensor) -> Tensor:
        """Compute the output at ids_keep (B,V) alone: x (B,C,H,W) -> (B,V,D)."""
        return self.act(self.norm(vit.project_patches(self.proj, x, ids_keep)))


class ConvMlp(nn.Module):
    """Apply two 1 x 1 convolutions with a GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CBlock(nn.Module):
    """Compute x += conv1x1(dw5x5(mask * conv1x1(LN x))); x += mlp(LN x).

    The mask lies between the first convolution and the depth-wise one, whose bias of the first
    would else be seen beside visible cells. Hidden cells keep a stream of their own that nothing
    visible reads.
    """

    def __init__(self, channels: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        # in attention's place
        self.attn = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = ConvMlp(channels, mlp_ratio * channels)
        self.drop_path1, self.drop_path2 = (drops.branch(drop_path) for _ in range(2))

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """Map x (B,C,H,W), hidden (B,1,H,W) true where the mask hides; None hides nothing."""
        inner = self.conv1(channel_norm(self.norm1, x))
        if hidden is not None:
            inner = inner.masked_fill(hidden, 0)
        x = x + self.drop_path1(self.conv2(self.attn(inner)))
        return x + self.drop_path2(self.mlp(channel_norm(self.norm2, x)))


class ConvViT(nn.Module):
    """Encode pictures by two stages of convolutions and `blocks3`, timm's own ViT blocks; this is
    taken home."""

    def __init__(
        self,
        sizes: dict[str, int],
        img_size: int,
        patch_size: int,
        drop_path: float,
        cls_token: bool,
    ) -> None:
        super().__init__()
        check_patch(patch_size)
        c1, c2, width = sizes["stage1"], sizes["stage2"], sizes["embed_dim"]
        self.embed_dim, self.grid, self.num_prefix_tokens = (
            width,
            img_size // patch_size,
            int(cls_token),
        )
        self.patch_px = patch_size
        rates = torch.linspace(
            0, drop_path, 2 * STAGE_BLOCKS + sizes["depth"], device="cpu"
        ).tolist()
        self.patch_embed1 = PatchEmbed(3, c1, patch_size // 4)
        self.blocks1 = _conv_blocks(c1, sizes["stage_mlp"], rates[:STAGE_BLOCKS])
        self.patch_embed2 = PatchEmbed(c1, c2, 2)
        self.blocks2 = _conv_blocks(c2, sizes["stage_mlp"], rates[STAGE_BLOCKS : 2 * STAGE_BLOCKS])
        self.patch_embed3 = PatchEmbed(c2, width, 2)
        self.patch_embed4 = nn.Linear(width, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, width), requires_grad=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.blocks3 = nn.ModuleList(
            Block(width, sizes["num_heads"], qkv_bias=True, drop_path=rate, norm_layer=vit.NORM)  # type: ignore[arg-type]  # a partial
            for rate in rates[2 * STAGE_BLOCKS :]
        )
        self.norm = vit.NORM(width)

    def encode(self, images: Tensor, ids_keep: Tensor) -> tuple[list[Tensor], Stages]:
        """Encode the visible patches: images (B,3,H,W), ids_keep (B,V) -> the output of every block
        of the third stage, (B,V,D) each, CLS first where there is one and before `norm`, and the
        maps of the first two."""
        hidden = torch.ones(len(images), self.grid**2, dtype=torch.bool, device=images.device)
        hidden = hidden.scatter(1, ids_keep, False).view(-1, 1, self.grid, self.grid)
        stage1, stage2 = self._run_stages(images, hidden)
        x = self.patch_embed4(self.patch_embed3.embed_visible(stage2, ids_keep))
        x = x + vit.gather_positions(self.pos_embed, ids_keep)
        return self._run_blocks(x), (stage1, stage2)

    def forward_features(self, images: Tensor) -> Tensor:
        """Encode all patches: images (B,3,H,W) -> (B,P,D), CLS first where there is one, after
        `norm`."""
        patches = self.patch_embed3(self._run_stages(images, None)[-1]).flatten(2).transpose(1, 2)
        return self.norm(self._run_blocks(self.patch_embed4(patches) + self.pos_embed)[-1])

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Take pictures of another size from here on: fixed positions are resized, as timm's
        networks do by this method."""
        grid = img_size[0] // self.patch_px
        # [CLS] has no position here
        table = resample_abs_pos_embed(
            self.pos_embed, [grid, grid], [self.grid] * 2, num_prefix_tokens=0
        )
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid = grid

    def _run_stages(self, images: Tensor, hidden: Tensor | None) -> Stages:
        """Compute the maps of both stages, for hidden (B,1,G,G)."""
        stage1, fine = self.patch_embed1(images), _upsample_mask(hidden, 4)
        for block in self.blocks1:
            stage1 = block(stage1, fine)
        stage2, coarse = self.patch_embed2(stage1), _upsample_mask(hidden, 2)
        for block in self.blocks2:
            stage2 = block(stage2, coarse)
        return stage1, stage2

    def _run_blocks(self, x: Tensor) -> list[Tensor]:
        """Return the output of every block for patch tokens (B,V,D), CLS in front where there is
        one; it has no position."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        outputs = []
        for block in self.blocks3:
            x = block(x)
            outputs.append(x)
        return outputs


def _conv_blocks(channels: int, mlp_ratio: int, rates: list[float]) -> nn.ModuleList:
    return nn.ModuleList(CBlock(channels, mlp_ratio, rate) for rate in rates)


def _upsample_mask(hidden: Tensor | None, times: int) -> Tensor | None:
    """Repeat each cell over those it covers: hidden (B,1,G,G) -> (B,1,times G,times G)."""
    return (
        None if hidden is None else hidden.repeat_interleave(times, -2).repeat_interleave(times, -1)
    )


class StageFusion(nn.Module):
    """Bring the maps of both stages to the patch grid and the width of the tokens they are added
    to.

    Of pre-training only: fine-tuning goes without. The published checkpoint of ConvMAE was stripped
    of it, that of its second version was reported to have it (ConvMAE issue 19).
    """

    def __init__(self, stage1: int, stage2: int, width: int) -> None:
        super().__init__()
        self.stage1_output_decode = nn.Conv2d(stage1, width, 4, stride=4)
        self.stage2_output_decode = nn.Conv2d(stage2, width, 2, stride=2)

    def forward(self, stages: Stages, ids_keep: Tensor) -> Tensor:
        """Return (B,V,D), the sum of both at the visible patches."""
        both = zip((self.stage1_output_decode, self.stage2_output_decode), stages, strict=True)
        one, two = (vit.project_patches(conv, stage, ids_keep) for conv, stage in both)
        return one + two
