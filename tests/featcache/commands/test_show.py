"""`featcache show` tells what numpy finds in the stored arrays, and whether they are as they were
written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.console.block_map import ASCII, BLOCKS, block_map, terminal_shades
from featcache.drawing import record, row_choice
from featcache.drawing.panels import Panel
from featcache.drawing.sheet import GAP, TITLE_PX, compose
from featcache.extraction import extract
from tests.codec_caches import LAYOUTS, WIDE, made
from tests.conftest import Ran, copy_tree, flip, make_plan, waves

Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures 2, 5 and b/7 in rows 0, 1 and 2, and one in quarantine; one view."""
    root = tmp_path_factory.mktemp("numbered")
    (root / "pictures/b").mkdir(parents=True)
    for name in ("2", "5", "b/7"):
        Image.fromarray(waves(40, 50, len(name))).save(root / f"pictures/{name}.png")
    (root / "pictures/bad.png").write_text("no picture")
    extract.run(make_plan(root / "pictures", views=1), root / "cache", batch_size=4)
    return root / "cache"


def shown(run: Command, *words: object) -> dict[str, Any]:
    ran = run("show", *words, "--json")
    assert ran.status == 0, ran.err
    facts: dict[str, Any] = json.loads(ran.out)
    return facts


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_facts_are_those_of_the_arrays(
    featcache_command: Command, photos: Path, layout: str
) -> None:
    """Norms of h and of the residual stream by numpy, on what the cache derives."""
    path = made(photos, **LAYOUTS[layout])
    facts = shown(featcache_command, path, "4", "--view", "2")
    with featcache.open(path) as cache:
        stored = cache.read([4], 2, ("crop", "flip", "attention", "mask_order", "source_size"))
        (view,) = facts["views"]
        found = view["teachers"][WIDE]
        assert (facts["key"], facts["row"], facts["rows"]) == (cache.keys[4], 4, 11)
        assert (facts["shard"], facts["row_of_shard"]) == ("000000", 4)
        assert view["crop"] == stored["crop"][0].tolist()
        assert view["source_size"] == stored["source_size"][0].tolist()
        assert view["flip"] == bool(stored["flip"][0])
        assert np.array_equal(np.float32(found["attention"]), stored["attention"][0])
        assert found["mask_order"] == stored["mask_order"][0].tolist()
        for level in (2, 5):
            about = found["levels"][str(level)]
            for name, target in (("norm", "h"), ("residual_norm", "y")):
                values = cache.derive(target, [4], 2, level=level)[0].astype(np.float64)
                norms = np.linalg.norm(values, axis=1)
                expected = {
                    "cls": norms[0], "mean": norms[1:].mean(),
                    "min": norms[1:].min(), "max": norms[1:].max(),
                }  # fmt: skip
                assert about[name] == pytest.approx(expected, rel=2e-3)
            assert about["stored_tokens"] == (6 if layout == "kept" else 17)
    assert facts["problems"] == []


def test_rows_of_later_shards(featcache_command: Command, photos: Path) -> None:
    """Shards of five: row 9 is the last of the second."""
    facts = shown(featcache_command, made(photos), "9")
    assert (facts["shard"], facts["row_of_shard"], len(facts["views"])) == ("000001", 4, 3)


def test_the_text(featcache_command: Command, photos: Path) -> None:
    ran = featcache_command("show", made(photos), "photo1", "--view", "0")
    assert ran.status == 0
    with featcache.open(made(photos)) as cache:
        (row,) = cache.keys.find(["photo1"])
        stored = cache.read([row], 0, ("attention", "mask_order", "crop"))
        count = len(cache.fields)
    weights, order = stored["attention"][0], stored["mask_order"][0].tolist()
    held = np.cumsum(np.sort(weights.astype(np.float64))[::-1])
    half = int(np.searchsorted(held, held[-1] / 2)) + 1
    assert f"half of it in {half} of 16 patches" in ran.out
    assert f"mask order begins {', '.join(map(str, order[:12]))}, ..." in ran.out
    assert f"all {count} arrays of 1 view are as they were written" in ran.out
    top, left, height, width = stored["crop"][0]
    assert f"{height} x {width} of 70 x 40 pixels, from row {top}, column {left}" in ran.out
    drawn = re.findall(r"^ +\|(.*)\|$", ran.out, re.M)
    assert [len(line) for line in drawn] == [8] * 4
    assert drawn[weights.argmax() // 4][2 * (weights.argmax() % 4)] == "█"


def test_shades_are_those_the_terminal_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shades in (("utf-8", BLOCKS), ("ascii", ASCII), ("latin-1", ASCII), ("x", ASCII)):
        monkeypatch.setattr(sys, "stdout", type("Out", (), {"encoding": encoding}))
        assert terminal_shades() == shades
    assert block_map([0.0] * 4, 2) == ["    ", "    "]
    assert block_map([0.19, 0.21, 0.5, 1.0], 2) == ["  ░░", "▒▒██"]


# ------------------------------------------------------------------ naming a record


def test_a_key_that_looks_like_a_number_is_a_key(
    featcache_command: Command, numbered: Path
) -> None:
    ran = featcache_command("show", numbered, "2")
    assert "\nrow 0 of 3" in ran.out
    assert "note: '2' is a key, and shown for that; row 2 is 'b/7'" in ran.err
    ran = featcache_command("show", numbered, "1")
    assert ran.out.startswith("5\nrow 1 of 3")
    assert ran.err == ""
    ran = featcache_command("show", numbered, "5")  # there is no row 5
    assert ran.out.startswith("5\nrow 1 of 3")
    assert ran.err == ""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("b/7.png", "did you mean 'b/7'?"),
        ("c/7", "did you mean 'b/7'?"),
        ("bad", "is in quarantine (not a readable picture)"),
        ("3", "it has 3 rows, 0 to 2"),
        ("9" * 30, "no key is like it"),
        ("\x1b[31m", "\\x1b[31m"),
        ("zzzz", "no key is like it"),
        ("", "no key is like it"),
    ],
)
def test_a_name_that_is_none(
    featcache_command: Command, numbered: Path, word: str, said: str
) -> None:
    ran = featcache_command("show", numbered, word)
    assert ran.status == 1
    assert said in ran.error
    assert "\x1b" not in ran.err


