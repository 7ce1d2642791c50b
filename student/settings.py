"""Settings change a recipe's configuration.

`Settings` are the values that are not left to their defaults: each is read once, from a file or
from `--set key=value`, and keeps its origin. `build_config` turns them into a `Config`. An unknown
key or a value out of range is a `UsageError` that says what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from featcache.errors import UsageError, near
from featcache.runtime.field_words import field_reason
from featcache.runtime.strict_yaml import WrittenFloat

Config = TypeVar("Config")

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

        >>> from student.config import RecipeConfig
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
    """Read the values of a file, such as a run's config.json, by the types of the fields."""
    hints = get_type_hints(kind)

    def text(key: str, value: Any) -> str:
        # of a number in YAML, a text setting takes what was written
        return (
            value.text
            if isinstance(value, WrittenFloat) and hints.get(key) is str
            else (json.dumps(value))
        )

    return _read_settings(kind, {key: text(key, each) for key, each in values.items()}, "file")


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
        raise _refusal(kind, key, given, field_reason(first)) from None


def check_values(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raise UsageError for the first value that its setting's type does not allow, whatever the
    others are."""
    hints = get_type_hints(kind, include_extras=True)
    checked = ConfigDict(strict=True, allow_inf_nan=False)
    for key, value in values.items():
        try:
            TypeAdapter(hints[key], config=checked).validate_json(json.dumps(value))
        except ValidationError as error:
            given = json.dumps(value)[:80]
            raise _refusal(kind, key, given, field_reason(error.errors()[0])) from None


def _refusal(kind: type[Any], key: str, given: str, why: str) -> UsageError:
    return UsageError(
        f"cannot set {key}: given {given}; allowed: {_allowed(kind, key)} ({why}); change it with "
        f"{key}=VALUE"
    )


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
