"""MR-Align: align visible tokens with a teacher, predict hidden pixels. Ours, the first to try.

Paper:    none; this combination is ours, from parts that were published:
          - alignment of CLS and visible tokens with five teacher levels, and the optimiser:
            MaskAlign (arXiv 2211.08887)
          - both halves in one step, each token asked for one thing only, 0.5 / 0.5, a quarter
            visible, chosen by the teacher's attention: MR-MAE (Gao et al., "Mimic before
            Reconstruct", arXiv 2303.05475), whose training code was never released
          - decoder and normalised-pixel loss on hidden patches: MAE (arXiv 2111.06377)
Command:  student train --recipe mralign --cache CACHE --images SRC --batch-size 128
          (8 processes: 1,024)
Cost:     ViT-B, 49 of 196 patches: about 30 GMAC a picture forward and backward; the teacher's 17.6
          are in the cache
Expected: not measured yet; its parents: 85.4 (MaskAlign, 200 epochs), 85.0 (MR-MAE, plain ViT-B,
          200 epochs)

Reference global batch: 1,024, so blr 1.5e-4 is lr 6e-4.

What differs from the parents: 49 visible patches where MaskAlign keeps 58; aligned levels come
before the final norm, as in MaskAlign, and the decoder reads the last block after it, as in MAE, so
here the norm is trained; MR-MAE sums several layers and mimics one, and warms up over 80 epochs.

Shapes: B batch, V visible, P patches, L levels.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from featcache.errors import UsageError
from student import masking
from student.config import (
    CHECKED,
    Depth,
    Fraction,
    Mask,
    NotNegative,
    Positive,
    RecipeConfig,
    check_hides_patches,
)
from student.models import alignment, losses, vit
from student.models.alignment_levels import aligned_levels, parse_align_levels, parse_level_weights
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features", "attention"),
    "levels": "last:5",
    "mask_ratio": 0.75,
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    """Take MaskAlign's optimiser, MR-MAE's ratio and weights, MAE's decoder."""

    drop_path: Fraction = 0.1
    mask: Mask = "attentive"
    mask_ratio: Fraction = 0.75
    min_lr: NotNegative = 1e-5

    level_weights: str = "top:5"
    """Weights of the aligned teacher levels: top:K has 1/K for the last K of them, mean the same
    for all, last 1 for the last, linear-decay falls linearly to 0 at the lowest."""
    align_levels: str = "auto"
    """Teacher levels that are aligned: auto (those that level_weights names), last:K, or block
    numbers from 1 such as 8,10,12."""
    align_weight: NotNegative = 0.5
    """Weight of the alignment loss, at [CLS] and visible patches (MaskAlign's)."""
    pixel_weight: NotNegative = 0.5
    """Weight of the pixel loss, at hidden patches (MAE's)."""
    decoder_width: Positive = 512
    """Channels of the decoder."""
    decoder_depth: Depth = 8
    """Blocks of the decoder."""
    decoder_heads: Positive = 16
    """Attention heads of a decoder block; they divide decoder_width."""
    norm_pix: bool = True
    """Whether each target patch is taken less its mean and over its standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_level_weights(self.level_weights)
        parse_align_levels(self.align_levels)
        check_hides_patches(self)
        vit.check_decoder(self.decoder_width, self.decoder_heads)
        if self.align_weight + self.pixel_weight == 0:
            raise UsageError(
                "nothing to learn: align_weight=0 and pixel_weight=0; allowed: at least one above "
                "0; change one of them"
            )


def needs(config: Config) -> TargetSpec:
    """Say what is read: the aligned levels, and what the mask is drawn from."""
    return TargetSpec(
        teacher=config.teacher,
        levels=tuple(
            aligned_levels(config.level_weights, config.align_levels, config.teacher_depth)
        ),
        fields=("features", *masking.fields(config.mask)),
        patches=config.patches,
        visible_only=True,  # AlignmentHead gathers [CLS] and ids_keep
    )


class Model(nn.Module):
    """Combine the encoder, the alignment head and the decoder; only the encoder is taken home."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        weights = aligned_levels(config.level_weights, config.align_levels, config.teacher_depth)
        self.encoder = vit.build(
            config.encoder,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
        )
        width = self.encoder.embed_dim
        self.align = alignment.AlignmentHead(
            len(self.encoder.blocks), width, config.teacher_depth, config.teacher_width, weights
        )
        self.decoder = vit.Decoder(
            width,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            config.img_size // config.patch_size,
            config.patch_size**2 * 3,
        )
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Return W, which starts near the identity and is not pulled to zero; tokens are the
        optimiser's matter (decay_tokens)."""
        return {"align.mix"}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its parts from images (B,3,H,W), features (B,L,1+P,Dt), ids_keep
        (B,V), ids_masked (B,P-V)."""
        images, ids_keep, ids_masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        outputs = vit.encode(self.encoder, images, ids_keep)
        aligned, parts = self.align(outputs, batch["features"], ids_keep)
        pred = self.decoder(self.encoder.norm(outputs[-1]), ids_keep, ids_masked)
        patches = vit.gather_patches(images, ids_masked, self.config.patch_size)
        pixel = losses.pixel_mse(pred, patches, normalise=self.config.norm_pix)
        loss = self.config.align_weight * aligned + self.config.pixel_weight * pixel
        return {"loss": loss, "align": aligned.detach(), "pixel": pixel.detach(), **parts}

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
        """Predict the hidden patches (B,M,p*p*3) of a batch as `forward` takes it, but for its
        features; normalised with norm_pix."""
        ids_keep, ids_masked = batch["ids_keep"], batch["ids_masked"]
        tokens = self.encoder.norm(vit.encode(self.encoder, batch["images"], ids_keep)[-1])
        return self.decoder(tokens, ids_keep, ids_masked)

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction of each aligned level and the level, (B,N,Dt) both, at [CLS] and
        the visible patches of a batch as `forward` takes it."""
        outputs = vit.encode(self.encoder, batch["images"], batch["ids_keep"])
        pairs = self.align.pairs(outputs, batch["features"], batch["ids_keep"])
        return {f"cosine_{level}": (predicted, target) for level, predicted, target in pairs}
