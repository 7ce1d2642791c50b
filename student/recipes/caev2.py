"""CAE v2: predict a CLIP's output at visible patches directly, at masked ones by a regressor.

Paper:    Zhang et al., "CAE v2: Context Autoencoder with CLIP Latent Alignment", TMLR 2023 (arXiv
          2211.09799)
Command:  student train --recipe caev2 --cache CACHE --images SRC --batch-size 256
          (8 processes: 2,048)
          the cache: featcache extract --policy caev2 ..., or any with --set jitter=0, which departs
          from the paper
Cost:     ViT-B, 98 of 196 patches: 36.2 GMAC a picture forward and backward; the teacher's 17.6 are
          in the cache
Expected: ImageNet-1k, 300 epochs, fine-tuned / linear: tiny 77.8 / 69.3, small 83.1 / 77.5, base
          85.5 / 80.7 from CLIP-B/16; large 87.6 / 84.4 from CLIP-L/14 at 196 pixels (published, not
          yet ours)
Code:     Atten4Vis/CAE with --model_type caev2

Reference global batch: 2,048; lr 1.5e-3 as it is, at any batch size (lr=null with blr=1.875e-4
scales it).

Tables by settings: 1 is recipe cae, cae with target=z, align=masked, and the defaults; 2 is
align=both, align=masked, or align=visible regressor_depth=0; 3 is loss=cosine, smooth_l1 or mse; 4
is regressor_depth; 5 is mask=blockwise or uniform; Figure 3 is mask_ratio.

What differs from the released code:
- the regressor's final norm, which it has and never uses, is not built; neither is a regressor with
  align=visible;
- large has 16 heads in encoder and regressor (the released path for it cannot run);
- smooth_l1 and mse, of which no code was released: of the head's output against the target
  normalised over its channels without affine, as in the works the paper cites for them; mean over
  channels, smooth-L1 with beta 1;
- cls_token and mask_token are not decayed (decay_tokens=true decays them); the learning rate
  reaches its peak at one step, there at two in a row (repeat_peak=true); bf16 in place of fp16, by
  the trainer; its cosine adds 1e-12 to each squared length;
- mask=uniform hides P - int(P (1 - ratio)) patches, there int(P ratio): one fewer where that is no
  whole number (mask_count=hidden).
The paper's own forms: reduction=paper (Eq. 2: the mean over visible patches plus the mean over
masked ones, no CLS; the code has one mean over all tokens), head=linear_norm (the code's is norm,
then Linear), betas=[0.9,0.98].

Shapes: B batch, V visible, P patches, M = P - V masked, W regressor width, E target width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from featcache.errors import UsageError
from student import masking
from student.config import (
    CHECKED,
    CLIP_L14,
    Above0,
    DepthOrZero,
    Fraction,
    Mask,
    NotNegative,
    OutputConfig,
    Positive,
    check_hides_patches,
    one_of,
)
from student.models import beit, latent_regressor, losses, vit
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features",),
    "levels": "last:1",
    "mask_ratio": 0.5,
    "all_tokens": True,
    "derive": "z",
    "scale": (0.4, 1.0),
    "jitter": 0.4,
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Hold the settings of scripts/caev2_base_300e.sh; the other sizes by its README and the
    paper's Table 8."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"mask_ratio": 0.15, "regressor_width": 96, "regressor_depth": 1},
        "small": {"mask_ratio": 0.25, "regressor_width": 384, "regressor_depth": 1},
        "large": {
            "mask_ratio": 0.6, "regressor_width": 1024, "regressor_heads": 16, "drop_path": 0.2,
            "layer_scale": 1e-5, **CLIP_L14,
        },
    }  # fmt: skip

    drop_path: Fraction = 0.1
    mask: Mask = "blockwise"
    mask_ratio: Fraction = 0.5
    lr: Above0 | None = 1.5e-3
    min_lr: NotNegative = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_grad: Above0 | None = 3.0
    epochs: Positive = 300
    warmup_epochs: NotNegative = 10

    family: Annotated[str, one_of("cae")] = "cae"
    """Architecture of the encoder: timm's Beit with CAE's fixed positions and start values."""
    layer_scale: Above0 = 0.1
    """Start value of LayerScale in the encoder's blocks."""
    regressor_width: Positive = 768
    """Channels of the regressor; a Linear and a norm lie between it and an encoder of another
    width."""
    regressor_depth: DepthOrZero = 4
    """Blocks of the latent contextual regressor, 1 or more (Table 4); 0 with align=visible, which
    has none."""
    regressor_heads: Positive = 12
    """Attention heads of a regressor block; they divide regressor_width."""
    align: Annotated[str, one_of("both", "visible", "masked")] = "both"
    """Patches whose latents are aligned with the teacher's output: the visible, the masked, or both
    (Table 2)."""
    loss: Annotated[str, one_of("cosine", "smooth_l1", "mse")] = "cosine"
    """Distance of a latent from the target: cosine is 1 less the cosine, smooth_l1 and mse are of
    the target normalised over its channels (Table 3)."""
    reduction: Annotated[str, one_of("code", "paper")] = "code"
    """How errors are averaged: code has one mean over all tokens, paper the mean over visible
    patches plus the mean over masked ones, without [CLS] (Eq. 2)."""
    head: Annotated[str, one_of("norm_linear", "linear_norm")] = "norm_linear"
    """Order of the prediction head's norm and Linear: norm_linear as the released code, linear_norm
    as the paper."""
    jitter: Fraction = 0.4
    """Largest change of brightness, contrast and saturation in the cache's views, which teacher and
    student both see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        beit.check_heads("regressor", self.regressor_width, self.regressor_heads)
        if self.align != "visible":
            check_hides_patches(self)
        if self.regressor_depth < 0 or (self.regressor_depth == 0) != (self.align == "visible"):
            raise UsageError(
                f"cannot align {self.align} latents with a regressor of {self.regressor_depth} "
                "blocks; allowed: align=visible with regressor_depth=0, align=both or masked with "
                "1 or more; change one of them"
            )


def needs(config: Config) -> TargetSpec:
    """Say what is read: the teacher's last level, and what the mask is drawn from."""
    return TargetSpec(
        teacher=config.teacher,
        levels=(config.teacher_depth,),
        fields=("features", *masking.fields(config.mask)),
        patches=config.patches,
        scale=(0.4, 1.0),
        jitter=config.jitter,
        visible_only=config.align == "visible",
        derive=config.target,
    )


