"""CAE: predict tokens of hidden patches from latents that must lie where the encoder puts them.

Paper:    Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2023
          (arXiv 2202.03026)
Command:  student train --recipe cae --cache CACHE --images SRC --batch-size 64
          (32 processes: 2,048)
          the cache: featcache extract --policy cae ..., with the tokens of DALL-E's encoder:
          --teacher dvae --add
Cost:     ViT-B, 98 of 196 patches: 55.0 GMAC a picture forward and backward, 8.6 of them the second
          encoding, whose output changes with the student and cannot be cached; the tokenizer's 26.1
          are in the cache
Expected: ImageNet-1k, ViT-B, fine-tuned / linear / attentive: 300 epochs 83.6 / 64.1 / 73.8, 800
          epochs 83.8 / 68.6 / 75.9, 1600 epochs 83.9 / 70.4 / 77.1; ViT-L, 1600: 86.3 / 78.1 / 81.2
          (published, not yet ours)
Code:     Atten4Vis/CAE, models/modeling_cae.py, engine_for_pretraining.py; scripts/cae_base_800e.sh

Reference global batch: 2,048; lr 1.5e-3 as it is, at any batch size (lr=null with blr=1.875e-4
scales it). Warm-up is 10, 20 and 40 epochs of 300, 800 and 1600.

Table 2 by settings: decoder_depth=0 align_weight=0; align_weight=0; the defaults. Without the
decoder one Linear predicts the tokens from the regressor's output.

Other targets of the hidden patches, for which no code was released (its CLIP serves CAE v2 alone):
    target=z                         CAE v2's Table 1, row 1, "+ CLIP (baseline)": 83.6 fine-tuned,
                                     75.8 linear at 300 epochs (epochs=300 warmup_epochs=10); f for
                                     a teacher without a projection
    target=pixels; align_weight=0    Figure 4, pixel colours with the alignment and without it
The decoder's Linear is then as wide as the target. The error of z and f is 1 - cosine, mean over
hidden patches: row 1 changes the target, and cosine is that paper's default distance. That of
pixels is MAE's mean squared error; norm_pix=false takes the colours without the norm of each patch.
Neither paper says more; the alignment stays, and so do CAE's crops.

    loss = cross-entropy(decoder(z), tokens) + 2 * MSE(z, z');
    z = regresser(mask tokens | encoder(visible patches)),
    z' = encoder(masked patches) without gradient: the same weights, in training mode

What differs from the released code:
- z' comes from the encoder itself; there a second one shares its memory after every step, which is
  the same numbers;
- cls_token and mask_token are not decayed (decay_tokens=true decays them); the learning rate
  reaches its peak at one step, there at two in a row (repeat_peak=true); bf16 in place of fp16, by
  the trainer;
- mask=uniform hides P - int(P (1 - ratio)) patches, there int(P ratio) (mask_count=hidden);
- large is as its released script in fact runs: a regressor and a decoder of width 768 and 12 heads
  behind a Linear and a norm, Xavier start (a line break in it drops what was meant:
  regressor_width=1024 regressor_heads=16 xavier=false).
align_drop_path=false computes z' without drop path; the released code has it on, with draws of its
own.

Shapes: B batch, V visible, P patches, M = P - V masked, W regressor width, K vocabulary, E target
width.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from timm.models.beit import Block
from torch import Tensor, nn

from featcache.errors import UsageError
from student import masking
from student.config import (
    CHECKED,
    Above0,
    Depth,
    DepthOrZero,
    Fraction,
    Mask,
    NotNegative,
    OutputConfig,
    Positive,
    check_hides_patches,
    one_of,
)
from student.models import beit, drop_path, latent_regressor, losses, vit
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("dvae/token_ids",),
    "levels": "",
    "mask_ratio": 0.5,
    "scale": (0.08, 1.0),
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Hold the settings of scripts/cae_base_800e.sh; large by cae_large_1600e.sh."""

    TARGETS: ClassVar[tuple[str, ...]] = ("tokens", "z", "f", "pixels")
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "large": {"layer_scale": 1e-5, "epochs": 1600, "warmup_epochs": 40.0},
    }

    drop_path: Fraction = 0.1
    mask: Mask = "blockwise"
    mask_ratio: Fraction = 0.5
    lr: Above0 | None = 1.5e-3
    min_lr: NotNegative = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip_grad: Above0 | None = 3.0
    epochs: Positive = 800
    warmup_epochs: NotNegative = 20

    target: str = "tokens"
    """What is predicted of the hidden patches: the tokenizer's tokens, the teacher's output z
    (after its projection) or f (of its last norm), or pixels."""
    norm_pix: bool = True
    """With target=pixels, whether each target patch is taken less its mean and over its standard
    deviation."""
    family: Annotated[str, one_of("cae")] = "cae"
    """Architecture of the encoder: timm's Beit with CAE's fixed positions and start values."""
    layer_scale: Above0 = 0.1
    """Start value of LayerScale in the encoder's blocks."""
    xavier: bool = True
    """Whether every Linear starts as Xavier has it; else as BEiT's truncated normals, scaled down
    with depth."""
    regressor_width: Positive = 768
    """Channels of regressor and decoder; a Linear and a norm lie between them and an encoder of
    another width."""
    regressor_depth: Depth = 4
    """Blocks of the latent contextual regressor."""
    regressor_heads: Positive = 12
    """Attention heads of a block of regressor and decoder; they divide regressor_width."""
    decoder_depth: DepthOrZero = 4
    """Blocks of the decoder; 0: one Linear predicts from the regressor's output (Table 2)."""
    token_field: str = "dvae/token_ids"
    """The cache's array of tokens: NAME/token_ids of the tokenizer NAME, or token_ids."""
    vocabulary: Positive = 8192
    """Number of different tokens that the tokenizer has."""
    align_weight: NotNegative = 2.0
    """Weight of the alignment of the masked patches' latents with those that the encoder gives; 0:
    none, and no second encoding (Table 2)."""
    align_drop_path: bool = True
    """Whether drop path is on in the second encoding, as in the released code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        beit.check_heads("regressor", self.regressor_width, self.regressor_heads)
        check_hides_patches(self)
        if self.decoder_depth < 0:
            raise UsageError(
                f"cannot build the decoder: decoder_depth={self.decoder_depth}; allowed: 0 or more "
                "blocks"
            )
        if not self.norm_pix and self.target != "pixels":
            raise UsageError(
                f"norm_pix=false does nothing with target={self.target}; allowed: with "
                "target=pixels; leave it out"
            )
        if not self.align_drop_path and self.align_weight == 0:
            raise UsageError(
                "align_drop_path=false does nothing with align_weight=0: there is no second "
                "encoding"
            )
        if self.token_field.rpartition("/")[2] != "token_ids":
            raise UsageError(
                f"cannot read token_field={self.token_field!r}; allowed: NAME/token_ids of the "
                "tokenizer NAME, or token_ids; change it with token_field=VALUE"
            )


def needs(config: Config) -> TargetSpec:
    """Say what is read: the tokens or the teacher's last level, neither for pixels, and what the
    mask is drawn from."""
    read = {"tokens": (config.token_field,), "pixels": ()}.get(config.target, ("features",))
    fields = (*read, *masking.fields(config.mask))
    of_teacher = "features" in read
    return TargetSpec(
        teacher=config.teacher if fields else "",
        levels=(config.teacher_depth,) if of_teacher else (),
        fields=fields,
        patches=config.patches,
        scale=(0.08, 1.0),
        derive=config.target if of_teacher else "",
        vocabulary=config.vocabulary if config.target == "tokens" else 0,
    )


def _output_width(config: Config) -> int:
    """Return what the decoder gives for a patch: a logit a token, E channels, or p*p*3 colours."""
    widths = {"tokens": config.vocabulary, "pixels": 3 * config.patch_size**2}
    return widths.get(config.target, config.target_width)


class Decoder(nn.Module):
    """Decode the masked latents alone, with their positions, by self-attention into the logits of
    the tokens, or into another target."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, depth = config.regressor_width, config.decoder_depth
        rates = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.regressor_heads, qkv_bias=True, drop_path=rate,
                  init_values=latent_regressor.LAYER_SCALE,
                  norm_layer=vit.NORM)  # type: ignore[arg-type]  # a partial
            for rate in rates
        )  # fmt: skip
        drop_path.replace(self.decoder_blocks)
        self.norm = vit.NORM(width) if depth else nn.Identity()
        self.head = nn.Linear(width, _output_width(config))
        latent_regressor.initialise(
            self, self.decoder_blocks, ("attn.proj", "mlp.fc2"), xavier=config.xavier
        )

    def forward(self, latents: Tensor, positions: Tensor) -> Tensor:
        """Map latents, positions (B,M,W) -> logits (B,M,K), or predictions (B,M,E)."""
        x = latents + positions if len(self.decoder_blocks) else latents
        for block in self.decoder_blocks:
            x = block(x)
        return self.head(self.norm(x))


