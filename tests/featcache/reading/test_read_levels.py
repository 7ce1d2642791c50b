"""Levels and tokens are of the fields that have them, and of no other field of the same read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.errors import UsageError
from featcache.extraction import extend, extract, plan
from featcache.models.tokenizer import TokenizerTeacher
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.storage.store import STORES
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, make_plan

OTHER = "synthetic:levels=2,tokens=9,width=10,size=28"
ROWS = np.arange(5)


class Ones(nn.Module):
    """A tokenizer that gives every patch the id 1."""

    name, weights, pixel_filter = "ones", "none", "lanczos"
    input_px, patches, vocabulary = 16, 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1, dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        return self.one.expand(len(images), 4)  # type: ignore[operator]


def add(wanted: plan.Plan, out: Path) -> None:
    part = extend.plan_part(wanted, out)
    assert part is not None
    extract.run(*part, batch_size=4)


@pytest.fixture(scope="module", params=STORES)
def cache(
    request: Any, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cache]:
    """Levels 2 and 3 of one teacher, level 1 of another, and a tokenizer's ids."""
    out = tmp_path_factory.mktemp("levels") / "cache"
    shared = {"store": request.param, "views": 2}
    extract.run(make_plan(pictures, SYNTHETIC, levels=(2, 3), **shared), out, batch_size=4)
    add(make_plan(pictures, OTHER, levels=(1,), **shared), out)
    ids = plan.Plan(
        source=open_source(pictures), teacher=TokenizerTeacher(Ones()), policy=Policy(size=28),
        levels=(1,), rows_per_shard=5, **shared,
    )  # fmt: skip
    add(ids, out)
    with Cache(out) as opened:
        yield opened


def test_levels_are_those_of_features_and_statistics(cache: Cache) -> None:
    fields = ("features", "feature_stats", "attention", "crop", "ones/token_ids")
    whole = cache.read(ROWS, 1, fields)
    got = cache.read(ROWS, 1, fields, levels=[3])
    for name in fields:
        wanted = whole[name][:, 1:] if name.startswith("feature") else whole[name]
        np.testing.assert_array_equal(got[name], wanted)
    assert (got["ones/token_ids"] == 1).all()


def test_another_teachers_attention_and_ids_take_any_level_that_is_stored(cache: Cache) -> None:
    fields = (f"{OTHER}/attention", f"{OTHER}/mask_order", "ones/token_ids")
    whole = cache.read(ROWS, 0, fields)
    for levels in ([2, 3], [1], (3, 2), np.array([2])):
        got = cache.read(ROWS, 0, fields, levels=levels, tokens=2)
        assert all(np.array_equal(got[name], whole[name]) for name in fields)


def test_features_of_one_teacher_beside_the_attention_of_another(cache: Cache) -> None:
    got = cache.read(ROWS, 0, ("features", f"{OTHER}/attention"), levels=[2], tokens=3)
    assert got["features"].shape[1:3] == (1, 3)
    assert got[f"{OTHER}/attention"].shape == (5, 9)


def test_fields_without_levels_fill_the_memory_that_is_given(cache: Cache) -> None:
    out = {"ones/token_ids": np.zeros((5, 4), np.uint16)}
    got = cache.read(ROWS, 0, ("features", "ones/token_ids"), levels=[3, 2], out=out)
    assert got["ones/token_ids"] is out["ones/token_ids"]
    assert out["ones/token_ids"].all()


@pytest.mark.parametrize(
    ("fields", "levels", "words"),
    [
        (("features",), [1], rf"level 1 of features .* stored are \[2, 3\] \({OTHER} has it"),
        ((f"{OTHER}/features",), [2], rf"level 2 of {OTHER}/features .* \[1\] \({SYNTHETIC} has"),
        (("features", f"{OTHER}/features"), [2], rf"level 2 of {OTHER}/features .* each teacher"),
        (("features",), [4], r"level 4 of features is not stored; stored are \[2, 3\]$"),
        (("attention",), [7], r"level 7 of attention is not stored"),
        (("ones/token_ids",), [0], "level 0 of ones/token_ids is not stored"),
        (("features",), [-1], "level -1"),
        (("features",), [True], "whole numbers"),
        (("features",), [2.0], "whole numbers"),
        (("features",), ["2"], "whole numbers"),
        (("features",), [None], "whole numbers"),
        (("features",), [float("nan")], "whole numbers"),
        (("features",), [2**70], "level 1180591620717411303424 of"),
        (("features",), [[2]], "a list of block numbers"),
        (("features",), 2, "a list of block numbers"),
        (("features",), "23", "a list of block numbers"),
    ],
)
def test_other_levels_are_one_line(
    cache: Cache, fields: tuple[str, ...], levels: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        cache.read(ROWS, 0, fields, levels=levels)


def test_tokens_are_those_of_the_field_that_is_named(cache: Cache) -> None:
    with pytest.raises(UsageError, match=rf"tokens of {OTHER}/features must be from 1 to 10, 11"):
        cache.read(ROWS, 0, (f"{OTHER}/features",), tokens=11)


def test_no_levels_rows_and_fields_are_empty_arrays(cache: Cache) -> None:
    assert cache.read(ROWS, 0, ("features",), levels=[])["features"].shape[:2] == (5, 0)
    assert cache.read([], 0, ("features", "crop"))["crop"].shape == (0, 4)
    assert cache.read(ROWS, 0, ()) == {}


def test_levels_and_fields_may_come_twice(cache: Cache) -> None:
    got = cache.read(ROWS, 0, ("features", "features"), levels=[3, 3])["features"]
    np.testing.assert_array_equal(got[:, 0], got[:, 1])


def test_arrays_that_share_memory_are_refused(cache: Cache) -> None:
    """The one that is read last would lie in both."""
    memory = np.zeros((5, 8), np.int32)
    out = {"crop": memory.reshape(-1)[:20].reshape(5, 4), "jitter": memory.view(np.float32)[:, :4]}
    out["jitter"] = memory.reshape(-1)[16:36].view(np.float32).reshape(5, 4)
    with pytest.raises(UsageError, match=r"out\['crop'\] and out\['jitter'\] share memory"):
        cache.read(ROWS, 0, ("crop", "jitter"), out=out)
