"""Keywords are read by the parameters of the commands: same values, same refusals, and back to the
words of a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.console import keywords
from featcache.console.params import BATCH, FiniteRange, FloatPair, LocalPath, LocalText
from featcache.errors import UsageError

PARAMETERS: list[click.Parameter] = [
    click.Option(["--batch-size"], type=BATCH, default=32),
    click.Option(["--steps"], type=click.IntRange(0)),
    click.Option(["--share"], type=FiniteRange(0, 1), default=0.5),
    click.Option(["--scale"], type=FloatPair()),
    click.Option(["--out"], type=LocalPath()),
    click.Option(["--images", "images_spec"], type=LocalText()),
    click.Option(["--levels"], multiple=True),
    click.Option(["--set", "settings"], multiple=True),
    click.Option(["--for", "recipes"]),
    click.Option(["--store"], type=click.Choice(["zarr", "webdataset"]), default="zarr"),
    click.Option(["--tracker", "trackers"], multiple=True, default=("json",)),
    click.Option(["--add"], is_flag=True),
    click.Option(["--keep/--no-keep"], default=True),
    click.Option(["--json", "as_json"], is_flag=True),
    click.Option(["--show-all"], is_flag=True, expose_value=False),
]
COMMAND = click.Command("some", params=PARAMETERS, callback=lambda **given: given)
DEFAULTS = {name: keywords.default(param) for name, param in keywords.keywords(PARAMETERS).items()}


def read(**given: Any) -> dict[str, Any]:
    return keywords.read(PARAMETERS, {**DEFAULTS, **given})


def typed(*words: str) -> dict[str, Any]:
    """What the command line makes of words, without what is its own."""
    found = COMMAND.main(list(words), standalone_mode=False)
    return {name: value for name, value in found.items() if name != "as_json"}


def test_defaults_are_those_of_the_command_line() -> None:
    assert read() == typed()
    assert set(DEFAULTS) == {
        "batch_size", "steps", "share", "scale", "out", "images", "levels", "settings", "for_",
        "store", "tracker", "add", "keep",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 64}, ["--batch-size", "64"]),
        ({"batch_size": np.int64(64)}, ["--batch-size", "64"]),
        ({"batch_size": "64"}, ["--batch-size", "64"]),
        ({"share": 1}, ["--share", "1"]),
        ({"share": np.float32(0.25)}, ["--share", "0.25"]),
        ({"scale": (0.2, 1)}, ["--scale", "0.2,1"]),
        ({"scale": "3/4,4/3"}, ["--scale", "3/4,4/3"]),
        ({"out": Path("a b")}, ["--out", "a b"]),
        ({"out": "a"}, ["--out", "a"]),
        ({"images": Path("train")}, ["--images", "train"]),
        ({"levels": "last:5"}, ["--levels", "last:5"]),
        ({"levels": [8, 10, 12]}, ["--levels", "8,10,12"]),
        ({"levels": (-1,)}, ["--levels=-1"]),
        ({"levels": ["last:5", "dino=-1"]}, ["--levels", "last:5", "--levels", "dino=-1"]),
        ({"levels": None}, []),
        ({"settings": ["a=1", "b=x y"]}, ["--set", "a=1", "--set", "b=x y"]),
        ({"for_": "mae"}, ["--for", "mae"]),
        ({"store": "webdataset"}, ["--store", "webdataset"]),
        ({"tracker": "wandb"}, ["--tracker", "wandb"]),
        ({"add": True}, ["--add"]),
        ({"keep": False}, ["--no-keep"]),
    ],
    ids=str,
)
def test_a_value_is_what_its_text_would_be(given: dict[str, Any], words: list[str]) -> None:
    assert read(**given) == typed(*words)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not in the range 1<=x<=65536."),
        ({"batch_size": 2.5}, "batch_size: '2.5' is not a valid integer range."),
        ({"batch_size": True}, "batch_size: True is no number."),
        ({"batch_size": None}, "batch_size: None is no number."),
        ({"batch_size": "x"}, "batch_size: 'x' is not a valid integer range."),
        ({"share": float("nan")}, "share: nan is no finite number"),
        ({"share": float("inf")}, "share: inf is not in the range 0<=x<=1."),
        (
            {"scale": 1},
            "scale: '1' given; two numbers parted by a comma are needed, such as 0.2,1 or 3/4,4/3",
        ),
        ({"scale": ("a", 1)}, "scale: ('a', 1) is no text."),
        ({"out": 5}, "out: 5 is no path."),
        ({"out": b"x"}, "out: b'x' is no path."),
        ({"images": {"a": 1}}, "images: {'a': 1} is no text."),
        ({"images": ["\x1b[31m", "b"]}, "images: ['\\x1b[31m', 'b'] is no text."),
        ({"levels": [None]}, "levels: None is no text."),
        ({"store": "tar"}, "store: 'tar' is not one of 'zarr', 'webdataset'."),
        ({"store": "a\nb\x1b[31m"}, r"store: 'a\nb\x1b[31m' is not one of 'zarr', 'webdataset'."),
        ({"add": 1}, "add: 1 is neither True nor False."),
        ({"add": "yes"}, "add: 'yes' is neither True nor False."),
    ],
    ids=str,
)
def test_a_refusal_names_the_keyword(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(**given)
    assert str(caught.value) == f"Invalid value for {told}"


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.integers(1, 65536),
        "steps": st.integers(0, 10**18),
        "share": st.floats(0, 1),
        "scale": st.tuples(st.floats(-10, 10), st.floats(-10, 10)),
        "out": st.text("ab -='\\é", min_size=1).map(Path),
        "images": st.text("ab -=:'", min_size=1),
        "levels": st.lists(st.text("ab-=,1", min_size=1)),
        "store": st.sampled_from(["zarr", "webdataset"]),
        "add": st.booleans(),
        "keep": st.booleans(),
    },
)


@given(VALUES)
def test_words_say_the_same_values(values: dict[str, Any]) -> None:
    found = read(**values)
    assert typed(*keywords.words(PARAMETERS, found)) == found