def test_near_keys_of_very_many() -> None:
    """Of a million keys those are compared that end or begin alike."""
    keys = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}" for i in range(200_000)]
    assert "n00000017/n00000017_40017" in row_choice.near_keys(
        _Keys(keys), "n00000017/n0000017_40017"
    )


class _Keys(list[str]):
    def find(self, keys: list[str]) -> np.ndarray:
        return np.full(len(keys), -1)


# ------------------------------------------------------------------ what is wrong


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", ["features", "attention", "mask_order", "thumbnail", "crop"])
def test_damage_is_told_and_the_rest_is_shown(
    featcache_command: Command, photos: Path, tmp_path: Path, name: str
) -> None:
    """The first bit of an array's first file: of row 0, view 0."""
    cache = copy_tree(made(photos), tmp_path / "cache")
    path = min(cache.glob(f"shards/000000.zarr/{name}/c*"))
    while path.is_dir():
        path = min(path.iterdir())
    flip(path)
    ran = featcache_command("show", cache, "0", "--json")
    assert ran.status == 1
    assert "row 0" in ran.error
    facts = json.loads(ran.out)
    assert len(facts["problems"]) == 1
    assert name in facts["problems"][0]
    found = facts["views"][0]["teachers"][WIDE]
    assert len(found["levels"]) == (1 if name == "features" else 2)
    assert (found["attention"] is None) == (name == "attention")
    assert featcache_command("show", cache, "1").status == 0


# ------------------------------------------------------------------ drawing


def test_a_record_is_drawn(featcache_command: Command, photos: Path, tmp_path: Path) -> None:
    """Views below one another: itself, attention, three masks, two levels, 224 pixels each."""
    out = tmp_path / "record.png"
    words = ["show", made(photos, pixels="raw"), "photo2", "--out", out]
    assert featcache_command(*words).status == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (GAP + 3 * (TITLE_PX + 224 + GAP), GAP + 7 * (224 + GAP), 3)
    with featcache.open(made(photos, pixels="raw")) as cache:
        (row,) = cache.keys.find(["photo2"])
        pixels = cache.read([row], 1, ("pixels",))["pixels"][0]
    top = GAP + (TITLE_PX + 224 + GAP) + TITLE_PX
    assert np.array_equal(sheet[top : top + 224 : 8, GAP : GAP + 224 : 8], pixels)
    again = featcache_command(*words)
    assert (again.status, "is there already" in again.error) == (1, True)


def test_other_pictures_are_told(featcache_command: Command, photos: Path, tmp_path: Path) -> None:
    other = copy_tree(photos, tmp_path / "other")
    with Image.open(photos / "rgb.png") as picture:
        picture.rotate(180).save(other / "rgb.png")
    ran = featcache_command(
        "show", made(photos), "rgb", "--out", tmp_path / "a.png", "--images", other
    )
    assert ran.status == 1
    assert "its pixels are not those the teacher saw" in ran.error
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--view", "3"), 2, "has views 0 to 2"),
        (("--images", "x"), 2, "add --out FILE.png"),
        (("--out", "a.jpg"), 2, "a name that ends with .png"),
        (("--out", "nowhere/a.png"), 1, "cannot be written"),
    ],
)
def test_what_cannot_be_meant(
    featcache_command: Command,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = featcache_command("show", made(photos), "0", *words)
    assert (ran.status, said in ran.error) == (status, True), ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_holds_its_pictures_in_lines() -> None:
    cells = [np.full((8, 8, 3), shade, np.uint8) for shade in (10, 20, 30)]
    sheet = compose(
        [[Panel("a", "", cells[0]), Panel("b", "", cells[1])], [Panel("c", "", cells[2])]]
    )
    assert (sheet[GAP + TITLE_PX :][:8, GAP : GAP + 8] == 10).all()
    assert (sheet[GAP + TITLE_PX :][:8, 2 * GAP + 8 :][:, :8] == 20).all()
    assert (sheet[-GAP - 8 : -GAP, GAP : GAP + 8] == 30).all()


def test_residual_norms_by_hand() -> None:
    """D 2: a token with mean 3 and variance 16 has |y|^2 = 2 * (9 + 16) = 50."""
    std = np.sqrt(16 + 1e-5)
    found = record.residual_norms(np.array([[3.0, std], [0.0, 0.0]], np.float32), 2)
    assert found is not None
    assert np.allclose(found, [50**0.5, 0])
    assert record.residual_norms(None, 2) is None
