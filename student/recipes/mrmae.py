"""MR-MAE: visible tokens mimic a teacher's output, hidden patches are predicted as pixels.

Paper:    Gao et al., "Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature
          Mimicking" (arXiv 2303.05475)
Command:  student train --recipe mrmae --cache CACHE --images SRC --batch-size 128
          (8 processes: 1,024)
Cost:     ViT-B, 49 of 196 patches: 29.1 GMAC a picture forward and backward; family=conv_vit 49.0,
          21.3 of them in the convolutions; the teacher's 17.6 are in the cache
Expected: ImageNet-1k from CLIP-B/16, fine-tuned: ViT-B, 200 epochs 85.0; family=conv_vit, 200
          epochs 85.5, 400 and 800 epochs 85.8; small 83.6, large 86.8, huge 88.0 at 200 (88.5 at
          392 pixels; published, not yet ours)
Code:     none was released; the backbone and its pixel loss are Alpha-VL/ConvMAE's,
          models_convmae.py

Reference global batch: 1,024, so blr 1.5e-4 is lr 6e-4. The defaults are Table 3's fourth row with
the schedule of Table 1 (there with family=conv_vit).

Table 3 by settings, each with epochs=200 (warmup_epochs=40 is ours):
    mimic_weight=0 mask=uniform fuse=last      MAE, pixels alone: 83.0
    mask=uniform fuse=last                     + mimic loss: 84.7
    fuse=last                                  + focused tokens: 84.9
    the defaults                               + multi-layer fusion: 85.0
    mimic_at=decoder                           both targets at the decoder, which conflict: 83.3
    pixel_weight=0                             mimic loss alone: 84.9
    family=conv_vit                            + masked convolutions: 85.5
Table 6: family=conv_vit epochs=200 with encoder=small, base, large or huge (679 M parameters, 728 M
with heads and decoder; sizes but base are not the authors': student/models/conv_vit.py).
Table 4: teacher=dino-b16 is 84.0; joint=dino-b16, two teachers and a head for each, 83.8. The
second one's arrays are added to the cache: featcache extract --teacher dino-b16 --levels last:1
--add --out CACHE

    loss = mimic_weight * MSE(head(fused visible tokens), target)
           + pixel_weight * MSE(decoder(fused), pixels)

What the paper leaves open, and what is taken here:
- target=fd, the teacher's output after its last norm, normalised once more per token, patches only;
  f, z and h (the last block's stream, normalised) are options;
- focused tokens draws by the teacher's attention, as MILAN, which it names; its own text reads
  as mask=topk;
- fuse=auto sums blocks 3, 6, 9 and 12 of 12, and in conv_vit both stages and the last block, as
  ConvMAE; the final norm is applied to the sum, so what is taken home has a norm that was trained
  on it;
- both losses are means over channels; reduction=sum is Eq. 1 and 2 as printed, which sum over them;
- "maximum learning rate 1.5e-4" is read as MAE's base learning rate, that of a batch of 256;
  lr=1.5e-4 takes it as printed;
- joint: the mean of both mimic losses; mimic_at=decoder: both at the hidden patches, from the same
  decoder;
- family=conv_vit has no CLS token, as ConvMAE's code; conv_cls=true gives it one, as the published
  checkpoints have.
What differs from ConvMAE's code: mask_token and the CLS token are not decayed (decay_tokens=true
decays them); bf16 in place of fp16, by the trainer; patches of any size that 4 divides.

Shapes: B batch, V visible, P patches, M = P - V masked, D width, E target width; N tokens, with CLS
where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from featcache.errors import UsageError
from student import masking
from student.config import (
    CHECKED,
    Depth,
    Mask,
    NotNegative,
    OutputConfig,
    Positive,
    check_hides_patches,
    one_of,
)
from student.models import conv_vit, losses, vit
from student.models.alignment_levels import parse_block_numbers
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features", "attention"),
    "levels": "last:1",
    "mask_ratio": 0.75,
    "derive": "fd",
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Hold the settings of the paper's section 4.1."""

    TARGETS: ClassVar[tuple[str, ...]] = ("fd", "f", "h", "z")

    mask: Mask = "attentive"
    epochs: Positive = 400
    warmup_epochs: NotNegative = 80

    target: str = "fd"
    """What is mimicked: fd is the output of the teacher's last norm, normalised once more, f that
    output, z the one after the projection, h the last block's stream, normalised."""
    family: Annotated[str, one_of("mae", conv_vit.FAMILY)] = "mae"
    """Architecture of the encoder: mae is a plain ViT, conv_vit has masked convolutions before its
    blocks (Table 3)."""
    conv_cls: bool = False
    """Whether a conv_vit has a [CLS] token; a plain ViT has one anyway."""
    fuse: str = "auto"
    """Blocks whose outputs are summed before the heads: auto is every quarter of a plain ViT and
    both stages with the last block of a conv_vit, last the last block, or numbers from 1 such as
    3,6,9,12."""
    mimic_at: Annotated[str, one_of("encoder", "decoder")] = "encoder"
    """Where the teacher is mimicked: at the encoder's visible patches, or at the decoder's hidden
    ones (Table 3)."""
    mimic_weight: NotNegative = 0.5
    """Weight of the mimic loss (Eq. 2); 0: no teacher."""
    pixel_weight: NotNegative = 0.5
    """Weight of the pixel loss; 0: no decoder."""
    reduction: Annotated[str, one_of("mean", "sum")] = "mean"
    """How both losses treat the channels of a patch: by their mean, or by their sum."""
    joint: str = ""
    """A second teacher, whose arrays were added to the cache, with a head of its own (Table 4);
    empty: none."""
    joint_depth: Depth = 12
    """Blocks of the second teacher; a fact of the cache, filled in from there."""
    joint_width: Positive = 768
    """Channels of the second teacher; a fact of the cache, filled in from there."""
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
        parse_fuse(self.fuse)
        vit.check_decoder(self.decoder_width, self.decoder_heads)
        if self.family == conv_vit.FAMILY:
            conv_vit.check_patch(self.patch_size)
        if self.pixel_weight > 0:
            check_hides_patches(self)
        _check_combinations(self)

    @property
    def mimics(self) -> bool:
        """Return whether a teacher is mimicked."""
        return self.mimic_weight > 0


