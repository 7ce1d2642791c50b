"""Galleries of caches of every layout, opened in a browser; what is drawn is compared with what
numpy, scikit-learn and the pictures themselves say."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import featcache
from featcache.drawing import gallery, row_choice
from featcache.drawing.pictures import COLOURS, HIDDEN
from featcache.extraction import extend, extract
from featcache.storage import manifest
from featcache.views.fingerprint import pixel_hash
from tests.browser import SHARED, open_page
from tests.codec_caches import OTHER, VIT, WIDE
from tests.conftest import Ran, copy_tree, flip, make_plan

pytestmark = SHARED

Command = Callable[..., Ran]
ROWS = (1, 4, 6)  # of eleven, in two of three shards
STRIPES = {150, 225}
LAYOUTS = {
    "raster": {},
    "ranked": {"tokens": "ranked"},
    "kept": {"tokens": "ranked", "keep": 5},
    "coded": {"codec": "t4"},
    "pixels": {"pixels": "raw"},
    "random": {"teacher": VIT, "weights": "random:0", "levels": (1, 2)},
}


@pytest.fixture(scope="module")
def caches(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of each layout, of eleven pictures with two views each; "two" has a second
    teacher."""
    root = tmp_path_factory.mktemp("caches")
    common = {"teacher": WIDE, "views": 2, "levels": (2, 5)}
    for name, changes in LAYOUTS.items():
        extract.run(make_plan(photos, **{**common, **changes}), root / name, batch_size=8)
    extract.run(make_plan(photos, **common), root / "two", batch_size=8)
    part = extend.plan_part(make_plan(photos, OTHER, views=2, levels=(3,)), root / "two")
    assert part is not None
    extract.run(*part, batch_size=8)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def galleries(
    caches: dict[str, Path], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The gallery of each: with its pictures, but for the stored pixels."""
    root = tmp_path_factory.mktemp("galleries")
    for name, path in caches.items():
        images = None if name == "pixels" else str(photos)
        with featcache.open(path) as cache:
            done = gallery.draw(cache, ROWS, root / name, images=images)
            assert done["problems"] == []
            assert done["files"] == len(list((root / name).iterdir()))
    with featcache.open(caches["raster"]) as cache:
        gallery.draw(cache, ROWS, root / "bare")
    return {path.name: path for path in root.iterdir()}


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def patch_cells(pixels: np.ndarray, side: int = 4) -> np.ndarray:
    """(P, n, n, 3): the pixels of each patch."""
    n = len(pixels) // side
    cells = pixels.reshape(side, n, side, n, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(side * side, n, n, 3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("name", [*LAYOUTS, "two", "bare"])
def test_a_reader_meets_nothing_wrong(galleries: dict[str, Path], name: str, width: int) -> None:
    page = open_page(galleries[name] / "index.html", width)
    page.check()
    assert len(page.images) == len(list(galleries[name].glob("*.png")))
    assert {image.width for image in page.images if "-v" in image.source} == {224}
    assert ("RANDOM WEIGHTS" in page.text) == (name == "random")
    assert ("14 x 14 block means" in page.text) == (name == "bare")


def test_views_are_those_the_teacher_saw(
    caches: dict[str, Path], galleries: dict[str, Path]
) -> None:
    """Every pixel of 28 is drawn as 8 x 8, and their hash is the stored one; from the pictures and
    from stored pixels alike."""
    with featcache.open(caches["raster"]) as cache:
        for i, row in enumerate(ROWS):
            for view in range(2):
                stored = cache.read([row], view, ("pixel_hash",))["pixel_hash"][0]
                for name in ("raster", "pixels"):
                    shown = drawn(galleries[name] / f"{i:03d}-v{view}-view.png")
                    assert pixel_hash(np.ascontiguousarray(shown[::8, ::8])) == stored
                    assert np.array_equal(shown, shown[::8, ::8].repeat(8, 0).repeat(8, 1))


def test_without_pictures_the_block_means_are_drawn(
    caches: dict[str, Path], galleries: dict[str, Path]
) -> None:
    with featcache.open(caches["raster"]) as cache:
        small = cache.read([ROWS[0]], 1, ("thumbnail",))["thumbnail"][0]
    shown = drawn(galleries["bare"] / "000-v1-view.png")
    assert np.array_equal(shown[::16, ::16], small)


@pytest.mark.parametrize("name", ["raster", "bare"])
def test_boxes_lie_where_the_views_were_cut(
    caches: dict[str, Path], galleries: dict[str, Path], name: str
) -> None:
    """The frame of the last view, which nothing is drawn over but labels, begins in the pixel where
    its crop does, at the scale of the drawing."""
    with featcache.open(caches["raster"]) as cache:
        for i, row in enumerate(ROWS):
            crop, size = (
                cache.read([row], 1, (field,))[field][0].astype(int)
                for field in ("crop", "source_size")
            )
            shown = drawn(galleries[name] / f"{i:03d}.png")
            scale = 512 / max(size)
            assert shown.shape[:2] == tuple(round(side * scale) for side in size)
            rows, columns = np.nonzero((shown == COLOURS[1]).all(-1))
            top, left, height, width = crop * scale
            edges = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            assert np.allclose(edges, (top, left, top + height, left + width), atol=1.01)


@pytest.mark.parametrize("name", ["raster", "ranked", "kept"])
def test_visible_patches_are_the_first_of_the_order(
    caches: dict[str, Path], galleries: dict[str, Path], name: str
) -> None:
    with featcache.open(caches[name]) as cache:
        order = cache.read([ROWS[2]], 1, ("mask_order",))["mask_order"][0]
    for word, count in (("10", 1), ("25", 4), ("50", 8)):
        cells = patch_cells(drawn(galleries[name] / f"002-v1-seen{word}.png"))
        view = patch_cells(drawn(galleries[name] / "002-v1-view.png"))
        for rank, patch in enumerate(order.tolist()):
            expected = view[patch] if rank < count else np.full_like(view[patch], HIDDEN)
            assert np.array_equal(cells[patch], expected), (word, rank)


@pytest.mark.parametrize("name", ["raster", "ranked", "kept", "coded", "two"])
def test_colours_are_the_components_of_the_stored_patches(
    caches: dict[str, Path], galleries: dict[str, Path], name: str
) -> None:
    """scikit-learn's components of the patches of all views drawn, in their place in the picture by
    numpy; patches that are not stored are striped."""
    with featcache.open(caches[name]) as cache:
        pairs = [(row, view) for row in ROWS for view in range(2)]
        rows, views = map(np.array, zip(*pairs, strict=True))
        tokens = stored_patches(cache, rows, views)  # (n, P, D), NaN where not stored
    known = tokens[np.isfinite(tokens).all(-1)].astype(np.float64)
    pca = PCA(3, svd_solver="full").fit(known)
    signs = np.sign(np.take_along_axis(
        pca.components_, np.abs(pca.components_).argmax(1, keepdims=True), 1
    ))  # fmt: skip
    places = ((known - pca.mean_) @ pca.components_.T) * signs.T
    low, high = np.percentile(places, [1, 99], axis=0)
    for (row, view), patches in zip(pairs, tokens, strict=True):
        cells = patch_cells(drawn(galleries[name] / f"{ROWS.index(row):03d}-v{view}-level5.png"))
        for patch, cell in zip(patches, cells, strict=True):
            if np.isfinite(patch).all():
                place = (patch - pca.mean_) @ pca.components_.T * signs[:, 0]
                colour = np.clip((place - low) / (high - low), 0, 1) * 255
                assert (cell == cell[0, 0]).all()
                assert np.abs(cell[0, 0] - colour).max() <= 1
            else:
                assert set(cell.ravel().tolist()) == STRIPES


def stored_patches(cache: featcache.Cache, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Level 5 in image order, by the order that is stored beside it."""
    found = cache.derive("h", rows, views, level=5)[:, 1:]
    if cache.identity["tokens"] == "raster":
        return found
    order = cache.read(rows, views, ("mask_order",))["mask_order"].astype(int)
    out = np.full((len(rows), order.shape[1], found.shape[2]), np.nan)
    for i, patches in enumerate(found):
        out[i, order[i, : len(patches)]] = patches
    return out


def test_a_second_teacher_has_its_own_pictures(
    caches: dict[str, Path], galleries: dict[str, Path]
) -> None:
    """Its grid is 2 x 2; the brightest patch of its attention is the one with the largest stored
    weight."""
    assert (galleries["two"] / "000-v0-t1-level3.png").is_file()
    with featcache.open(caches["two"]) as cache:
        weights = cache.read([ROWS[0]], 0, (f"{OTHER}/attention",))[f"{OTHER}/attention"][0]
    assert weights.shape == (4,)
    text = (galleries["two"] / "index.html").read_text()
    assert text.count(f'<p class="teacher">{OTHER}</p>') == len(ROWS) * 2
    cells = patch_cells(drawn(galleries["two"] / "000-v0-t1-level3.png"), 2)
    assert all((cell == cell[0, 0]).all() for cell in cells)


# ------------------------------------------------------------------ what is wrong is told


@pytest.mark.slow
def test_a_damaged_row_is_told_and_the_others_are_drawn(
    featcache_command: Command, caches: dict[str, Path], tmp_path: Path
) -> None:
    """One byte of level 5 of row 0, view 1: 17 tokens of 64 numbers of 2 bytes, two levels a
    row."""
    cache = copy_tree(caches["raster"], tmp_path / "cache")
    (path,) = cache.glob("shards/000000.zarr/features/c.0.1.0.0.0")
    flip(path, at=17 * 64 * 2 + 7)
    out = tmp_path / "out"
    ran = featcache_command("gallery", cache, "--out", out, "--count", "11", "--views", "2")
    assert ran.status == 1
    assert "row 0" in ran.error
    assert "view 1" in ran.error
    assert "1 problem" in ran.error
    assert not (out / "000-v1-level5.png").exists()
    for name in ("000-v1-level2", "000-v0-level5", "001-v1-level5", "000-v1-view"):
        assert (out / f"{name}.png").is_file()
    page = open_page(out / "index.html", 360)
    page.check()
    assert page.text.count("(seen at row 0, ") == 1


def test_other_pictures_under_the_same_keys_are_told(
    featcache_command: Command, caches: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    other = copy_tree(photos, tmp_path / "other")
    with Image.open(photos / "rgb.png") as picture:
        picture.rotate(180).save(other / "rgb.png")
        picture.resize((20, 20)).save(other / "palette.png")
    (other / "grey.png").write_text("no picture")
    words = ["--images", other, "--out", tmp_path / "out", "--views", "1"]
    for key in ("rgb", "palette", "grey", "photo1"):
        words += ["--keys", key]
    ran = featcache_command("gallery", caches["raster"], *words)
    assert ran.status == 1
    text = (tmp_path / "out/index.html").read_text()
    assert "its pixels are not those the teacher saw" in text
    assert "the picture at hand has 20 x 20 pixels" in text
    assert "cannot be decoded: not a readable picture" in text
    assert (tmp_path / "out/003-v0-view.png").is_file()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--keys", "rgbb"), 1, "did you mean 'rgb'"),
        (("--keys", "rgb", "--count", "2"), 2, "give one way"),
        (("--count", "0"), 2, "0"),
        (("--images", "EMPTY"), 1, "none of the 11 rows to draw is there"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    featcache_command: Command,
    caches: dict[str, Path],
    tmp_path: Path,
    words: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    other = tmp_path / "pictures"
    other.mkdir()
    Image.new("RGB", (9, 9)).save(other / "nobody.png")
    given = [str(other) if word == "EMPTY" else word for word in words]
    ran = featcache_command("gallery", caches["raster"], "--out", tmp_path / "out", *given)
    assert (ran.status, said in ran.error) == (status, True), ran.err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_nothing_is_overwritten(
    featcache_command: Command, caches: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        ran = featcache_command("gallery", caches["raster"], "--out", tmp_path / name)
        assert ran.status == 1
        assert "give an empty or new folder" in ran.error
    assert (tmp_path / "full/mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (
        featcache_command(
            "gallery", caches["raster"], "--out", tmp_path / "empty", "--count", "1"
        ).status
        == 0
    )


# ------------------------------------------------------------------ strangers' names

NAMES = (
    "<img src=x onerror=alert(1)>",
    "\"quoted' & <b>bold</b>",
    "\x1b[31mred\x07\x9b2J",
    "\u202egnp.exe",
    "a\nerror: forged",
    "עברית العربية",
    "long/" + "x" * 10_000,
)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tar of pictures with such names, and a cache of it."""
    root = tmp_path_factory.mktemp("strange")
    data = io.BytesIO()
    Image.effect_noise((40, 40), 60).convert("RGB").save(data, "PNG")
    with tarfile.open(root / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in NAMES:
            about = tarfile.TarInfo(f"{name}.png")
            about.size = len(data.getvalue())
            tar.addfile(about, io.BytesIO(data.getvalue()))
    plan = make_plan(root / "a.tar", WIDE, views=1, levels=(5,))
    extract.run(plan, root / "cache", batch_size=8)
    return root / "cache", root / "a.tar"


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
def test_strangers_names_are_only_text(
    featcache_command: Command, strange: tuple[Path, Path], tmp_path: Path, width: int
) -> None:
    cache, tar = strange
    ran = featcache_command("gallery", cache, "--out", tmp_path / "out", "--images", tar)
    assert ran.status == 0, ran.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(name.isascii() and len(name) < 40 for name in names)
    page = open_page(tmp_path / "out/index.html", width)
    page.check()
    assert len(page.images) == len(names) - 1
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "\\x1b[31mred\\x07\\x9b2J" in page.text
    assert "\\u202egnp.exe" in page.text
    assert "עברית العربية" in page.text
    assert "\u202e" not in page.text


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_shown_by_such_a_name(
    featcache_command: Command, strange: tuple[Path, Path], name: str
) -> None:
    ran = featcache_command("show", strange[0], name)
    assert ran.status == 0, ran.err
    assert not any(line.startswith("error: forged") for line in ran.out.splitlines())
    assert "\x1b" not in ran.out
    assert "\u202e" not in ran.out


# ------------------------------------------------------------------ choosing rows


@pytest.mark.slow
def test_rows_are_chosen_by_the_seed() -> None:
    assert row_choice.by_seed(5, 1000, 3) == row_choice.by_seed(5, 1000, 3)
    assert row_choice.by_seed(5, 1000, 3) != row_choice.by_seed(5, 1000, 4)
    assert row_choice.by_seed(24, 7, 0) == list(range(7))
    assert row_choice.by_seed(24, 0, 0) == []


@pytest.mark.slow
def test_the_same_gallery_twice(caches: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        with featcache.open(caches["kept"]) as cache:
            gallery.draw(cache, ROWS, tmp_path / name)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.slow
def test_an_added_teacher_of_random_weights_is_told(
    caches: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    cache_path = copy_tree(caches["raster"], tmp_path / "cache")
    plan = make_plan(photos, VIT, "random:3", views=2, levels=(2,))
    part = extend.plan_part(plan, cache_path)
    assert part is not None
    extract.run(*part, batch_size=8)
    with featcache.open(cache_path) as cache:
        assert not manifest.is_random(cache.manifest)
        gallery.draw(cache, [0], tmp_path / "out", views=1)
    assert "RANDOM WEIGHTS (random:3)" in (tmp_path / "out/index.html").read_text()
    assert torch.get_num_threads() == 1
