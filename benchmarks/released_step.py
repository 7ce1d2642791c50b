"""One step of MaskAlign is written as its released code makes it, the teacher in the loop, to be
timed beside ours.

Facts are of OpenDriveLab/maskalign at 4cb577f: models_pretrain.py, engine_pretrain.py,
main_pretrain.py and util/misc.py, with the flags of its README (fusion linear, whiten, top5,
smoothl1, attention). No line is copied. Weights are drawn, the teacher's too: a step costs the
same.

In its step, whether the loss needs it or not:
- the frozen teacher is Hugging Face's CLIPVisionModel with attention written out in PyTorch
  (`eager`: no other gives attention back), all levels and all attention asked for, without
  gradients, under the student's autocast. Pixels come back from ImageNet's statistics and go to
  CLIP's by constants made anew; for CLIP-L/14 they are resized to 196 before, bicubic;
- the mask is a draw of all patches by torch.multinomial, with the order back and a binary mask that
  nothing reads;
- W and adaptors are there for all teacher levels, all blocks are mixed into all of them, all
  targets are normalised whole before their visible tokens are gathered; five have a weight;
- AdamW has timm's two groups and torch's own defaults; the loss is read by the host in each step;
  the norm of all gradients is computed in each step; the loss is scaled with fp16.

Not in it: data loading (pixels lie on the device, the same in each step), the schedule, the log of
every 20th step, other processes. The released engine has torch.cuda.synchronize() as a comment, so
there is none.

Where its environment (torch 1.x, timm 0.3.2, fp16) is gone, today's is taken, which makes it
faster: timm's blocks call scaled_dot_product_attention, AdamW runs through `foreach` on a GPU,
gradients are dropped in place of zeroed, and bf16 is possible. With unequal depths W is `sum`,
the one fusion that pairs every level with a block.

B batch, P patches, V visible, N visible with CLS, S student blocks, T teacher levels, D width, Dt
teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from featcache.errors import UsageError, UserError, near

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
ALIGNED = 5  # the last levels, weighted alike
VISIBLE = 1 - 0.7  # part of the patches, rounded down
LR, BETAS, WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.05  # of a batch of 1,024
KINDS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Size:
    """Hold the sizes of a student or a teacher; `drop_path` is the student's, at its last block."""

    image_px: int
    patch_px: int
    width: int
    depth: int
    heads: int
    drop_path: float = 0.0


# tiny: tries the program, measures nothing
TEACHERS = {
    "clip-b16": Size(224, 16, 768, 12, 12),
    "clip-l14": Size(196, 14, 1024, 24, 16),
    "tiny": Size(224, 16, 32, 6, 2),
}
ENCODERS = {
    "base": Size(224, 16, 768, 12, 12, drop_path=0.1),
    "large": Size(224, 16, 1024, 24, 16, drop_path=0.2),
    "tiny": Size(224, 16, 64, 6, 2, drop_path=0.1),
}


# ------------------------------------------------------------ the model