class Model(nn.Module):
    """Combine the encoder, the regressor and the decoder; only the encoder is taken home. Names are
    those of the released code."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, grid = config.regressor_width, config.img_size // config.patch_size
        self.encoder = beit.build(
            config.encoder,
            config.family,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
            xavier=config.xavier,
        )
        self.encoder_to_regresser, self.encoder_to_regresser_norm = (
            latent_regressor.width_projection(self.encoder.embed_dim, width, xavier=config.xavier)
        )
        self.rd_pos_embed = latent_regressor.fixed_positions(width, grid)
        self.mask_token = latent_regressor.build_mask_token(width)
        self.regresser = latent_regressor.LatentRegressor(
            width,
            config.regressor_depth,
            config.regressor_heads,
            config.drop_path,
            final_norm=True,
            xavier=config.xavier,
        )
        self.decoder = Decoder(config)
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its parts from images (B,3,H,W), ids_keep (B,V), ids_masked (B,M),
        and token_ids (B,P) or targets (B,1+P,E), none for pixels."""
        latents, predicted = self._predict(batch)
        loss, parts = self._target_loss(predicted, batch)
        if self.config.align_weight == 0:
            return {"loss": loss, **parts}
        # After the pass with gradients: autocast keeps its casts of the weights, and casts made
        # here would have none.
        target = self._alignment_target(batch["images"], batch["ids_masked"])
        with losses.autocast_off(latents):
            align = F.mse_loss(losses.upcast(latents), losses.upcast(target))
        return {"loss": loss + self.config.align_weight * align, "align": align.detach(), **parts}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target of a teacher's output, (B,M,E) both, at the hidden
        patches; nothing where tokens or pixels are the target."""
        if self.config.target in ("tokens", "pixels"):
            return {}
        target = vit.gather_tokens(batch["targets"], batch["ids_masked"] + 1)
        return {f"cosine_{self.config.target}": (self._predict(batch)[1], target)}

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Predict the hidden patches (B,M,p*p*3) of a batch as `forward` takes it, normalised with
        norm_pix; None but with target=pixels."""
        return self._predict(batch)[1] if self.config.target == "pixels" else None

    def _predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the latents (B,M,W) of the masked patches, and what the decoder makes of them."""
        ids_keep, ids_masked = batch["ids_keep"], batch["ids_masked"]
        visible = self._encode(batch["images"], ids_keep)
        pos_x = vit.gather_positions(self.rd_pos_embed, ids_masked + 1)
        pos_visible = vit.gather_positions(self.rd_pos_embed, ids_keep + 1)
        latents = self.regresser(self.mask_token.expand_as(pos_x), visible, pos_x, pos_visible)
        return latents, self.decoder(latents, pos_x)

    def _target_loss(
        self, predicted: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of what is predicted (B,M,E) of the masked patches, and its parts."""
        ids_masked = batch["ids_masked"]
        if self.config.target == "pixels":
            patches = vit.gather_patches(batch["images"], ids_masked, self.config.patch_size)
            pixel = losses.pixel_mse(predicted, patches, normalise=self.config.norm_pix)
            return pixel, {"pixel": pixel.detach()}
        if self.config.target != "tokens":
            target = vit.gather_tokens(batch["targets"], ids_masked + 1)
            masked = losses.cosine_distance(predicted, target).mean()
            return masked, {"masked": masked.detach()}
        labels = batch["token_ids"].gather(1, ids_masked)
        with losses.autocast_off(predicted):
            token = F.cross_entropy(losses.upcast(predicted).flatten(0, 1), labels.flatten())
        right = (predicted.argmax(-1) == labels).float().mean()
        return token, {"token": token.detach(), "accuracy": right.detach()}

    def _encode(self, images: Tensor, ids: Tensor) -> Tensor:
        """Encode images at ids (B,N) -> latents (B,N,W) of these patches, without CLS."""
        x = beit.encode(self.encoder, images, ids)
        return self.encoder_to_regresser_norm(self.encoder_to_regresser(x))[:, 1:]

    @torch.no_grad()
    def _alignment_target(self, images: Tensor, ids_masked: Tensor) -> Tensor:
        """Return the encoder's own latents of the masked patches (B,M,W), a constant."""
        training = self.encoder.training
        self.encoder.train(training and self.config.align_drop_path)
        drop_path.use_encoding(self.encoder, 1)  # draws of its own
        target = self._encode(images, ids_masked)
        drop_path.use_encoding(self.encoder, 0)
        self.encoder.train(training)
        return target
