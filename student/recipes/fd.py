"""FD: learn a teacher's whitened output at every token, none hidden, by relative positions.

Paper:    Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature
          Distillation" (arXiv 2205.14141)
Command:  student train --recipe fd --cache CACHE --images SRC --batch-size 128
          (16 processes: 2,048)
          the cache: featcache extract --policy fd ..., whose crops are resized bilinear as the
          released code does
Cost:     ViT-B: 53.0 GMAC a picture forward and backward; the teacher's 17.6 are in the cache
Expected: ImageNet-1k, 300 epochs, fine-tuned: from CLIP-B/16 84.9, from DINO-B 83.8, ViT-L/14 from
          CLIP-L/14 87.7 (published, not yet ours); FD-CLIP 80.3 linear by MaskAlign's Table 8
Code:     SwinTransformer/Feature-Distillation, models/feature_distillation.py

Reference global batch: 2,048, so blr 1.5e-4 is lr 1.2e-3 (its base learning rate is 3e-4 for a
batch of 512).

The target is LN(gamma h + beta), the output of the teacher's last norm, normalised once more
without affine. DINO and large use drop_path=0.3; its 100-epoch run drop_path=0.1 and crops of 0.67
to 1.

What differs from the released code: the warm-up starts at 0, there at 2e-6; min_lr is 2e-5 at any
batch size, there 2e-5 x batch / 2,048; it leaves 27 files of ImageNet out, we what a cache has in
quarantine; the 1 x 1 convolution of its head is a Linear, with the same start; bf16 in place of
fp16, by the trainer.

Shapes: B batch, P patches, D student width, Dt teacher width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from featcache.errors import UsageError
from student.config import (
    CHECKED,
    Above0,
    Fraction,
    NotNegative,
    Positive,
    RecipeConfig,
    one_of,
)
from student.models import beit, losses
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features",),
    "levels": "last:1",
    "mask_ratio": 0.0,
    "all_tokens": True,
    "derive": "fd",
    "scale": (0.08, 1.0),
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    """Hold the settings of configs/pretrain/fd_pretrain__clip_vit_base__img224__300ep.yaml."""

    # fd_pretrain__clip_vit_large__img224__300ep.yaml: 256 tokens of ViT-L/14 at 224
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "large": {
            "drop_path": 0.3,
            "patch_size": 14,
            "teacher": "clip-l14,img_size=224",
            "teacher_depth": 24,
            "teacher_width": 1024,
        }
    }

    drop_path: Fraction = 0.2
    mask_ratio: Fraction = 0.0
    """Share of the patches that is hidden: 0 alone, since nothing is hidden here."""
    min_lr: NotNegative = 2e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_grad: Above0 | None = 3.0
    epochs: Positive = 300
    warmup_epochs: NotNegative = 10

    family: Annotated[str, one_of("beit")] = "beit"
    """Architecture of the encoder: timm's Beit with one table of relative positions for all
    blocks."""
    layer_scale: Above0 = 0.1
    """Start value of LayerScale in the encoder's blocks."""
    beta: Above0 = 2.0
    """Difference at which the smooth-L1 loss turns from square to linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_ratio or self.mask != "uniform":
            raise UsageError(
                f"nothing is hidden in fd: mask={self.mask} mask_ratio={self.mask_ratio}; allowed: "
                "mask=uniform mask_ratio=0; for a distillation of visible patches take the recipe "
                "kd or maskalign"
            )


def needs(config: Config) -> TargetSpec:
    """Say what is read: the teacher's last level."""
    return TargetSpec(
        teacher=config.teacher,
        levels=(config.teacher_depth,),
        fields=("features",),
        patches=config.patches,
        scale=(0.08, 1.0),
        derive="fd",
    )


class Model(nn.Module):
    """Combine the encoder and one Linear; only the encoder is taken home."""

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
        self.decoder = nn.Linear(self.encoder.embed_dim, config.teacher_width)
        self.beta = config.beta

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule: the table of relative positions is decayed, as in the
        released code."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss over all tokens, and its part at CLS, from images (B,3,H,W), targets
        (B,1+P,Dt)."""
        pred = self._predict(batch["images"])
        loss = losses.fd_smooth_l1(pred, batch["targets"], self.beta)
        cls = losses.fd_smooth_l1(pred[:, 0], batch["targets"][:, 0], self.beta)
        return {"loss": loss, "cls": cls.detach()}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target, (B,1+P,Dt) both, at all tokens: none is hidden."""
        return {"cosine_fd": (self._predict(batch["images"]), batch["targets"])}

    def _predict(self, images: Tensor) -> Tensor:
        """Map images (B,3,H,W) -> (B,1+P,Dt)."""
        return self.decoder(beit.encode_all(self.encoder, self.encoder.patch_embed(images)))
