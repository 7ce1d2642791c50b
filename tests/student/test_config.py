"""Settings: how texts become values, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from featcache.errors import UsageError
from student import config
from student.config import RecipeConfig, from_overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("encoder=tiny", "tiny"),
        (
            "encoder=vit_tiny_patch16_224,depth=2,embed_dim=64",
            "vit_tiny_patch16_224,depth=2,embed_dim=64",
        ),
        ('encoder="small"', "small"),
        ("encoder=12", "12"),  # a text field keeps its text
        ("epochs=5", 5),
        ("mask_ratio=0", 0.0),
        ("warmup_epochs=0.5", 0.5),
        ("betas=[0.9, 0.999]", (0.9, 0.999)),
        ("lr=1e-3", 1e-3),
        ("lr=null", None),
        ("decay_tokens=true", True),
        ("mask=stored", "stored"),
    ],
)
def test_values_are_read_and_typed(override: str, value: object) -> None:
    key = override.partition("=")[0]
    got = getattr(from_overrides(RecipeConfig, [override]), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mask_ratio=1",
            "cannot set mask_ratio: given 1; allowed: float .*less than 1.*change it with "
            "mask_ratio=VALUE",
        ),
        ("mask_ratio=-0.1", "mask_ratio: given -0.1; allowed: float .*at least 0"),
        ("mask_ratio=NaN", "mask_ratio: given NaN; .*finite"),
        ("drop_path=1.5", "drop_path: given 1.5; allowed: float"),
        ("epochs=true", "epochs: given true; allowed: int"),
        ("epochs=2.5", "epochs: given 2.5; allowed: int"),
        ("epochs=0", "epochs: given 0; allowed: int .*more than 0"),
        ("epochs=many", 'epochs: given "many"; allowed: int'),
        ("decay_tokens=1", "decay_tokens: given 1; allowed: bool"),
        ("lr=none", 'lr: given "none"; allowed: float or null'),
        ("betas=0.9", r"betas: given 0.9; allowed: tuple\[float, float\]"),
        ("betas=[0.9, 1]", "betas: .*less than 1"),
        ("clip_grad=0", "clip_grad: given 0; allowed: float or null"),
        ("mask=atentive", "unknown mask 'atentive': did you mean attentive"),
        ("encodr=tiny", "unknown setting 'encodr': did you mean encoder"),
        ("epochs", "cannot read setting 'epochs'.*key=value"),
        (
            "patch_size=15",
            "img_size=224, patch_size=15; allowed: a patch_size that divides img_size",
        ),
        ("mixup=0.8", "cannot set mixup: a cached target belongs to one picture's view"),
        ("cutmix_alpha=1", "cannot set cutmix_alpha: .* a mixture of two pictures has none"),
        ("mask_count=all", "unknown mask_count 'all': known: hidden, visible"),
        ("mask_ratio=0.999", "mask_ratio=0.999 leaves 0 of 196 patches"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_overrides(RecipeConfig, [override])
    assert "\n" not in str(caught.value)


def test_settings_keep_their_origin() -> None:
    """Of a file, of options, and a default that a cache makes: the later wins, and says who set
    it."""
    kind = config.OutputConfig
    settings = config.read_settings(kind, {"epochs": 7, "betas": [0.8, 0.9], "teacher": "mine"})
    settings = settings.merged(config.parse_settings(kind, ["epochs=9", "teacher=12"]))
    settings = settings.updated({"mask": "stored"}, "cache")
    assert settings.values == {"epochs": 9, "betas": [0.8, 0.9], "teacher": "12", "mask": "stored"}
    assert settings.origins == {
        "epochs": "option",
        "betas": "file",
        "teacher": "option",
        "mask": "cache",
    }
    given = [key for key in ("betas", "epochs", "mask", "lr") if settings.is_set_by_user(key)]
    assert given == ["betas", "epochs"]
    built = config.build_config(kind, settings)
    assert (built.epochs, built.betas, built.teacher, built.mask) == (9, (0.8, 0.9), "12", "stored")


def test_a_file_may_hold_a_number_for_a_text_field() -> None:
    """As `--set encoder=12` may."""
    assert config.read_settings(RecipeConfig, {"encoder": 12}).values == {"encoder": "12"}


def test_facts_of_a_cache_are_not_set_by_the_user() -> None:
    settings = config.Settings().updated({"teacher_depth": 4}, "fact")
    assert not settings.is_set_by_user("teacher_depth")
    with pytest.raises(UsageError, match="unknown setting 'depth': known: betas"):
        config.read_settings(RecipeConfig, {"depth": 3})


def test_later_wins() -> None:
    assert from_overrides(RecipeConfig, ["epochs=1", "epochs=2"]).epochs == 2


def test_counts() -> None:
    given = from_overrides(RecipeConfig, ["img_size=224", "patch_size=14", "mask_ratio=0.5"])
    assert (given.patches, given.visible) == (256, 128)


def test_as_dict_is_json_and_round_trips() -> None:
    given = from_overrides(RecipeConfig, ["betas=[0.8,0.9]", "lr=0.1", "mask=attentive"])
    plain = config.as_dict(given)
    assert plain == json.loads(json.dumps(plain))
    assert plain["betas"] == [0.8, 0.9]
    assert (
        from_overrides(RecipeConfig, [f"{key}={json.dumps(value)}" for key, value in plain.items()])
        == given
    )


def test_replace_checks_again() -> None:
    given = config.replace(RecipeConfig(), teacher="clip-l14", teacher_depth=24, teacher_width=1024)
    assert (given.teacher_depth, given.teacher_width, given.epochs) == (24, 1024, 200)
    with pytest.raises(UsageError, match="teacher_depth: given 0"):
        config.replace(given, teacher_depth=0)
    with pytest.raises(UsageError, match="unknown setting 'depth'"):
        config.replace(given, depth=3)


def test_frozen_and_closed() -> None:
    given = RecipeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.epochs = 3  # type: ignore[misc]
    extra: dict[str, Any] = {"nonsense": 1}
    with pytest.raises(ValidationError, match="nonsense"):
        RecipeConfig(**extra)


def test_hidden_patches_are_needed_where_they_are_predicted() -> None:
    with pytest.raises(UsageError, match=r"mask_ratio=0\.0 leaves all 196 patches visible"):
        config.check_hides_patches(RecipeConfig(mask_ratio=0.0))


@dataclass(frozen=True, kw_only=True, config=config.CHECKED)
class Sized(RecipeConfig):
    """A recipe with defaults by size, whose learning rate does not scale with the batch."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {"large": {"drop_path": 0.2, "mask_ratio": 0.6}}

    lr: float | None = 1e-3


