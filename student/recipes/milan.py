"""MILAN: predict a CLIP's output at every patch; visible tokens are the decoder's fixed prompts.

Paper:    Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation" (arXiv
          2208.06049)
Command:  student train --recipe milan --cache CACHE --images SRC --batch-size 512
          (8 processes: 4,096)
Cost:     ViT-B, 49 of 196 patches: 25.6 GMAC a picture forward and backward, 12.7 of them in the
          decoder; the teacher's 17.6 are in the cache
Expected: ImageNet-1k, ViT-B from CLIP-B/16, 400 epochs: 85.4 fine-tuned, 78.9 linear (79.9 with
          mask=uniform); ViT-L from CLIP-L/14: 87.8 (published, not yet ours)
Code:     zejiangh/MILAN, models_milan.py

Reference global batch: 4,096, so blr 1.5e-4 is lr 2.4e-3.

Table 5 by settings: MAE is decoder=mae target=pixels mask=uniform; + CLIP target is decoder=mae
mask=uniform; prompting decoder on pixels is target=pixels mask=uniform; sampling on pixels is
decoder=mae target=pixels; then decoder=mae, mask=uniform, and the defaults.

What differs from the released code:
- the teacher sees pixels normalised by its own statistics, as caches have it by default (there by
  ImageNet's, as the student: a cache of its own, extracted and trained from with
  teacher=clip-b16,pixels=imagenet);
- the head is as wide as the target (512 by CLIP-B/16, 768 by CLIP-L/14; one released file has 512,
  another 768);
- decoder=mae is MAE's decoder with the same head and loss on all 197 tokens (the released ablation
  model is missing);
- cls_token and mask_token are not decayed (decay_tokens=true decays them); bf16 in place of fp16,
  by the trainer.
The paper's own forms: prompts=raw (Eq. 2: Z joins keys and values without a projection; the code
projects it in each block), cls_loss=false (Eq. 1 counts patches only; its sum over them is our mean
times their number).

Shapes: B batch, V visible, P patches, M = P - V masked, W decoder width, E target width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from timm.layers import Mlp
from torch import Tensor, nn

from featcache.errors import UsageError
from student import masking
from student.config import (
    CHECKED,
    CLIP_L14,
    Depth,
    Mask,
    NotNegative,
    OutputConfig,
    Positive,
    check_hides_patches,
    one_of,
)
from student.models import losses, vit
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features", "attention"),
    "levels": "last:1",
    "mask_ratio": 0.75,
    "all_tokens": True,
    "derive": "z",
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Hold the settings of README.md."""

    TARGETS: ClassVar[tuple[str, ...]] = ("z", "f", "pixels")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {"large": CLIP_L14}

    mask: Mask = "attentive"
    epochs: Positive = 400
    warmup_epochs: NotNegative = 40

    target: str = "z"
    """What is predicted: z is the teacher's output after the projection, as CLIP has one, f the
    output of its last norm, for teachers without, pixels the colours of hidden patches
    (Table 5)."""
    decoder: Annotated[str, one_of("prompting", "mae")] = "prompting"
    """prompting updates the masked tokens alone, and the encoder's are its fixed prompts; mae is
    MAE's decoder, which updates all (Table 5)."""
    prompts: Annotated[str, one_of("projected", "raw")] = "projected"
    """What the prompts join keys and values as: projected in each block, as in the released code,
    or raw as in Eq. 2; of decoder=prompting."""
    decoder_width: Positive = 512
    """Channels of the decoder."""
    decoder_depth: Depth = 8
    """Blocks of the decoder."""
    decoder_heads: Positive = 16
    """Attention heads of a decoder block; they divide decoder_width."""
    cls_loss: bool = True
    """Whether [CLS] is one of the tokens of the loss, as in the released code; Eq. 1 counts patches
    alone."""
    norm_pix: bool = True
    """With target=pixels, whether each target patch is taken less its mean and over its standard
    deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hides_patches(self)
        vit.check_decoder(self.decoder_width, self.decoder_heads)
        idle = {
            "prompts=raw": self.prompts == "raw" and self.decoder != "prompting",
            "cls_loss=false": not self.cls_loss and self.target == "pixels",
            "norm_pix=false": not self.norm_pix and self.target != "pixels",
        }
        for setting in (name for name, is_idle in idle.items() if is_idle):
            raise UsageError(
                f"{setting} does nothing with decoder={self.decoder} target={self.target}; "
                "allowed: prompts with decoder=prompting, cls_loss with target=z or f, norm_pix "
                "with target=pixels; leave it out"
            )


def needs(config: Config) -> TargetSpec:
    """Say what is read: the teacher's last level, and what the mask is drawn from; for pixels only
    the latter."""
    fields = masking.fields(config.mask)
    if config.target == "pixels":
        return TargetSpec(
            teacher=config.teacher if fields else "",
            levels=(),
            fields=fields,
            patches=config.patches,
        )
    return TargetSpec(
        teacher=config.teacher,
        levels=(config.teacher_depth,),
        fields=("features", *fields),
        patches=config.patches,
        derive=config.target,
    )


class PromptAttention(nn.Module):
    """Attend with queries of the masked tokens to keys and values of the prompts and the masked
    tokens."""

    def __init__(self, width: int, heads: int, project: bool) -> None:
        super().__init__()
        self.heads, self.project = heads, project
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Map x (B,M,W), normed; prompts (B,1+V,W), as they are -> (B,M,W)."""
        if self.project:
            k, v = self.kv(torch.cat([prompts, x], dim=1)).chunk(2, dim=-1)
        else:
            k, v = (
                torch.cat([prompts.to(part.dtype), part], dim=1)
                for part in self.kv(x).chunk(2, dim=-1)
            )
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), k, v)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PromptBlock(nn.Module):
    """Compute x += attn(LN x | prompts); x += mlp(LN x). The prompts pass by unchanged and without
    a norm."""

    def __init__(self, width: int, heads: int, project: bool) -> None:
        super().__init__()
        self.norm1 = vit.NORM(width)
        self.attn = PromptAttention(width, heads, project)
        self.norm2 = vit.NORM(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), prompts)
        return x + self.mlp(self.norm2(x))


