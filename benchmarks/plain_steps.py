"""Three recipes are written with PyTorch and timm alone, to compare their steps with ours: eager,
nothing shared.

Losses and weights are of the same shapes and cost; that their values are the papers' is tested
elsewhere. The encoder has the size that is asked for, the teacher's levels and width are those of
the batch. B batch, V visible, P patches, S student blocks, L levels, D width, Dt teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from featcache.errors import UsageError, near

Batch = dict[str, Tensor]
# drop path at the last block, of MaskAlign's students
DROP_PATH = {"tiny": 0.1, "small": 0.1, "base": 0.1, "large": 0.2}


class _Encoder(nn.Module):
    """timm's ViT over some of its patches; returns every block's output."""

    def __init__(self, size: str, drop_path: float) -> None:
        super().__init__()
        self.vit: Any = timm.create_model(
            f"vit_{size}_patch16_224", num_classes=0, drop_path_rate=drop_path
        )
        self.width, self.depth = self.vit.embed_dim, len(self.vit.blocks)

    def forward(self, images: Tensor, keep: Tensor) -> list[Tensor]:
        vit = self.vit
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = torch.gather(x, 1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        outputs = []
        for block in vit.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class _Alignment(nn.Module):
    """Mixed blocks, one Linear a level, smooth-L1 to the visible tokens' features."""

    def __init__(self, encoder: _Encoder, levels: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((levels, encoder.depth), 0.01))
        self.adaptors = nn.ModuleList(nn.Linear(encoder.width, width) for _ in range(levels))

    def forward(self, blocks: list[Tensor], batch: Batch) -> Tensor:
        outputs, keep = torch.stack(blocks), batch["ids_keep"]
        rows = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], 1)[..., None]
        losses = []
        for level, adaptor in enumerate(self.adaptors):
            mixed = (self.mix[level].view(-1, 1, 1, 1) * outputs).sum(0)
            features = batch["features"][:, level]
            target = torch.gather(features, 1, rows.expand(-1, -1, features.shape[-1]))
            losses.append(2 * functional.smooth_l1_loss(adaptor(mixed), target))
        return torch.stack(losses).mean()


class _Reconstruction(nn.Module):
    """MAE's decoder on timm's blocks, normalised pixels of the hidden patches."""

    def __init__(self, encoder: _Encoder) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(encoder.width)
        self.embed = nn.Linear(encoder.width, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.positions = nn.Parameter(torch.zeros(1, 197, 512), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(512, 16, qkv_bias=True) for _ in range(8)))
        self.head = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 768))

    def forward(self, output: Tensor, batch: Batch) -> Tensor:
        images, keep, masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        x = self.embed(self.norm(output))
        x = torch.cat([x, self.mask_token.expand(len(x), masked.shape[1], -1)], 1)
        order = torch.argsort(
            torch.cat([torch.zeros_like(keep[:, :1]), keep + 1, masked + 1], 1), 1
        )
        x = torch.gather(x, 1, order[..., None].expand(-1, -1, 512)) + self.positions
        predicted = self.head(self.blocks(x))[:, 1:]
        patches = (
            images.unfold(2, 16, 16)
            .unfold(3, 16, 16)
            .permute(0, 2, 3, 4, 5, 1)
            .reshape(len(images), 196, 768)
        )
        target = (patches - patches.mean(-1, keepdim=True)) / (
            patches.var(-1, keepdim=True) + 1e-6
        ).sqrt()
        error = (predicted - target).square().mean(-1)
        return torch.gather(error, 1, masked).mean()


class MaskAlign(nn.Module):
    """MaskAlign: the visible tokens are aligned with the teacher's levels."""

    def __init__(self, size: str, levels: int, width: int) -> None:
        super().__init__()
        self.encoder = _Encoder(size, DROP_PATH[size])
        self.align = _Alignment(self.encoder, levels, width)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.align(self.encoder(batch["images"], batch["ids_keep"]), batch)
        return loss


class Mae(nn.Module):
    """MAE: the pixels of hidden patches are predicted."""

    def __init__(self, size: str, levels: int, width: int) -> None:
        super().__init__()
        self.encoder = _Encoder(size, 0.0)
        self.decoder = _Reconstruction(self.encoder)

    def forward(self, batch: Batch) -> Tensor:
        blocks = self.encoder(batch["images"], batch["ids_keep"])
        loss: Tensor = self.decoder(blocks[-1], batch)
        return loss


class MrAlign(nn.Module):
    """MR-Align: both, by one mask, half and half."""

    def __init__(self, size: str, levels: int, width: int) -> None:
        super().__init__()
        self.encoder = _Encoder(size, 0.1)
        self.align = _Alignment(self.encoder, levels, width)
        self.decoder = _Reconstruction(self.encoder)

    def forward(self, batch: Batch) -> Tensor:
        blocks = self.encoder(batch["images"], batch["ids_keep"])
        loss: Tensor = 0.5 * self.align(blocks, batch) + 0.5 * self.decoder(blocks[-1], batch)
        return loss


# of an encoder's size, the levels and the teacher's width
MODELS: dict[str, Callable[[str, int, int], nn.Module]] = {
    "maskalign": MaskAlign,
    "mae": Mae,
    "mralign": MrAlign,
}


def make_step(
    name: str, batch: Batch, device: torch.device, precision: str, encoder: str = "base"
) -> Callable[[], None]:
    """Return one optimiser step on a batch that is in memory, in eager mode, as `precision` (no,
    bf16, fp16) says; `encoder` is tiny, small, base or large."""
    if encoder not in DROP_PATH:
        raise UsageError(
            f"unknown encoder of a plain step, {encoder!r}: {near(encoder, DROP_PATH)}"
        )
    levels, width = (
        (batch["features"].shape[1], batch["features"].shape[-1]) if "features" in batch else (0, 0)
    )
    model = MODELS[name](encoder, levels, width).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def step() -> None:
        with torch.autocast(device.type, kind, enabled=precision != "no"):
            loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