class ReleasedMaskAlign(nn.Module):
    """Hold student, alignment and teacher in one module, whose forward gives the loss."""

    def __init__(self, encoder: Size, teacher: Size) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        width, depth = encoder.width, encoder.depth
        self.patch_embed = PatchEmbed(encoder.image_px, encoder.patch_px, 3, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        positions = 0.02 * torch.randn(1, 1 + self.patch_embed.num_patches, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        rates = torch.linspace(0, encoder.drop_path, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(width, encoder.heads, qkv_bias=True, norm_layer=norm, drop_path=rate)
            for rate in rates
        )
        self.norm = norm(width)
        equal = torch.eye(depth) + 0.01
        even = torch.full((teacher.depth, depth), 1 / depth)
        self.distill_weights = nn.Parameter(equal if depth == teacher.depth else even)
        self.distill_heads = nn.ModuleList(
            nn.Linear(width, teacher.width) for _ in range(teacher.depth)
        )
        self.teacher_px = None if teacher.image_px == encoder.image_px else teacher.image_px
        self.teacher = _clip(teacher)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the loss of images (B,3,H,W), normalised by ImageNet's statistics."""
        levels, attention = self._teach(images)
        outputs, ids_keep = self._encode(images, attention)
        return _loss(self._predict(outputs), _targets(levels, ids_keep))

    @torch.no_grad()
    def _teach(self, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return T x (B,1+P,Dt), the teacher's levels, and the last block's attention
        (B,heads,1+P,1+P)."""
        if self.teacher_px is not None:
            size = (self.teacher_px, self.teacher_px)
            images = F.interpolate(images, size, mode="bicubic", align_corners=False)
        mean, std = _constants(IMAGENET, images)
        images = std * images + mean
        mean, std = _constants(CLIP, images)
        given = {"output_hidden_states": True, "output_attentions": True}
        outputs = self.teacher(pixel_values=(images - mean) / std, **given)
        return outputs.hidden_states[1:], outputs.attentions[-1]

    def _encode(self, images: Tensor, attention: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return S x (B,N,D), every block's output, and ids_keep (B,V)."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, ids_keep = _draw_visible(x, attention[:, :, 0, 1:].mean(1))
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], 1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        self.norm(x)  # computed, and read by nothing
        return outputs, ids_keep

    def _predict(self, outputs: list[Tensor]) -> list[Tensor]:
        """Mix S x (B,N,D) by W and adapt: T x (B,N,Dt)."""
        stacked = torch.cat([output.unsqueeze(0) for output in outputs])
        mixed = torch.einsum("ts,sbnd->tbnd", self.distill_weights, stacked)
        return [
            adapt(x.squeeze(0))
            for adapt, x in zip(self.distill_heads, mixed.chunk(len(mixed)), strict=True)
        ]


def _clip(size: Size) -> nn.Module:
    """Build Hugging Face's picture tower of CLIP, frozen, with drawn weights."""
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError:
        raise UserError(
            "cannot build the released step: its teacher is transformers' CLIPVisionModel, and "
            "transformers is not installed; pip install 'transformers>=5.17'"
        ) from None
    config = CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        image_size=size.image_px,
        patch_size=size.patch_px,
        attn_implementation="eager",
    )
    return CLIPVisionModel(config).requires_grad_(False)


def _constants(values: tuple[tuple[float, ...], ...], like: Tensor) -> list[Tensor]:
    return [torch.tensor(v, device=like.device).view(1, 3, 1, 1).type_as(like) for v in values]


def _draw_visible(x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from x (B,P,D) by importance (B,P) -> (B,V,D), ids_keep (B,V)."""
    count, patches, width = x.shape
    kept = int(patches * VISIBLE)
    shuffled = torch.multinomial(importance, patches, replacement=False)
    restored = torch.argsort(shuffled, dim=1)
    ids_keep = shuffled[:, :kept]
    visible = torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, width))
    mask = torch.ones([count, patches], device=x.device)
    mask[:, :kept] = 0
    torch.gather(mask, 1, restored)  # the binary mask, returned to nobody
    return visible, ids_keep


def _targets(levels: tuple[Tensor, ...], ids_keep: Tensor) -> list[Tensor]:
    """Normalise T x (B,1+P,Dt) and gather: T x (B,N,Dt)."""
    targets = []
    for level in levels:
        whole = F.layer_norm(level, (level.shape[-1],))
        ids = ids_keep.unsqueeze(-1).repeat(1, 1, whole.shape[-1])
        targets.append(torch.cat([whole[:, :1], torch.gather(whole[:, 1:], 1, ids)], 1))
    return targets


def _loss(predicted: list[Tensor], targets: list[Tensor]) -> Tensor:
    loss = torch.tensor(0.0, device=predicted[0].device)
    weights = [0.0] * (len(predicted) - ALIGNED) + [1 / ALIGNED] * ALIGNED
    for weight, x, y in zip(weights, predicted, targets, strict=True):
        if weight > 0:
            loss = loss + weight * 2 * F.smooth_l1_loss(y, x)
    return loss


# ------------------------------------------------------------ the step


def make_step(
    teacher: str, encoder: str, images: Tensor, device: torch.device, precision: str
) -> Callable[[], None]:
    """Return one optimiser step on images (B,3,224,224) that ImageNet's statistics have
    normalised, as `precision` (no, bf16, fp16) says.

    `teacher`: clip-b16, clip-l14 or tiny; `encoder`: base, large or tiny. Unknown names are a
    UsageError, a lack of transformers is a UserError.
    """
    model = ReleasedMaskAlign(_size("encoder", encoder), _size("teacher", teacher))
    return step_of(model.to(device), images.to(device), precision)


def _size(what: str, name: str) -> Size:
    sizes = {"encoder": ENCODERS, "teacher": TEACHERS}[what]
    if name not in sizes:
        raise UsageError(f"unknown {what} of the released step, {name!r}: {near(name, sizes)}")
    return sizes[name]


def step_of(model: ReleasedMaskAlign, images: Tensor, precision: str) -> Callable[[], None]:
    """Return one optimiser step of a model, on images (B,3,H,W) of its device."""
    model.train()
    optimizer = make_optimizer(model)
    kind = images.device.type
    scaler = torch.amp.GradScaler(kind, enabled=precision == "fp16")
    autocast = {"dtype": KINDS[precision], "enabled": precision != "no"}

    def step() -> None:
        with tuned_convolutions():
            with torch.autocast(kind, **autocast):
                loss = model(images)
            if not math.isfinite(loss.item()):  # the host waits for the whole forward
                raise UserError("the released step's loss is not finite; give another --precision")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradient_norm(model)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step


def make_optimizer(model: ReleasedMaskAlign) -> torch.optim.AdamW:
    """Build AdamW as the released command does: by timm's rule cls_token is decayed, W is not."""
    groups: Any = param_groups_weight_decay(
        model, WEIGHT_DECAY, no_weight_decay_list=("distill_weights",)
    )
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients, parameter by parameter; the released scaler computes it and
    nobody reads it."""
    norms = [torch.norm(p.grad.detach(), 2.0) for p in model.parameters() if p.grad is not None]
    return torch.norm(torch.stack(norms), 2.0)


@contextmanager
def tuned_convolutions() -> Iterator[None]:
    """Let cuDNN try its convolutions, as the released program does; later steps of others do not
    see it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
