"""MAE: predict the pixels of hidden patches; needs no teacher and no cache.

Paper:    He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv
          2111.06377)
Command:  student train --recipe mae --images SRC --batch-size 512      (8 processes: 4,096)
Cost:     ViT-B, 49 of 196 patches: 29.0 GMAC a picture forward and backward, 16.1 of them in the
          decoder
Expected: ImageNet-1k, ViT-B, --epochs 1600: 83.6 fine-tuned, 67.8 linear (published, not yet ours;
          the default is its 800 epochs)
Code:     facebookresearch/mae, models_mae.py, with --norm_pix_loss as its PRETRAIN.md has it

Reference global batch: 4,096, so blr 1.5e-4 is lr 2.4e-3.

What differs from the released code: cls_token and mask_token are not decayed (decay_tokens=true
decays them); bf16 in place of fp16 with a scaled loss, by the trainer; masks are drawn per (seed,
epoch, key).

Shapes: B batch, V visible, P patches, C = p*p*3 values of a patch.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from student import masking
from student.config import CHECKED, Depth, NotNegative, Positive, RecipeConfig, check_hides_patches
from student.models import losses, vit
from student.recipes import TargetSpec

# by default; `featcache info` and `extract --for` read this
SERVED_BY = {"fields": (), "levels": ""}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    """Hold the settings of PRETRAIN.md."""

    epochs: Positive = 800
    warmup_epochs: NotNegative = 40

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
        check_hides_patches(self)
        vit.check_decoder(self.decoder_width, self.decoder_heads)


def needs(config: Config) -> TargetSpec:
    """Say what is read: nothing but what the mask is drawn from, which for a uniform mask is
    nothing."""
    fields = masking.fields(config.mask)
    return TargetSpec(
        teacher=config.teacher if fields else "", levels=(), fields=fields, patches=config.patches
    )


class Model(nn.Module):
    """Combine the encoder and MAE's decoder; only the encoder is taken home."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = vit.build(
            config.encoder,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
        )
        self.decoder = vit.Decoder(
            self.encoder.embed_dim,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
            config.img_size // config.patch_size,
            config.patch_size**2 * 3,
        )
        self.patch_size = config.patch_size
        self.norm_pix = config.norm_pix

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss, which is its only part, from images (B,3,H,W), ids_keep (B,V),
        ids_masked (B,P-V)."""
        pred = self.reconstruct(batch)
        patches = vit.gather_patches(batch["images"], batch["ids_masked"], self.patch_size)
        pixel = losses.pixel_mse(pred, patches, normalise=self.norm_pix)
        return {"loss": pixel, "pixel": pixel.detach()}

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
        """Predict the hidden patches (B,M,C) of a batch as `forward` takes it, normalised with
        norm_pix."""
        images, ids_keep, ids_masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        tokens = self.encoder.norm(vit.encode(self.encoder, images, ids_keep)[-1])
        return self.decoder(tokens, ids_keep, ids_masked)
