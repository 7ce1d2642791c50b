"""A recipe's configuration holds the fields that all recipes share.

A recipe's `Config` is a frozen dataclass of flat, plain values: it prints as JSON, lies in the run
folder, and checks itself wherever it is made. `student.settings` changes it and describes it; what
a person who writes a recipe needs of that is here as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from featcache.errors import UsageError, near
from student import masking
from student.settings import (
    Config,
    Origin,
    Settings,
    as_dict,
    build_config,
    default_values,
    from_overrides,
    parse_settings,
    read_settings,
    replace,
    size,
)

__all__ = [
    "CHECKED",
    "CLIP_L14",
    "Above0",
    "Config",
    "Depth",
    "DepthOrZero",
    "Fraction",
    "Mask",
    "NotNegative",
    "Origin",
    "OutputConfig",
    "Positive",
    "RecipeConfig",
    "Settings",
    "TrainConfig",
    "as_dict",
    "build_config",
    "check_choice",
    "check_hides_patches",
    "default_values",
    "from_overrides",
    "parse_settings",
    "read_settings",
    "replace",
    "size",
]

# Strict: 200 is an int and true is not; extra: an unknown key stops the run.
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _known_mask(name: str) -> str:
    masking.known(name)
    return name


# What a publication's large student learns from, where that is CLIP-L/14: for a recipe's SIZES.
CLIP_L14 = {"teacher": "clip-l14", "teacher_depth": 24, "teacher_width": 1024, "teacher_out": 768}

Positive = Annotated[int, Field(gt=0, le=1 << 24)]
Depth = Annotated[int, Field(gt=0, le=256)]  # blocks
DepthOrZero = Annotated[int, Field(le=256)]  # blocks; a recipe says what 0 means
Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Mask = Annotated[str, AfterValidator(_known_mask)]


class TrainConfig(Protocol):
    """The trainer reads this of a configuration: a recipe's, or fine-tuning's own."""

    @property
    def mask(self) -> str | None: ...  # None: every patch is seen, and nothing is drawn
    @property
    def mask_ratio(self) -> float: ...
    @property
    def img_size(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def visible(self) -> int: ...
    @property
    def blr(self) -> float: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def decay_tokens(self) -> bool: ...
    @property
    def clip_grad(self) -> float | None: ...
    @property
    def epochs(self) -> int: ...
    @property
    def warmup_epochs(self) -> float: ...
    @property
    def repeat_peak(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class RecipeConfig:
    """The configuration of any recipe has these fields; a recipe overrides defaults and adds its
    own.

    `blr` is the learning rate of a global batch of 256 and scales linearly; each recipe's docstring
    names the global batch of its publication. Epochs are passes over the training pictures.

    >>> from_overrides(RecipeConfig, ["encoder=tiny", "epochs=5"]).epochs
    5
    """

    # Defaults of a publication that go with a model size: {"large": {"drop_path": 0.2}}.
    # `build_config` knows the size and fills them in where nothing else is set.
    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    # student
    encoder: str = "base"  # tiny, small, base, large, or a timm ViT: NAME or NAME,key=value,...
    img_size: Positive = 224  # pixels a side, of the student's view
    patch_size: Positive = 16  # pixels a side; both sizes overrule those in the encoder's name
    drop_path: Fraction = 0.0  # share at the last block, linear from 0 at the first

    # teacher: facts of the cache, filled in by the trainer when it has opened one
    teacher: str = "clip-b16"
    teacher_depth: Depth = 12  # blocks
    teacher_width: Positive = 768  # channels of a block's output

    # mask
    mask: Mask = "uniform"  # a name in student.masking.MASKS
    # hidden part of the patches; int(patches * (1 - mask_ratio)) stay visible
    mask_ratio: Fraction = 0.75
    mask_count: str = "visible"  # or hidden: int(patches * mask_ratio) are hidden

    # optimiser
    blr: Above0 = 1.5e-4  # base learning rate: lr = blr * global batch / 256
    lr: Above0 | None = None  # peak learning rate as it is; wins over blr
    min_lr: NotNegative = 0.0  # learning rate at the end of the cosine
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # AdamW
    weight_decay: NotNegative = 0.05
    # decay cls_token and mask_token too, as the released MAE-family code does
    decay_tokens: bool = False
    clip_grad: Above0 | None = None  # largest gradient norm; null: no clipping
    epochs: Positive = 200
    warmup_epochs: NotNegative = 20  # may exceed epochs: then the learning rate only rises
    # the warm-up's last step has the peak, which the cosine's first repeats, as in BEiT's and CAE's
    # released code
    repeat_peak: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError where fields do not go together."""
        check_choice("mask_count", self.mask_count, masking.COUNTS)
        if self.img_size % self.patch_size:
            raise UsageError(
                f"cannot cut the picture into patches: img_size={self.img_size}, "
                f"patch_size={self.patch_size}; allowed: a patch_size that divides img_size; "
                "change one of them"
            )
        if self.visible < 1:
            raise UsageError(
                f"cannot hide that much: mask_ratio={self.mask_ratio} leaves 0 of {self.patches} "
                "patches; allowed: at least 1 visible; give a smaller mask_ratio"
            )

    @property
    def patches(self) -> int:
        """Return P, the number of patches of one view."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def visible(self) -> int:
        """Return V, the number of patches the student sees."""
        return masking.kept_count(self.patches, self.mask_ratio, self.mask_count)


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class OutputConfig(RecipeConfig):
    """A recipe with this configuration learns the teacher's own output, derived from its last
    level.

    `target` z is the output after the projection, as CLIP has one; f is the output before it, for
    teachers without.
    """

    TARGETS: ClassVar[tuple[str, ...]] = ("z", "f")

    target: str = "z"
    # channels of z, a fact of the cache; the teacher's width where it has no projection
    teacher_out: Positive = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("target", self.target, self.TARGETS)

    @property
    def target_width(self) -> int:
        """Return E, the channels of the target."""
        return self.teacher_out if self.target == "z" else self.teacher_width


def check_choice(key: str, given: str, allowed: Sequence[str]) -> None:
    """Raise UsageError unless a setting is one of a few names."""
    if given not in allowed:
        raise UsageError(
            f"unknown {key} {given!r}: {near(given, allowed)}; choose one with {key}=NAME"
        )


def check_hides_patches(config: RecipeConfig) -> None:
    """Raise UsageError where no patch is hidden, for recipes with a loss on hidden patches."""
    if config.visible >= config.patches:
        raise UsageError(
            f"nothing to predict: mask_ratio={config.mask_ratio} leaves all {config.patches} "
            "patches visible; allowed: at least 1 hidden; give a larger mask_ratio"
        )
