"""Settings: how texts become values, what is refused and in which words."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pydantic import ValidationError

from featcache.errors import UsageError
from student import config
from student.config import RecipeConfig, from_overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("encoder=tiny", "tiny"),
        ("encoder=vit_tiny_patch16_224,depth=2,embed_dim=64", "vit_tiny_patch16_224,depth=2,embed_dim=64"),
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
            "cannot set mask_ratio: given 1; allowed: float .*less than 1.*change it with mask_ratio=VALUE",
        ),
        ("mask_ratio=-0.1", "mask_ratio: given -0.1; allowed: float .*greater than or equal to 0"),
        ("mask_ratio=NaN", "mask_ratio: given NaN; .*finite"),
        ("drop_path=1.5", "drop_path: given 1.5; allowed: float"),
        ("epochs=true", "epochs: given true; allowed: int"),
        ("epochs=2.5", "epochs: given 2.5; allowed: int"),
        ("epochs=0", "epochs: given 0; allowed: int .*greater than 0"),
        ("epochs=many", 'epochs: given "many"; allowed: int'),
        ("decay_tokens=1", "decay_tokens: given 1; allowed: bool"),
        ("lr=none", 'lr: given "none"; allowed: float or null'),
        ("betas=0.9", r"betas: given 0.9; allowed: tuple\[float, float\]"),
        ("betas=[0.9, 1]", "betas: .*less than 1"),
        ("clip_grad=0", "clip_grad: given 0; allowed: float or null"),
        ("mask=atentive", "unknown mask 'atentive': did you mean attentive"),
        ("encodr=tiny", "unknown setting 'encodr': did you mean encoder"),
        ("epochs", "cannot read setting 'epochs'.*key=value"),
        ("patch_size=15", "img_size=224, patch_size=15; allowed: a patch_size that divides img_size"),
        ("mask_ratio=0.999", "mask_ratio=0.999 leaves 0 of 196 patches"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_overrides(RecipeConfig, [override])
    assert "\n" not in str(caught.value)


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
    assert from_overrides(RecipeConfig, [f"{key}={json.dumps(value)}" for key, value in plain.items()]) == given


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
