"""MVP style: predict CLIP's output at hidden patches, mask tokens in their place in the encoder.

Paper:    the style of Wei et al., "MVP: Multimodality-guided Visual Pre-training", ECCV 2022 (arXiv
          2203.05175), by the accounts of MaskAlign (arXiv 2211.08887, Tables 1 and 7), CAE v2
          (arXiv 2211.09799) and MILAN (arXiv 2208.06049), which measure themselves against it; not
          a reproduction of it
Command:  student train --recipe mvp --cache CACHE --images SRC --batch-size 128
          (16 processes: 2,048)
Cost:     ViT-B, all 196 patches and 79 of them hidden: 52.9 GMAC a picture forward and backward;
          the teacher's 17.6 are in the cache
Expected: MVP itself, ImageNet-1k, ViT-B from CLIP-B/16, 300 epochs: 84.4 fine-tuned, 75.4 linear
          (published; this style of it not measured yet)
Code:     none was released; the encoder is BEiT's: shared relative positions, LayerScale

Reference global batch: 2,048; lr 1.5e-3 as it is, at any batch size (lr=null with blr=1.875e-4
scales it).

What differs: only this much is told of it - block-wise masks of 40 %, masked patches in the
encoder's input, a cosine distance from CLIP's output. That the loss is meant over the hidden
patches, that the head is one Linear, and the optimiser, which is that of the CAE family, are ours.

Shapes: B batch, P patches, M masked, D width, E target width.
"""

from __future__ import annotations

from typing import Annotated

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from student import masking
from student.config import (
    CHECKED,
    Above0,
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
    "mask_ratio": 0.4,
    "all_tokens": True,
    "derive": "z",
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Take the masks of MaskAlign's account and the optimiser of the CAE family."""

    drop_path: Fraction = 0.1
    mask: Mask = "blockwise"
    mask_ratio: Fraction = 0.4
    lr: Above0 | None = 1.5e-3
    min_lr: NotNegative = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_grad: Above0 | None = 3.0
    epochs: Positive = 300
    warmup_epochs: NotNegative = 10

    family: Annotated[str, one_of("beit")] = "beit"
    """Architecture of the encoder: timm's Beit with one table of relative positions for all
    blocks."""
    layer_scale: Above0 = 0.1
    """Start value of LayerScale in the encoder's blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hides_patches(self)


def needs(config: Config) -> TargetSpec:
    """Say what is read: the teacher's last level, and what the mask is drawn from."""
    return TargetSpec(
        teacher=config.teacher,
        levels=(config.teacher_depth,),
        fields=("features", *masking.fields(config.mask)),
        patches=config.patches,
        derive=config.target,
    )


class Model(nn.Module):
    """Combine the encoder, its mask token and one Linear; only the encoder is taken home."""

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
        self.mask_token = latent_regressor.build_mask_token(self.encoder.embed_dim)
        self.head = nn.Linear(self.encoder.embed_dim, config.target_width)
        beit.init_weights(self.head)
        self.target = config.target

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss, which is its only part, from images (B,3,H,W), targets (B,1+P,E),
        ids_masked (B,M)."""
        loss = losses.cosine_distance(*self._pair(batch)).mean()
        return {"loss": loss, "masked": loss.detach()}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target, (B,M,E) both, at the hidden patches, the only ones
        that are predicted."""
        return {f"cosine_{self.target}": self._pair(batch)}

    def _pair(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        patches, ids = self.encoder.patch_embed(batch["images"]), batch["ids_masked"]
        token = self.mask_token.to(patches.dtype).expand(*ids.shape, -1)
        patches = patches.scatter(1, ids.unsqueeze(-1).expand_as(token), token)
        pred = self.head(vit.gather_tokens(beit.encode_all(self.encoder, patches), ids + 1))
        return pred, vit.gather_tokens(batch["targets"], ids + 1)
