"""A recipe's configuration holds the fields that all recipes share, and settings change it.

A recipe's `Config` is a frozen dataclass of flat, plain values: it prints as JSON, lies in the run
folder, and checks itself wherever it is made. `Settings` are the values that are not left to their
defaults: each is read once, from a file or from `--set key=value`, and keeps its origin.
`build_config` turns them into a `Config`. An unknown key or a value out of range is a `UsageError`
that says what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import from_json

from featcache.errors import UsageError, near
from student import masking

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


Config = TypeVar("Config")


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


# a --config file; --set or --epochs; what the cache or the teacher says; a default that a cache of
# few tokens makes
Origin = Literal["file", "option", "fact", "cache"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings hold the values that are not left to a recipe's defaults, and the origin of each."""

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)

    def updated(self, values: Mapping[str, Any], origin: Origin) -> Settings:
        """Return these settings and `values`; of two with one key the later wins."""
        return self.merged(Settings(values, dict.fromkeys(values, origin)))

    def merged(self, later: Settings) -> Settings:
        """Return these settings and the `later` ones, which win."""
        return Settings({**self.values, **later.values}, {**self.origins, **later.origins})

    def is_set_by_user(self, key: str) -> bool:
        """Tell whether a person set this value, in a file or by an option.

        >>> parse_settings(RecipeConfig, ["mask=stored"]).is_set_by_user("mask")
        True
        >>> Settings().updated({"mask": "stored"}, "cache").is_set_by_user("mask")
        False
        """
        return self.origins.get(key) in ("file", "option")


def from_overrides(kind: type[Config], overrides: Iterable[str]) -> Config:
    """Build the configuration that 'key=value' texts describe; of two with one key the later wins.

    A value is read as JSON where it is JSON, else as text; for a text field the text is kept
    (align_levels=12).
    """
    return build_config(kind, parse_settings(kind, overrides))


def parse_settings(kind: type[Any], overrides: Iterable[str]) -> Settings:
    """Read 'key=value' texts, as `--set` takes them, by the types of a recipe's fields."""
    return _read_settings(kind, dict(map(_split, overrides)), "option")


def read_settings(kind: type[Any], values: Mapping[str, Any]) -> Settings:
    """Read the values of a JSON file, such as a run's config.json, by the types of the fields."""
    texts = {key: json.dumps(value) for key, value in values.items()}
    return _read_settings(kind, texts, "file")


def _read_settings(kind: type[Any], texts: Mapping[str, str], origin: Origin) -> Settings:
    _check_keys(kind, texts)
    hints = get_type_hints(kind)
    values = {key: _read(text, hints[key]) for key, text in texts.items()}
    return Settings().updated(values, origin)


def _split(override: str) -> tuple[str, str]:
    """'key=value' -> (key, value), both as text."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(
            f"cannot read setting {override!r}: given no '='; allowed: key=value; such as "
            "epochs=100"
        )
    return key.strip(), text


def build_config(kind: type[Config], settings: Settings) -> Config:
    """Build a recipe's configuration: its defaults, those of the model size, then the settings."""
    given = settings.values
    recipe: Any = kind
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    sized = recipe.SIZES.get(size(given.get("encoder", defaults["encoder"])), {})
    values = {**sized, **given}
    if "blr" in given and "lr" not in given and {**defaults, **values}["lr"] is not None:
        raise UsageError(
            f"cannot set blr={given['blr']}: this recipe's learning rate is lr={defaults['lr']} "
            "at any batch size, which wins over blr; allowed: one of the two; give lr=RATE, or "
            "blr=RATE together with lr=null"
        )
    return _build(kind, values)


def size(encoder: object) -> str:
    """Return the size in an encoder's name, or the name itself.

    >>> size("large"), size("tiny,depth=2"), size("vit_small_patch16_224"), size("mine")
    ('large', 'tiny', 'small', 'mine')
    """
    head = str(encoder).partition(",")[0]
    return next(
        (name for name in ("tiny", "small", "base", "large") if name in head.split("_")), head
    )


def replace(config: Config, **facts: Any) -> Config:
    """Return the configuration with some values changed, checked as a new one."""
    _check_keys(type(config), facts)
    return _build(type(config), {**as_dict(config), **facts})


def as_dict(config: Any) -> dict[str, Any]:
    """Return the plain values, JSON-ready: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def default_values(config: Any) -> dict[str, Any]:
    """Return the defaults of a configuration's settings as plain values, where they have one."""
    fields = dataclasses.fields(config)
    known = {each.name: each.default for each in fields if each.default is not dataclasses.MISSING}
    return json.loads(json.dumps(known))


def _check_keys(kind: type[Any], values: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names and key.startswith(("mixup", "cutmix")):
            raise UsageError(
                f"cannot set {key}: a cached target belongs to one picture's view, and a mixture "
                "of two pictures has none; labels are mixed, by student eval finetune --set; "
                "leave it out"
            )
        if key not in names:
            raise UsageError(
                f"unknown setting {key!r}: {near(key, names)}; see "
                f"{getattr(kind, 'LISTED', 'student recipes NAME')}"
            )


def _read(text: str, hint: Any) -> Any:
    """Read JSON where it is JSON; the text is kept where it is not, or where a text is wanted and
    the JSON is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if hint is str and not isinstance(value, str) else value


def _build(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build through JSON, so that pydantic's strict types still take a list for a tuple."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else _unreadable(values)
        given = json.dumps(values[key])[:80] if key in values else "nothing, and it has no default"
        raise UsageError(
            f"cannot set {key}: given {given}; allowed: "
            f"{_allowed(kind, key)} ({first['msg']}); change it with {key}=VALUE"
        ) from None


def _unreadable(values: Mapping[str, Any]) -> str:
    """Return the key of the value that pydantic does not read as JSON: half of a surrogate pair, a
    deep nest."""
    for key, value in values.items():
        try:
            from_json(json.dumps(value))
        except ValueError:
            return key
    raise AssertionError("all values are JSON")


def _allowed(kind: type[Any], key: str) -> str:
    """Return the type of a field in words: 'float or null'."""
    hint = get_type_hints(kind)[key]
    if get_origin(hint) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(hint))
    if type(None) in get_args(hint):
        return " or ".join(
            "null" if part is type(None) else part.__name__ for part in get_args(hint)
        )
    return str(hint) if get_args(hint) else hint.__name__