class PromptingDecoder(nn.Module):
    """Put vit.Decoder's stem and head around blocks that update the masked tokens only; names are
    those of the released code."""

    def __init__(self, width_in: int, config: Config, out_dim: int) -> None:
        super().__init__()
        width, grid = config.decoder_width, config.img_size // config.patch_size
        self.decoder_embed = nn.Linear(width_in, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, 1 + grid**2, width), requires_grad=False
        )
        project = config.prompts == "projected"
        self.decoder_blocks = nn.ModuleList(
            PromptBlock(width, config.decoder_heads, project) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = vit.NORM(width)
        self.decoder_pred = nn.Linear(width, out_dim)
        self.apply(vit.init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=vit.TOKEN_STD)
        vit.init_fixed_positions(self.decoder_pos_embed, grid)

    def predict_all(self, tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Predict (B,1+P,out), CLS, the visible, the masked, from tokens (B,1+V,D) of the encoder,
        ids_keep (B,V), ids_masked (B,M)."""
        visible = vit.gather_positions(self.decoder_pos_embed, vit.prepend_cls_id(ids_keep))
        prompts = self.decoder_embed(tokens) + visible
        x = self.mask_token + vit.gather_positions(self.decoder_pos_embed, ids_masked + 1)
        for block in self.decoder_blocks:
            x = block(x, prompts)
        return self.decoder_pred(self.decoder_norm(torch.cat([prompts, x], dim=1)))


class Model(nn.Module):
    """Combine the encoder and either decoder; only the encoder is taken home."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = vit.build(
            config.encoder,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
        )
        out_dim = config.patch_size**2 * 3 if config.target == "pixels" else config.target_width
        self.decoder = _build_decoder(self.encoder.embed_dim, config, out_dim)
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its parts from images (B,3,H,W), targets (B,1+P,E), ids_keep (B,V),
        ids_masked (B,M)."""
        images, ids_keep, ids_masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        pred = self._predict_all(batch)
        sizes = [1, ids_keep.shape[1], ids_masked.shape[1]]
        if self.config.target == "pixels":
            patches = vit.gather_patches(images, ids_masked, self.config.patch_size)
            pred = self._hidden(pred, ids_keep)
            pixel = losses.pixel_mse(pred, patches, normalise=self.config.norm_pix)
            return {"loss": pixel, "pixel": pixel.detach()}
        ids = vit.prepend_cls_id(torch.cat([ids_keep, ids_masked], dim=1))
        distance = 2 * losses.cosine_distance(pred, vit.gather_tokens(batch["targets"], ids))
        loss = distance.mean() if self.config.cls_loss else distance[:, 1:].mean()
        parts = zip(("cls", "visible", "masked"), distance.detach().split(sizes, 1), strict=True)
        return {"loss": loss, **{name: part.mean() for name, part in parts}}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target, (B,N,E) both, at CLS and the visible patches,
        without CLS where the loss has none; nothing where pixels are the target."""
        if self.config.target == "pixels":
            return {}
        first = int(not self.config.cls_loss)
        ids = vit.prepend_cls_id(batch["ids_keep"])[:, first:]
        pred = self._predict_all(batch)[:, first : first + ids.shape[1]]
        return {f"cosine_{self.config.target}": (pred, vit.gather_tokens(batch["targets"], ids))}

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return the pixels (B,M,C) that are predicted of the hidden patches; None where others
        are the target."""
        if self.config.target != "pixels":
            return None
        return self._hidden(self._predict_all(batch), batch["ids_keep"])

    def _hidden(self, pred: Tensor, ids_keep: Tensor) -> Tensor:
        """Return of (B,1+P,out) the part (B,M,out) of the hidden patches."""
        return pred[:, 1 + ids_keep.shape[1] :]

    def _predict_all(self, batch: dict[str, Tensor]) -> Tensor:
        """Return (B,1+P,out): CLS, the visible, the masked."""
        images, ids_keep, ids_masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        tokens = self.encoder.norm(vit.encode(self.encoder, images, ids_keep)[-1])
        return self.decoder.predict_all(tokens, ids_keep, ids_masked)


def _build_decoder(width_in: int, config: Config, out_dim: int) -> PromptingDecoder | vit.Decoder:
    if config.decoder == "prompting":
        return PromptingDecoder(width_in, config, out_dim)
    grid = config.img_size // config.patch_size
    return vit.Decoder(
        width_in, config.decoder_width, config.decoder_depth, config.decoder_heads, grid, out_dim
    )
