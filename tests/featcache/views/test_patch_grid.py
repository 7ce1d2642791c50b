"""Views have a size that a student's patches can be cut from, or are told to have none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import featcache
from featcache.views import patch_grid
from tests.conftest import Ran

TEACHER = "synthetic:levels=5,tokens=9,width=8,size=27"  # 3 x 3 patches of 9 pixels


@given(st.integers(1, 40), st.integers(1, 40))
def test_multiples_of_the_grid_can_be_cut(side: int, patch: int) -> None:
    assert patch_grid.patch_px(side * patch, side * side) == patch
    assert patch_grid.misfit(side * patch, side * side, None) == ""
    assert side == 1 or patch_grid.patch_px(side * patch + 1, side * side) is None


@given(st.integers(1, 500), st.integers(1, 40), st.none() | st.integers(1, 500))
def test_what_is_proposed_can_be_cut(size: int, side: int, own: int | None) -> None:
    """The teacher's own size where that can be; else a multiple of the grid near the one given, and
    never none at all."""
    told = patch_grid.misfit(size, side**2, own)
    assert bool(told) == (size % side != 0)
    if told:
        proposed = int(told.partition("--size ")[2].partition(" ")[0])
        assert proposed > 0
        assert proposed % side == 0
        assert proposed == own or abs(proposed - size) <= side


@given(st.integers(1, 500), st.integers(2, 1200).filter(lambda n: math.isqrt(n) ** 2 != n))
def test_no_size_fits_patches_that_are_no_square(size: int, patches: int) -> None:
    told = patch_grid.misfit(size, patches, size)
    assert told.endswith("which are no square")
    assert "--size" not in told


def test_without_a_size_views_are_as_the_teachers_input(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    """224 is no multiple of 3. What is added later goes by the same rule; a size that is given
    stays, and `info` says what it means."""
    words = ("extract", "--teacher", TEACHER, "--images", photos, "--levels", "all")
    ran = featcache_command(*words, "--out", tmp_path / "c")
    assert ran.status == 0
    assert "note: views of 27 pixels, as the teacher's input: views of 224 pixels cannot" in ran.err
    ran = featcache_command(*words, "--out", tmp_path / "c", "--views", 2, "--add")
    assert ran.status == 0, ran.err
    with featcache.open(tmp_path / "c") as cache:
        assert (cache.identity["policy"]["size"], cache.views) == (27, 2)
    assert (
        json.loads(featcache_command("info", tmp_path / "c", "--json").out)["serves"]["mrmae"] == ""
    )

    ran = featcache_command(*words, "--out", tmp_path / "d", "--size", 224)
    assert ran.status == 0
    assert "3 x 3 patches (--size 27 can): no student can be trained by its tokens" in ran.err
    told = json.loads(featcache_command("info", tmp_path / "d", "--json").out)["serves"]["mrmae"]
    assert (
        told == "views of 224 pixels cannot be cut into the teacher's 3 x 3 patches (--size 27 can)"
    )
