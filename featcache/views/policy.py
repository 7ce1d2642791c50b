"""A policy sets how views are drawn: size, scale, ratio, filter, flip, jitter, seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache import errors
from featcache.runtime import strict_json
from featcache.views.render import FILTERS

# OpenCV's INTER_AREA, which pictures that FFCV decodes are resized by, and no others
AREA = "area"


@dataclass(frozen=True)
class Policy:
    """Sets how views are drawn. `scale` is the area fraction, `ratio` is width / height, `jitter`
    the largest change."""

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    filter: str = "bicubic"
    flip: float = 0.5
    jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.scale
        checks = [
            (1 <= self.size <= 4096, f"size {self.size}: 1 to 4096 pixels are allowed"),
            (0 < low <= high <= 1, f"scale {low:g},{high:g}: 0 < low <= high <= 1 is allowed"),
            (
                1e-3 <= self.ratio[0] <= self.ratio[1] <= 1e3,
                f"ratio {self.ratio}: 0.001 <= low <= high <= 1000 is allowed",
            ),
            (
                self.filter in {*FILTERS, AREA},
                f"filter {self.filter!r}: {errors.near(self.filter, [*FILTERS, AREA])}",
            ),
            (0 <= self.flip <= 1, f"flip {self.flip:g}: a probability from 0 to 1 is allowed"),
            (0 <= self.jitter < 1, f"jitter {self.jitter:g}: 0 to below 1 is allowed"),
            (0 <= self.seed < 2**63, f"seed {self.seed}: 0 to 2**63 - 1 is allowed"),
        ]
        for good, message in checks:
            if not good:
                raise errors.UsageError(f"view policy: {message}")

    def as_dict(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


# The augmentations of the released code, METHODS 1.6, 3.6, 4.6, 7.6.
POLICIES = {
    "default": Policy(),
    "cae": Policy(scale=(0.08, 1.0)),
    "caev2": Policy(scale=(0.4, 1.0), jitter=0.4),
    "fd": Policy(scale=(0.08, 1.0), filter="bilinear"),
}


def load_policy(name: str = "default", **changes: Any) -> Policy:
    """Load a named policy, or one read from a JSON file, with some fields changed."""
    if name in POLICIES:
        base = POLICIES[name].as_dict()
    elif name.endswith(".json"):
        base = _read_policy(name)
    else:
        raise errors.UsageError(
            f"unknown policy {name!r}: {errors.near(name, POLICIES)}, or a .json file with its "
            "fields"
        )
    return policy_from_dict({**base, **changes})


def _read_policy(path: str) -> dict[str, Any]:
    try:
        fields = strict_json.as_object(strict_json.read_file(Path(path)))
        return {**Policy().as_dict(), **fields}
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"policy file {path!r}: {error}; a JSON object of policy fields is needed"
        ) from error


def _is_number(value: object) -> bool:
    """Return whether the value is a number that a float can be made of."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 64)


def policy_from_dict(fields: dict[str, Any]) -> Policy:
    """Make the policy that is stored in a manifest or a file; unknown fields and wrong types are
    refused."""
    known = Policy().as_dict()
    for key, value in fields.items():
        if key not in known:
            raise errors.UsageError(
                f"view policy: unknown field {key!r}; {errors.near(key, known)}"
            )
        pair, text = isinstance(known[key], list), isinstance(known[key], str)
        parts = (
            list(value) if pair and isinstance(value, list | tuple) and len(value) == 2 else [value]
        )
        right = all(isinstance(part, str) if text else _is_number(part) for part in parts)
        if (
            not right
            or (pair and len(parts) != 2)
            or (key in ("size", "seed") and type(value) is not int)
        ):
            raise errors.UsageError(
                f"view policy: {key} is {repr(value)[:80]}, something like {known[key]!r} is needed"
            )
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return Policy(**values)