class Head(nn.Module):
    """Apply a norm and a Linear, in either order: one set of parameters for CLS, visible and masked
    latents."""

    def __init__(self, width: int, out_dim: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm = vit.NORM(width if norm_first else out_dim)
        self.head = nn.Linear(width, out_dim)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)) if self.norm_first else self.norm(self.head(x))


class Model(nn.Module):
    """Combine the encoder, the regressor and the head; only the encoder is taken home. Names are
    those of the released code."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = beit.build(
            config.encoder,
            config.family,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
        )
        self.encoder_to_regresser, self.encoder_to_regresser_norm = (
            latent_regressor.width_projection(self.encoder.embed_dim, config.regressor_width)
        )
        if config.align != "visible":
            width, grid = config.regressor_width, config.img_size // config.patch_size
            self.rd_pos_embed = latent_regressor.fixed_positions(width, grid)
            self.mask_token = latent_regressor.build_mask_token(width)
            self.regresser = latent_regressor.LatentRegressor(
                width,
                config.regressor_depth,
                config.regressor_heads,
                config.drop_path,
                final_norm=False,
            )
        norm_first = config.head == "norm_linear"
        self.decoder = Head(config.regressor_width, config.target_width, norm_first=norm_first)
        self.decoder.apply(vit.init_linear_and_norm)
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its parts from images (B,3,H,W), targets (B,1+P,E), ids_keep (B,V),
        ids_masked (B,M)."""
        errors: dict[str, Tensor] = {}
        for where, pred, target in self._pairs(batch):
            error = _token_errors(pred, target, self.config.loss)
            if where == "visible":
                errors |= {"cls": error[:, :1], "visible": error[:, 1:]}
            else:
                errors[where] = error
        parts = {name: error.mean().detach() for name, error in errors.items()}
        return {"loss": _reduce(errors, self.config.reduction), **parts}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target, (B,N,E) both, at CLS and the visible patches, or at
        the hidden ones where these alone are aligned; without CLS where the loss has none. What is
        learned of a normalised target is named so."""
        where, pred, target = next(self._pairs(batch))
        target = _loss_target(target, self.config.loss)
        if where == "visible" and self.config.reduction == "paper":
            pred, target = pred[:, 1:], target[:, 1:]
        normed = "" if self.config.loss == "cosine" else "ln_"
        return {f"cosine_{normed}{self.config.target}": (pred, target)}

    def _pairs(self, batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield what is aligned, visible (with CLS) and masked: predictions and targets (B,N,E)."""
        ids_keep, ids_masked, targets = batch["ids_keep"], batch["ids_masked"], batch["targets"]
        x = beit.encode(self.encoder, batch["images"], ids_keep)
        x = self.encoder_to_regresser_norm(self.encoder_to_regresser(x))  # (B,1+V,W)
        if self.config.align != "masked":
            target = vit.gather_tokens(targets, vit.prepend_cls_id(ids_keep))
            yield "visible", self.decoder(x), target
        if self.config.align != "visible":
            pred = self.decoder(self._regress(x[:, 1:], ids_keep, ids_masked))
            yield "masked", pred, vit.gather_tokens(targets, ids_masked + 1)

    def _regress(self, visible: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Predict masked latents (B,M,W) from visible (B,V,W)."""
        pos_x = vit.gather_positions(self.rd_pos_embed, ids_masked + 1)
        pos_visible = vit.gather_positions(self.rd_pos_embed, ids_keep + 1)
        return self.regresser(self.mask_token.expand_as(pos_x), visible, pos_x, pos_visible)


def _token_errors(pred: Tensor, target: Tensor, loss: str) -> Tensor:
    """Compute the error of every token: pred, target (B,N,E) -> (B,N)."""
    if loss == "cosine":
        return losses.cosine_distance(pred, target)
    with losses.autocast_off(pred):
        pred, target = losses.upcast(pred), _loss_target(target, loss)
        return (F.mse_loss if loss == "mse" else F.smooth_l1_loss)(
            pred, target, reduction="none"
        ).mean(dim=-1)


def _loss_target(target: Tensor, loss: str) -> Tensor:
    """Return the target (B,N,E) that a loss compares with: each token normalised for smooth_l1 and
    mse."""
    if loss == "cosine":
        return target
    with losses.autocast_off(target):
        target = losses.upcast(target)
        return F.layer_norm(target, target.shape[-1:])


def _reduce(errors: dict[str, Tensor], reduction: str) -> Tensor:
    """Average the errors (B,1), (B,V), (B,M) to a scalar."""
    if reduction == "code":
        return torch.cat(list(errors.values()), dim=1).mean()
    return torch.stack([error.mean() for name, error in errors.items() if name != "cls"]).sum()
