"""Every setting of every recipe has a meaning, a type and what is allowed, and they are true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UsageError
from student import config, masking, recipes, setting_help
from student.setting_help import SettingHelp
from tests import student_fixtures as fx

ALL = [
    (name, key) for name in recipes.names() for key in config.as_dict(recipes.load(name).Config())
]
MINE = '''
from __future__ import annotations
from typing import Annotated, Literal
from pydantic import Field
from pydantic.dataclasses import dataclass
from student.config import CHECKED, Positive, RecipeConfig, one_of

@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    """My own."""
    rings: Positive = 3
    """Rings around
    the middle."""
    power: Annotated[float, Field(ge=-1, lt=2.5)] | None = None
    shape: Annotated[str, one_of("round", "square")] = "round"
    kind: Literal["a", "b"] = "a"
    epochs: Positive = 5

class Model: ...
def needs(config): ...
'''


def described(kind: Any, *settings: str) -> dict[str, SettingHelp]:
    given = setting_help.describe(config.from_overrides(kind, settings))
    return {each.key: each for each in given}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("name", "key"), ALL)
def test_every_setting_has_a_meaning(name: str, key: str) -> None:
    found = described(recipes.load(name).Config)[key]
    assert len(found.help) > 10
    assert found.help.endswith(".")
    assert found.type in (
        "whole number", "number", "number or null", "text", "true or false",
        "list of 2, each a number",
    )  # fmt: skip


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("name", "key"), ALL)
def test_all_choices_are_allowed_and_no_other(name: str, key: str) -> None:
    kind = recipes.load(name).Config
    found = described(kind)[key]
    if not found.allowed.startswith("one of "):
        return
    choices = found.allowed.removeprefix("one of ").split(", ")
    assert found.value in choices
    for choice in choices:  # some do not go with the other settings' defaults: told of those
        try:
            config.from_overrides(kind, [f"{key}={choice}"])
        except UsageError as error:
            assert not str(error).startswith(f"unknown {key} ")  # noqa: PT017
    with pytest.raises(UsageError, match=f"unknown {key} 'other'"):
        config.from_overrides(kind, [f"{key}=other"])
    for choice in choices:
        assert choice in found.help or key in ("mask", "family"), choice


OUTSIDE = {"above": 0, "below": 0, "from": -1, "at most": 1}  # beside a range's end


@pytest.mark.parametrize("name", recipes.names())
def test_ranges_are_those_that_are_checked(name: str) -> None:
    kind, tried = recipes.load(name).Config, 0
    for key, found in described(kind).items():
        if not found.allowed or found.allowed.startswith("one of "):
            continue
        for part in found.allowed.split(", "):
            end = re.fullmatch(r"(above|below|from|at most) (-?[0-9]+)", part)
            assert end, (key, part)
            outside = int(end[2]) + OUTSIDE[end[1]]
            value = f"[{outside},{outside}]" if key == "betas" else outside
            with pytest.raises(UsageError, match=f"cannot set {key}"):
                config.from_overrides(kind, [f"{key}={value}"])
            tried += 1
    assert tried > 10


def test_one_setting_by_hand() -> None:
    found = described(recipes.load("mae").Config, "mask_ratio=0.5")
    assert found["mask_ratio"] == SettingHelp(
        "mask_ratio", 0.5, 0.75, "number", "from 0, below 1",
        "Share of the patches that is hidden; mask_count says how it is rounded.",
    )  # fmt: skip
    assert found["lr"].type == "number or null"
    assert found["lr"].allowed == "above 0"
    assert found["mask"].allowed == f"one of {', '.join(masking.MASKS)}"
    assert setting_help.as_lines(found["mask_ratio"], 60) == (
        "mask_ratio = 0.5\n"
        "    number; from 0, below 1; by default 0.75. Share of the\n"
        "    patches that is hidden; mask_count says how it is\n"
        "    rounded."
    )


def test_a_recipes_own_text_wins_over_the_one_it_has_from_elsewhere() -> None:
    assert "nothing is hidden" in described(recipes.load("fd").Config)["mask_ratio"].help
    assert described(recipes.load("milan").Config)["target"].allowed == "one of z, f, pixels"
    assert described(recipes.load("kd").Config)["target"].allowed == "one of z, f"


def test_a_recipe_of_ones_own_is_described_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    found = described(recipes.load(str(path)).Config)
    assert found["rings"].help == "Rings around the middle."
    assert (found["power"].type, found["power"].allowed, found["power"].help) == (
        "number or null", "from -1, below 2.5", "",
    )  # fmt: skip
    assert found["shape"].allowed == "one of round, square"
    assert found["kind"].allowed == "one of a, b"
    assert found["epochs"].help == "Passes over the training pictures."
    with pytest.raises(UsageError, match="did you mean square"):
        described(recipes.load(str(path)).Config, "shape=sqare")
    ran = fx.good(fx.stud("recipes", path))
    assert (
        "rings = 3\n    whole number; above 0, at most 16777216. Rings around the middle.\n"
        in ran.out
    )


def test_schema_and_values_as_json(tmp_path: Path) -> None:
    schema = fx.good(fx.stud("recipes", "mralign", "--set", "epochs=7", "--schema")).json
    assert schema["epochs"] == {
        "value": 7, "default": 200, "type": "whole number", "allowed": "above 0, at most 16777216",
        "help": "Passes over the training pictures.",
    }  # fmt: skip
    values = fx.good(fx.stud("recipes", "mralign", "--set", "epochs=7", "--json")).json
    assert values == {key: each["value"] for key, each in schema.items()}
    (tmp_path / "a.json").write_text(json.dumps(values))
    words = ("train", "--recipe", "mralign", "--config", tmp_path / "a.json", "--print-config")
    assert "\nepochs: 7\n" in fx.good(fx.stud(*words)).out


@pytest.mark.parametrize("option", [("--schema",), ("--set", "epochs=7")])
def test_options_about_one_recipe_need_its_name(option: tuple[str, ...]) -> None:
    ran = fx.stud("recipes", *option)
    assert ran.status == 2
    assert option[0] in ran.line
