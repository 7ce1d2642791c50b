"""A view policy's numbers are those of a view that can be drawn."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import UsageError
from featcache.views.policy import AREA, POLICIES, Policy, load_policy
from featcache.views.render import FILTERS


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": (1e-300, 1e300)},
        {"ratio": (1e308, 1e308)},
        {"ratio": (math.nan, 1.0)},
        {"ratio": (1.0, math.inf)},
        {"ratio": (2.0, 1.0)},
        {"scale": (math.nan, 1.0)},
        {"scale": (0.2, math.inf)},
        {"flip": math.nan},
        {"jitter": math.nan},
    ],
    ids=str,
)
def test_numbers_of_no_view_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"view policy: {next(iter(fields))}"):
        Policy(**fields)  # type: ignore[arg-type]


# --- the page of policies -------------------------------------------------------------------------

PAGE = (Path(__file__).parents[3] / "docs/guides/policies.md").read_text()


def test_the_page_of_policies_has_every_key_default_filter_and_name() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE)
    told = {key: value.strip("`") for key, value in rows}
    assert {key: json.loads(f'"{v}"' if key == "filter" else v) for key, v in told.items()} == (
        Policy().as_dict()
    )
    assert all(f"`{name}`" in PAGE for name in (*POLICIES, *FILTERS, AREA))
    for name, policy in POLICIES.items():
        for key, value in policy.as_dict().items():
            if value != Policy().as_dict()[key]:
                shown = f"`{value}`" if isinstance(value, str) else str(value)
                told_of = PAGE.replace("\n", " ").split(f"`{name}`,", 1)[1].split(";")[0]
                assert key in told_of
                assert shown in told_of


def test_every_policy_of_the_page_is_one(tmp_path: Path) -> None:
    blocks = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    for number, text in enumerate(blocks):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        made = load_policy(str(path)).as_dict()
        assert made == {**Policy().as_dict(), **json.loads(text)}
    assert set(json.loads(blocks[-1])) == set(Policy().as_dict())


def test_the_ranges_of_the_page_end_where_it_says() -> None:
    ends: dict[str, list[Any]] = {
        "size": [1, 4096],
        "flip": [0, 1],
        "jitter": [0, 0.999],
        "seed": [0, 2**63 - 1],
        "scale": [(1e-9, 1.0)],
        "ratio": [(0.001, 1000.0)],
    }
    beyond: dict[str, list[Any]] = {
        "size": [0, 4097],
        "flip": [-0.1, 1.1],
        "jitter": [-0.1, 1.0],
        "seed": [-1, 2**63],
        "scale": [(0.0, 1.0), (0.2, 1.1)],
        "ratio": [(0.0009, 1.0), (1.0, 1001.0)],
    }
    for key in ends:
        for value in ends[key]:
            load_policy(**{key: value})
        for value in beyond[key]:
            with pytest.raises(UsageError):
                load_policy(**{key: value})
