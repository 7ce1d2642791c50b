"""Fine-tuning trains an encoder and its head on labelled pictures: the configuration and the model
that the trainer runs, as a recipe gives them.

The whole network learns from soft labels by cross-entropy; layers nearer to the pixels learn more
slowly. Everything that makes the numbers lies in the configuration, so that a run folder says
without another file what was trained.

B pictures, C classes, S pixels a side.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from featcache.errors import UsageError
from student.config import CHECKED, Above0, Fraction, NotNegative, Positive, as_dict
from student.models import classifier, layer_decay, losses
from student.targets.augmentation import Augmentation

NAME = "finetune"  # in the place of a recipe's name, in config.json
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config:
    """Hold the settings of MAE's fine-tuning (facebookresearch/mae main_finetune.py) for ViT-B.

    The first block says which network is trained; it is filled in from what is fine-tuned.
    """

    mask: ClassVar[None] = None  # every patch is seen
    mask_ratio: ClassVar[float] = 0.0
    decay_tokens: ClassVar[bool] = False
    SIZES: ClassVar[dict[str, dict[str, Any]]] = {}
    LISTED: ClassVar[str] = "student eval finetune RUN --show"

    # network: facts of the run or teacher that is fine-tuned
    encoder: str = "base"
    family: str = "mae"  # mae, cae, beit or conv_vit; timm: a teacher's network
    patch_size: Positive = 16
    conv_cls: bool = False
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[Above0, Above0, Above0] = (0.229, 0.224, 0.225)
    classes: Annotated[int, Field(ge=2, le=10**6)] = 1000

    # network: how it is fine-tuned
    img_size: Positive = 224  # positions are resized to it
    pool: Literal["mean", "cls"] = "mean"  # of the patches, or the [CLS] token
    fc_norm: Literal["fresh", "norm"] = "fresh"  # start of the norm after pooling; norm: the last
    head_std: Above0 = 2e-5  # of the head's first weights
    head_scale: Above0 = 1.0  # that these are multiplied by
    rel_pos: bool = False  # a table of relative positions in each block
    train_positions: bool = True  # absolute positions are trained as well
    drop_path: Fraction = 0.1

    # optimiser
    blr: Above0 = 5e-4  # base learning rate: lr = blr * global batch / 256
    lr: Above0 | None = None  # peak learning rate as it is; wins over blr
    min_lr: NotNegative = 1e-6  # of the head, at the end of the cosine
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NotNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    clip_grad: Above0 | None = None
    epochs: Positive = 100
    warmup_epochs: NotNegative = 5
    repeat_peak: bool = False  # make the step at the peak twice, as CAE has it

    # pictures and labels
    crop_scale: tuple[Share, Share] = (0.08, 1.0)  # share of the area
    flip: Share = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's text; empty: none
    erasing: Share = 0.25
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    mix_prob: Share = 1.0
    switch_prob: Share = 0.5
    smoothing: Fraction = 0.1

    def __post_init__(self) -> None:
        """Raise UsageError where fields do not go together."""
        if self.img_size % self.patch_size:
            raise UsageError(
                f"cannot cut the picture into patches: img_size={self.img_size}, "
                f"patch_size={self.patch_size}; allowed: a multiple of {self.patch_size}; change "
                "it with --set img_size=N"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise UsageError(
                f"crop_scale={list(self.crop_scale)}: two shares of the area are allowed, the "
                "smaller one first and above 0; give --set crop_scale=[0.08,1]"
            )
        _ = self.augmentation  # checks itself

    @property
    def patches(self) -> int:
        """Return P, the number of patches of a picture."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """Return the number of patches that are seen: all."""
        return self.patches

    @property
    def augmentation(self) -> Augmentation:
        """Return what is done to pictures and labels beside crop and flip."""
        return Augmentation(
            rand_augment=self.rand_augment,
            erasing=self.erasing,
            mixup=self.mixup,
            cutmix=self.cutmix,
            mix_prob=self.mix_prob,
            switch_prob=self.switch_prob,
            smoothing=self.smoothing,
        )


class Model(nn.Module):
    """Classify pictures; `encoder` is the whole network with its head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = classifier.build(as_dict(config), config.family)
        if getattr(self.encoder, "pos_embed", None) is not None:
            self.encoder.pos_embed.requires_grad_(config.train_positions)
        classifier.init_head(self.encoder, config.head_std, config.head_scale)

    def load_encoder(self, encoder: nn.Module) -> None:
        """Begin with the weights of a trained encoder."""
        classifier.load_encoder(
            self.encoder, encoder, fc_norm_from_norm=self.config.fc_norm == "norm"
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of images (B,3,S,S) and their soft labels `targets` (B,C); without these
        the logits (B,C)."""
        logits: Tensor = self.encoder(batch["images"])
        if "targets" not in batch:
            return {"logits": logits}
        return {"loss": soft_cross_entropy(logits, batch["targets"])}

    def param_groups(self) -> list[dict[str, Any]]:
        """Return groups of the parameters by layer and decay."""
        return layer_decay.param_groups(
            self.encoder, self.config.weight_decay, self.config.layer_decay
        )


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over pictures of -sum_c t_c log softmax(x)_c, for logits and targets (B,C),
    in float32."""
    with losses.autocast_off(logits):
        return -(targets * F.log_softmax(losses.upcast(logits), -1)).sum(-1).mean()