def parse_fuse(text: str) -> tuple[int, ...]:
    """Return the blocks that `fuse` lists, ascending; none for auto and last."""
    if text in ("auto", "last"):
        return ()
    if numbers := parse_block_numbers(text):
        return tuple(numbers)
    raise UsageError(
        f"cannot read fuse={text!r}; allowed: auto, last, or block numbers from 1 such as "
        "3,6,9,12; change it with fuse=VALUE"
    )


def _check_combinations(config: Config) -> None:
    """Refuse settings that would do nothing beside the others."""
    pixels, at_decoder = config.pixel_weight > 0, config.mimic_at == "decoder"
    wrong = {
        "conv_cls=true does nothing with family=mae, which has a CLS token": config.conv_cls
        and config.family == "mae",
        "mimic_weight=0 and pixel_weight=0 leave nothing to learn": not config.mimics
        and not pixels,
        "mimic_at=decoder does nothing with mimic_weight=0": at_decoder and not config.mimics,
        "mimic_at=decoder puts both targets at the decoder, pixel_weight=0 has one": at_decoder
        and not pixels,
        "norm_pix=false does nothing with pixel_weight=0": not config.norm_pix and not pixels,
        f"joint={config.joint} does nothing with mimic_weight=0": config.joint
        and not config.mimics,
        f"joint={config.joint} is the first teacher": config.joint
        and config.joint == config.teacher,
        "joint and target=z: a second teacher has no projection of the same kind": config.joint
        and config.target == "z",
    }
    for text, found in wrong.items():
        if found:
            raise UsageError(f"cannot train mrmae so: {text}; change one of them")


