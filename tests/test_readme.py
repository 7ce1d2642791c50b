"""The Python of README.md and of the pages runs as it stands, on a small home that has what it
names."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featcache
from featcache.pictures.open_source import open_source
from tests import student_fixtures as fx

ROOT = Path(__file__).parent.parent


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)


README_BLOCKS = blocks_of("README.md")
TRAINER = "docs/guides/own-trainer.md"
BLOCKS = blocks_of(TRAINER)
FORMAT_BLOCKS = blocks_of("docs/format.md")
CACHE = "caches/clip-b16-1a2b3c4d"
CLIP = "synthetic:levels=12,tokens=196,width=768,size=224"  # the shapes of CLIP-B/16
DINO = "synthetic:levels=12,tokens=196,width=96,size=224"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, a cache of 8 pictures x 4 views with a second teacher, the same as tars, and a
    run."""
    root = tmp_path_factory.mktemp("readme")
    fx.save_pictures(root / "train/n01440764", 7)
    (root / "train/n01440764/p00.png").rename(root / "train/n01440764/n01440764_10026.png")
    fx.save_pictures(root / "train/odd", 1)
    (root / "train/odd/p00.png").rename(root / "train/odd/50%.2E of it.png")
    common = ("--images", str(root / "train"), "--views", "4", "--out", str(root / CACHE))
    assert fx.feat("extract", "--teacher", CLIP, "--levels", "last:2", *common).status == 0
    assert fx.feat("extract", "--teacher", DINO, "--levels", "last:1", *common, "--add").status == 0
    assert (
        fx.feat("convert", str(root / CACHE), str(root / "tars"), "--store", "webdataset").status
        == 0
    )
    words = (
        "--recipe",
        "mae",
        "--cache",
        root / CACHE,
        "--set",
        "decoder_depth=1",
        "--device",
        "cpu",
    )
    fx.good(
        fx.stud(
            "train", *words, "--steps", "0", "--batch-size", "4", "--out", root / "runs/mralign-s0"
        )
    )
    return root


@pytest.fixture
def block(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    """Run the block that holds a word; its names afterwards. The second teacher has another name
    here."""
    monkeypatch.chdir(place)

    def run(word: str) -> dict[str, Any]:
        (text,) = (each for each in BLOCKS if word in each)
        path = tmp_path / "block.py"
        path.write_text(text.replace('"dino-b16/features"', f'"{DINO}/features"'))
        return runpy.run_path(str(path))

    return run


def test_every_block_is_run_here() -> None:
    assert (len(README_BLOCKS), len(BLOCKS)) == (1, 4)


def test_the_readme(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but CLIP's projection, which the synthetic teacher of this home has not."""
    monkeypatch.chdir(place)
    text, lines = README_BLOCKS[0], README_BLOCKS[0].splitlines()
    assert lines[-1].startswith('cache.derive("z", rows, view=2)')
    path = tmp_path / "block.py"
    path.write_text(text.replace('derive("z"', 'derive("f"'))
    assert runpy.run_path(str(path))["batch"]["features"].shape == (1, 2, 197, 768)


def test_reading(block: Callable[[str], dict[str, Any]]) -> None:
    names = block("featcache.open(")
    assert (names["batch"]["features"].shape, names["batch"]["features"].dtype) == (
        (1, 2, 197, 768),
        np.float16,
    )
    assert names["batch"]["attention"].shape == (1, 196)
    again = names["cache"].read([0], view=2, levels=[12])["features"]
    assert np.array_equal(names["memory"]["features"][1], again[0])


def test_the_dataset(block: Callable[[str], dict[str, Any]]) -> None:
    sample = block("import Dataset")["data"][0]
    assert (sample["pixels"].shape, sample["pixels"].dtype) == ((3, 224, 224), torch.uint8)
    assert sample["features"].shape == (1, 197, 768)
    assert set(sample) == {"pixels", "features", "key", "view", "row", "index"}


@pytest.mark.slow
def test_the_encoder_in_timm(block: Callable[[str], dict[str, Any]]) -> None:
    names = block("load_encoder")
    mine, theirs = names["encoder"].state_dict(), names["vit"].state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_without_us(block: Callable[[str], dict[str, Any]], place: Path) -> None:
    """Keys and features by zarr alone and by webdataset alone are those of the folder, odd
    characters and all."""
    names = block("zarr.open_group(")
    assert sorted(names["keys"]) == sorted(open_source(place / "train").keys)
    assert names["shard"]["features"].shape == (8, 4, 2, 197, 768)
    (text,) = (each for each in BLOCKS if "zarr.open_group(" in each)
    assert text.count("folder + slash + unquote(name)") == 1
    found: list[tuple[str, np.ndarray]] = []
    marked = text.replace(
        "    folder + slash + unquote(name), ", "    found.append((folder + slash + unquote(name), "
    )
    exec(marked.replace('sample["features.npy"]', 'sample["features.npy"]))'), {"found": found})
    assert [key for key, _ in found] == names["keys"]
    assert "odd/50%.2E of it" in names["keys"]
    assert all(
        np.array_equal(names["shard"]["features"][i, 0], item) for i, (_, item) in enumerate(found)
    )


@pytest.fixture
def page_block(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    """Run a block of the page on the format; its names afterwards."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")

    def run(word: str) -> dict[str, Any]:
        (text,) = (each for each in FORMAT_BLOCKS if word in each)
        path = tmp_path / "block.py"
        path.write_text(text)
        return runpy.run_path(str(path))

    return run


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_the_page_on_the_format_shows(
    place: Path, page_block: Callable[[str], dict[str, Any]]
) -> None:
    assert len(FORMAT_BLOCKS) == 6
    with featcache.open(place / CACHE) as cache:
        rows = cache.read([0, cache.keys.find(["n01440764/n01440764_10026"])[0]], 1)["features"]
        keys = list(cache.keys)
        third = cache.read([0], 2)["features"][0]
    names = page_block("np.fromfile")
    np.testing.assert_array_equal(names["third"], third)
    assert names["first_key"] == keys[0]
    names = page_block("import xarray")
    np.testing.assert_array_equal(names["shard"]["features"].sel(level=12, view=1)[0], rows[0, 1])
    picked = names["by_key"].sel(key="n01440764/n01440764_10026", view=1)["features"].values
    np.testing.assert_array_equal(picked, rows[1])
    names = page_block("zarr.open_group(")
    np.testing.assert_array_equal(names["row"], rows[0])
    assert (names["keys"].tolist(), names["teacher"]) == (keys, CLIP)
    np.testing.assert_array_equal(page_block("import tensorstore")["row"], rows[0])
    samples = list(page_block("import WebDataset")["samples"])
    np.testing.assert_array_equal(samples[0]["features.npy"], rows[0])
    loaded = page_block("import datasets")["loaded"]
    assert len(loaded) == len(keys) == len(samples)
    np.testing.assert_array_equal(np.array(loaded[0]["features.npy"], np.float16), rows[0])


@pytest.mark.parametrize(
    "option",
    [
        "pictures",
        "decode",
        "fields",
        "levels",
        "tokens",
        "transform",
        "check_pixels",
        "check_transform",
    ],
)
def test_the_options_of_dataset_exist(option: str) -> None:
    import inspect

    from featcache.torch import Dataset

    table = (ROOT / TRAINER).read_text().split("| `Dataset` option")[1].split("\n\n")[0]
    assert f"`{option}" in table
    assert option in inspect.signature(Dataset).parameters