def test_defaults_go_with_the_size_unless_something_else_is_set() -> None:
    assert from_overrides(Sized, []).drop_path == 0.0
    large = from_overrides(Sized, ["encoder=large,depth=2", "mask_ratio=0.5"])
    assert (large.drop_path, large.mask_ratio) == (0.2, 0.5)
    assert from_overrides(Sized, ["encoder=vit_large_patch16_224"]).drop_path == 0.2
    assert config.replace(large, drop_path=0.0).drop_path == 0.0


def test_a_rate_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"cannot set blr=0.0002: .* lr=0.001 .* blr=RATE together with lr=null"
    ):
        from_overrides(Sized, ["blr=2e-4"])
    assert from_overrides(Sized, ["blr=2e-4", "lr=null"]).blr == 2e-4
    assert from_overrides(RecipeConfig, ["blr=2e-4"]).blr == 2e-4


def test_target_of_output_recipes() -> None:
    given = from_overrides(config.OutputConfig, ["target=f", "teacher_width=24", "teacher_out=20"])
    assert (given.target_width, config.replace(given, target="z").target_width) == (24, 20)
    with pytest.raises(
        UsageError, match="unknown target 'y': known: f, z; choose one with target=NAME"
    ):
        from_overrides(config.OutputConfig, ["target=y"])


@pytest.mark.parametrize("value", ["\ud800", [[[]]] * 3, {"a": {}}, 10**400, 1e300, [1] * 5000])
@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(RecipeConfig)])
def test_a_value_of_any_kind_in_a_file_is_one_line(key: str, value: object) -> None:
    texts = {**{"epochs": "x", "blr": None}, key: value}
    with pytest.raises(UsageError) as caught:
        config.build_config(RecipeConfig, config.read_settings(RecipeConfig, texts))
    assert len(str(caught.value)) < 5000