def needs(config: Config) -> TargetSpec:
    """Say what is read: the last level of each teacher, and what the mask is drawn from."""
    features = ("features",) if config.mimics else ()
    second = (f"{config.joint}/features",) if config.joint else ()
    fields = (*features, *second, *masking.fields(config.mask))
    return TargetSpec(
        teacher=config.teacher if fields else "",
        levels=(config.teacher_depth,) if config.mimics else (),
        fields=fields,
        patches=config.patches,
        visible_only=config.mimic_at == "encoder",
        derive=config.target if config.mimics and config.target != "h" else "",
        second=config.joint,
        second_level=config.joint_depth if config.joint else 0,
    )


class Model(nn.Module):
    """Combine the encoder, what fuses its layers, a mimic head for each teacher and the decoder;
    only the encoder is taken home."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.stages = _build_encoder(config)
        self.prefix = self.encoder.num_prefix_tokens
        self.blocks = _fused_blocks(config, _depth(self.encoder))
        width = config.decoder_width if config.mimic_at == "decoder" else self.encoder.embed_dim
        self.mimic_head = nn.Linear(width, config.target_width) if config.mimics else None
        self.joint_head = nn.Linear(width, config.joint_width) if config.joint else None
        for head in (self.mimic_head, self.joint_head):
            if head is not None:
                vit.init_linear_and_norm(head)
        self.decoder = (
            _build_decoder(self.encoder.embed_dim, config, self.prefix)
            if config.pixel_weight > 0
            else None
        )

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its parts.

        images (B,3,H,W), targets (B,1+P,E) or features (B,1,1+P,E), second (B,1+P,E2), ids_keep
        (B,V), ids_masked (B,M).
        """
        images, ids_keep, ids_masked = batch["images"], batch["ids_keep"], batch["ids_masked"]
        fused = self._fuse_layers(images, ids_keep)
        states, weighted, parts = None, [], {}
        if self.decoder is not None:
            states = self.decoder.masked_states(fused, ids_keep, ids_masked)
            patches = vit.gather_patches(images, ids_masked, self.config.patch_size)
            pred = self.decoder.decoder_pred(states)
            pixel = losses.pixel_mse(pred, patches, normalise=self.config.norm_pix)
            parts["pixel"] = self._reduce(pixel, patches.shape[-1])
            weighted.append(self.config.pixel_weight * parts["pixel"])
        if self.mimic_head is not None:
            for name, pred, target in self._mimicked(fused, states, batch):
                parts[name] = self._mimic_loss(pred, target)
            both = [parts[name] for name in ("mimic", "joint") if name in parts]
            weighted.append(self.config.mimic_weight * torch.stack(both).mean())
        return {
            "loss": torch.stack(weighted).sum(),
            **{name: part.detach() for name, part in parts.items()},
        }

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Predict the hidden patches (B,M,p*p*3) of a batch as `forward` takes it, but for its
        targets; normalised with norm_pix. None with pixel_weight=0."""
        if self.decoder is None:
            return None
        fused = self._fuse_layers(batch["images"], batch["ids_keep"])
        return self.decoder(fused, batch["ids_keep"], batch["ids_masked"])

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target of each teacher, (B,N,E) both, at the visible
        patches, or at the hidden ones with mimic_at=decoder. A second teacher's where the batch has
        it."""
        if self.mimic_head is None:
            return {}
        fused, states = self._fuse_layers(batch["images"], batch["ids_keep"]), None
        if self.config.mimic_at == "decoder" and self.decoder is not None:
            states = self.decoder.masked_states(fused, batch["ids_keep"], batch["ids_masked"])
        names = {"mimic": self.config.target, "joint": "joint"}
        given = islice(self._mimicked(fused, states, batch), None if "second" in batch else 1)
        return {f"cosine_{names[name]}": (pred, target) for name, pred, target in given}

    def _mimicked(
        self, fused: Tensor, states: Tensor | None, batch: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the part's name, predictions and targets (B,N,E) of each teacher, from the
        encoder's tokens, or from the decoder's states of the hidden patches."""
        assert self.mimic_head is not None
        tokens, ids = fused[:, self.prefix :], batch["ids_keep"]
        if self.config.mimic_at == "decoder":
            assert states is not None
            tokens, ids = states, batch["ids_masked"]
        yield "mimic", self.mimic_head(tokens), vit.gather_tokens(_mimic_target(batch), ids + 1)
        if self.joint_head is not None:
            yield "joint", self.joint_head(tokens), vit.gather_tokens(batch["second"], ids + 1)

    def _fuse_layers(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Sum the layers, after which comes the encoder's norm: images, ids_keep (B,V) ->
        (B,N,D)."""
        if isinstance(self.encoder, conv_vit.ConvViT):
            outputs, maps = self.encoder.encode(images, ids_keep)
            fused = torch.stack([outputs[i - 1] for i in self.blocks]).sum(0)
            if self.stages is not None:
                fused = fused + F.pad(self.stages(maps, ids_keep), (0, 0, self.prefix, 0))
        else:
            outputs = vit.encode(self.encoder, images, ids_keep)
            fused = torch.stack([outputs[i - 1] for i in self.blocks]).sum(0)
        return self.encoder.norm(fused)

    def _mimic_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute Eq. 2 for predictions and targets (B,N,E)."""
        with losses.autocast_off(pred):
            mse = F.mse_loss(losses.upcast(pred), losses.upcast(target))
        return self._reduce(mse, target.shape[-1])

    def _reduce(self, mean: Tensor, channels: int) -> Tensor:
        """Return a mean over channels, or their sum."""
        return mean * channels if self.config.reduction == "sum" else mean


def _mimic_target(batch: dict[str, Tensor]) -> Tensor:
    """Return (B,1+P,E): what was derived, or for target=h the level as it is stored."""
    return batch["targets"] if "targets" in batch else batch["features"][:, 0]


def _build_encoder(
    config: Config,
) -> tuple[VisionTransformer | conv_vit.ConvViT, conv_vit.StageFusion | None]:
    """Build the encoder, and what brings a conv_vit's stages to its tokens."""
    sizes: Any = {"img_size": config.img_size, "patch_size": config.patch_size}
    if config.family == "mae":
        return vit.build(config.encoder, drop_path=config.drop_path, **sizes), None
    channels = conv_vit.parse_encoder(config.encoder)
    encoder = conv_vit.build(
        config.encoder, drop_path=config.drop_path, cls_token=config.conv_cls, **sizes
    )
    if config.fuse == "last":
        return encoder, None
    return encoder, conv_vit.StageFusion(
        channels["stage1"], channels["stage2"], channels["embed_dim"]
    )


def _depth(encoder: VisionTransformer | conv_vit.ConvViT) -> int:
    """Return the number of transformer blocks."""
    blocks = encoder.blocks3 if isinstance(encoder, conv_vit.ConvViT) else encoder.blocks
    return len(list(blocks.children()))


def _fused_blocks(config: Config, depth: int) -> tuple[int, ...]:
    """Return the blocks whose outputs are summed, the last always among them: `auto` is every
    quarter of a plain ViT."""
    chosen = parse_fuse(config.fuse)
    if not chosen:
        quarters = {-(-depth * i // 4) for i in range(1, 5)}  # rounded up
        return (
            tuple(sorted(quarters)) if (config.fuse, config.family) == ("auto", "mae") else (depth,)
        )
    if chosen[-1] != depth:
        raise UsageError(
            f"cannot fuse blocks {config.fuse}: the encoder has {depth}; allowed: numbers up to "
            f"{depth}, itself among them, as blocks after the last of the list would learn "
            "nothing; change it with fuse=VALUE"
        )
    return chosen


def _build_decoder(width: int, config: Config, prefix: int) -> vit.Decoder:
    grid, out_dim = config.img_size // config.patch_size, config.patch_size**2 * 3
    shape = (width, config.decoder_width, config.decoder_depth, config.decoder_heads, grid, out_dim)
    return vit.Decoder(*shape, cls_token=bool(prefix))
