"""A recipe's configuration holds the fields that all recipes share.

A recipe's `Config` is a frozen dataclass of flat, plain values: it prints as JSON, lies in the run
folder, and checks itself wherever it is made. `student.settings` changes it and describes it; what
a person who writes a recipe needs of that is here as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo
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
    "one_of",
    "parse_settings",
    "read_settings",
    "replace",
    "size",
]

# Strict: 200 is an int and true is not; extra: an unknown key stops the run. The text below a field
# says what it means, and `student recipes NAME` prints it.
CHECKED = ConfigDict(
    extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
)


def check_choice(key: str, given: str, allowed: Sequence[str]) -> None:
    """Raise UsageError unless a setting is one of a few names."""
    if given not in allowed:
        raise UsageError(
            f"unknown {key} {given!r}: {near(given, allowed)}; choose one with {key}=NAME"
        )


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """Checks that a setting is one of `names`, which descriptions list."""

    names: tuple[str, ...]

    def __call__(self, given: str, info: ValidationInfo) -> str:
        check_choice(str(info.field_name), given, self.names)
        return given


@dataclasses.dataclass(frozen=True)
class _KnownMask:
    names: tuple[str, ...] = tuple(masking.MASKS)

    def __call__(self, given: str) -> str:
        masking.known(given)
        return given


def one_of(*names: str) -> AfterValidator:
    """Allow a few names: Annotated[str, one_of("cosine", "mse")] is the type of such a setting."""
    return AfterValidator(_OneOf(names))


# What a publication's large student learns from, where that is CLIP-L/14: for a recipe's SIZES.
CLIP_L14 = {"teacher": "clip-l14", "teacher_depth": 24, "teacher_width": 1024, "teacher_out": 768}

Positive = Annotated[int, Field(gt=0, le=1 << 24)]
Depth = Annotated[int, Field(gt=0, le=256)]  # blocks
DepthOrZero = Annotated[int, Field(le=256)]  # blocks; a recipe says what 0 means
Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Mask = Annotated[str, AfterValidator(_KnownMask())]


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
    encoder: str = "base"
    """The student: tiny, small, base or large (huge too with family=conv_vit), for plain ViTs also
    any of timm's by name, each with changes: tiny,depth=6,embed_dim=128."""
    img_size: Positive = 224
    """Pixels a side of the student's view; it overrules the encoder's name."""
    patch_size: Positive = 16
    """Pixels a side of a patch, which divides img_size; it overrules the encoder's name."""
    drop_path: Fraction = 0.0
    """Probability that a branch of the last block is left out of a sample (stochastic depth); it
    rises linearly from 0 at the first block."""

    # teacher: facts of the cache, filled in by the trainer when it has opened one
    teacher: str = "clip-b16"
    """The network whose targets are learned, a name of `featcache teachers`; with --cache the one
    that was extracted with."""
    teacher_depth: Depth = 12
    """Blocks of the teacher; a fact of the cache, filled in from there."""
    teacher_width: Positive = 768
    """Channels of a teacher block's output; a fact of the cache, filled in from there."""

    # mask
    mask: Mask = "uniform"
    """How the visible patches are chosen: attentive draws by the teacher's attention, topk takes
    what it attends to most, blockwise hides rectangles, stored keeps the order drawn at
    extraction."""
    mask_ratio: Fraction = 0.75
    """Share of the patches that is hidden; mask_count says how it is rounded."""
    mask_count: Annotated[str, one_of(*masking.COUNTS)] = "visible"
    """What is rounded down: visible leaves int(patches * (1 - mask_ratio)) to be seen, hidden hides
    int(patches * mask_ratio)."""

    # optimiser
    blr: Above0 = 1.5e-4
    """Base learning rate: the peak is blr * global batch / 256."""
    lr: Above0 | None = None
    """Peak learning rate at any batch size, which wins over blr; null: by blr."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay of the first and of the second moment."""
    weight_decay: NotNegative = 0.05
    """AdamW's weight decay; biases, norms and other 1-D parameters have none."""
    decay_tokens: bool = False
    """Whether weight decay reaches cls_token and mask_token too, as in the released code of the MAE
    family."""
    clip_grad: Above0 | None = None
    """Largest norm of the gradient, which is scaled down to it; null: no clipping."""
    epochs: Positive = 200
    """Passes over the training pictures."""
    warmup_epochs: NotNegative = 20
    """Epochs in which the learning rate rises linearly from 0 to its peak; with more of them than
    epochs it only rises."""
    repeat_peak: bool = False
    """Whether the warm-up's last step has the peak, which the cosine's first repeats, as in BEiT's
    and CAE's released code."""

    def __post_init__(self) -> None:
        """Raise UsageError where fields do not go together."""
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
    """What is learned of the teacher: z is its output after the projection, as CLIP has one, f the
    output of its last norm, for teachers without."""
    teacher_out: Positive = 512
    """Channels of z, the teacher's width where it has no projection; a fact of the cache, filled in
    from there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("target", self.target, self.TARGETS)

    @property
    def target_width(self) -> int:
        """Return E, the channels of the target."""
        return self.teacher_out if self.target == "z" else self.teacher_width


def check_hides_patches(config: RecipeConfig) -> None:
    """Raise UsageError where no patch is hidden, for recipes with a loss on hidden patches."""
    if config.visible >= config.patches:
        raise UsageError(
            f"nothing to predict: mask_ratio={config.mask_ratio} leaves all {config.patches} "
            "patches visible; allowed: at least 1 hidden; give a larger mask_ratio"
        )
