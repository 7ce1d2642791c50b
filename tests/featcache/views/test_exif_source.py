"""`--exif` turns pictures as their EXIF orientation says: another pixel path, which whatever reads
the cache replays; without it orientations are ignored, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result
from PIL import Image

import featcache
import student.cli
from featcache.catalog import extract_command
from featcache.errors import IdentityError, UsageError
from featcache.maintenance import recompute
from featcache.pictures.open_source import open_source
from featcache.reading import join
from featcache.torch import Dataset
from featcache.views import pixel_path
from tests.conftest import SYNTHETIC, Ran, waves
from tests.featcache.pictures.test_decode import TURNS

Command = Callable[..., Ran]
WHOLE = ("--scale", "1,1", "--flip", "0", "--size", "28", "--pixels", "raw")


@pytest.fixture
def photos8(tmp_path: Path) -> Path:
    """A picture of each orientation, all but three of 20 x 30 pixels; 1 has no EXIF block."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = number
        options = {"exif": exif} if number > 1 else {}
        Image.fromarray(waves(20, 30, number)).save(root / f"o{number}.png", **options)
    return root


def extract(featcache_command: Command, photos: Path, out: Path, *more: object) -> Ran:
    options = ("--teacher", SYNTHETIC, "--levels", "last:1", "--views", 2, "--rows-per-shard", 3)
    return featcache_command("extract", *options, "--images", photos, "--out", out, *more)


def test_orientations_are_ignored_and_counted_once(
    featcache_command: Command, photos8: Path, tmp_path: Path
) -> None:
    ran = extract(featcache_command, photos8, tmp_path / "c", "--json")
    assert ran.status == 0
    note = "note: 7 of 8 pictures have an EXIF orientation other than 1, which is not applied"
    assert ran.err.count(note) == 1
    assert "--exif applies it" in ran.err
    assert json.loads(ran.out)["exif_ignored"] == 7
    cache = featcache.open(tmp_path / "c")
    sizes = cache.read(range(8), 0, ("source_size",))["source_size"]
    assert sizes.tolist() == [[20, 30]] * 8
    assert cache.identity["pixel_path"]["exif_transpose"] is False
    assert "--exif" not in extract_command.extract_options(cache.manifest)


def test_with_exif_views_are_those_of_the_turned_picture(
    featcache_command: Command, photos8: Path, tmp_path: Path
) -> None:
    """The same as of pictures that numpy turned and that have no EXIF block."""
    (tmp_path / "turned").mkdir()
    for number in range(1, 9):
        pixels = np.ascontiguousarray(TURNS[number](waves(20, 30, number)))
        Image.fromarray(pixels).save(tmp_path / f"turned/o{number}.png")
    ran = extract(featcache_command, photos8, tmp_path / "c", *WHOLE, "--exif")
    assert ran.status == 0
    assert "EXIF" not in ran.err
    assert extract(featcache_command, tmp_path / "turned", tmp_path / "t", *WHOLE).status == 0
    ours, theirs = (featcache.open(tmp_path / name) for name in "ct")
    fields = ("pixels", "source_size", "crop", "pixel_hash", "features")
    for view in range(2):
        a, b = (cache.read(range(8), view, fields) for cache in (ours, theirs))
        for name in fields:
            np.testing.assert_array_equal(a[name], b[name])
    assert a["source_size"].tolist() == [[20, 30]] * 4 + [[30, 20]] * 4
    path = {**theirs.identity["pixel_path"], "exif_transpose": True}
    assert ours.identity["pixel_path"] == path
    assert ours.manifest["id"] != theirs.manifest["id"]


@pytest.fixture
def turned_cache(featcache_command: Command, photos8: Path, tmp_path: Path) -> Path:
    out = tmp_path / "c"
    assert extract(featcache_command, photos8, out, "--size", 28, "--exif").status == 0
    return out


def test_a_dataset_replays_turned_pictures(turned_cache: Path, photos8: Path) -> None:
    data = Dataset(photos8, turned_cache, check_pixels=1.0)
    for epoch in range(2):
        data.set_epoch(epoch)
        assert len([data[i] for i in range(8)]) == 8  # each hash was compared


def test_verify_repair_and_more_views_replay_them(
    featcache_command: Command, turned_cache: Path, photos8: Path
) -> None:
    with featcache.open(turned_cache) as cache:
        source = pixel_path.match_decoder(open_source(photos8), cache.identity["pixel_path"])
        assert recompute.recompute(cache, source, None, 8, 0, "cpu")["problems"] == []
        command = extract_command.extract_options(cache.manifest)
    assert featcache_command("verify", turned_cache, "--recompute", 8).status == 0
    before = {path: path.read_bytes() for path in turned_cache.rglob("*") if path.is_file()}
    (turned_cache / "shards/000001.json").unlink()
    assert featcache_command("repair", turned_cache).status == 0
    assert {path: path.read_bytes() for path in turned_cache.rglob("*") if path.is_file()} == before
    assert command[-1] == "--exif"
    command[command.index("--views") + 1] = "3"
    assert featcache_command("extract", *command, "--add", "--out", turned_cache).status == 0
    Dataset(photos8, turned_cache, check_pixels=1.0, epoch=2)[0]


def test_training_replays_them(turned_cache: Path, photos8: Path, tmp_path: Path) -> None:
    for images in (["--images", str(photos8)], []):
        words = ["train", "--recipe", "maskalign", "--cache", str(turned_cache), *images]
        words += ["--set", "encoder=tiny,depth=1", "--steps", "1", "--batch-size", "4"]
        words += ["--check-pixels", "1", "--device", "cpu", "--set", "level_weights=top:1"]
        words += ["--out", str(tmp_path / f"run{len(images)}"), "--workers", "1"]
        ran = CliRunner().invoke(student.cli.cli, words, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output


def train(*words: object) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ("--steps", "1", "--batch-size", "4", "--device", "cpu", "--workers", "1")
    given = ["train", *map(str, words), "--set", "encoder=tiny,depth=1", *more]
    return CliRunner().invoke(student.cli.cli, given)


@pytest.mark.slow
def test_training_without_a_cache_turns_them_where_asked_to(photos8: Path, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("turned", ("--exif",))):
        words = ("--recipe", "mae", "--images", photos8, "--out", tmp_path / name, *more)
        assert train(*words).exit_code == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert f'"exif_transpose": {json.dumps(bool(more))}' in json.dumps(config)


def test_training_from_a_cache_without_them_refuses_the_option(
    featcache_command: Command, photos8: Path, tmp_path: Path
) -> None:
    assert extract(featcache_command, photos8, tmp_path / "c", "--size", 28).status == 0
    words = ("--recipe", "maskalign", "--cache", tmp_path / "c", "--set", "level_weights=top:1")
    ran = train(*words, "--exif", "--out", tmp_path / "run")
    assert isinstance(ran.exception, UsageError)
    assert "was extracted without it" in str(ran.exception)


def test_another_pixel_path_is_refused_with_the_option(
    featcache_command: Command, turned_cache: Path, photos8: Path
) -> None:
    with pytest.raises(IdentityError, match=r"exif_transpose is True there, False here.*--exif"):
        join.join_by_key(featcache.open(turned_cache), open_source(photos8))
    ran = extract(featcache_command, photos8, turned_cache, "--size", 28)
    assert ran.status == 1
    assert "give --exif" in ran.error


def test_ffcvs_decoder_is_refused_with_it(photos8: Path) -> None:
    with pytest.raises(UsageError, match="--exif turns pictures that Pillow decodes"):
        pixel_path.open_with_decoder(photos8, "ffcv", exif=True)


def test_sizes_from_the_header_are_those_of_the_turned_picture(photos8: Path) -> None:
    source = pixel_path.open_with_decoder(photos8, exif=True)
    for i in range(len(source)):
        picture = pixel_path.decode_picture(source, i)
        assert pixel_path.picture_size(source, i) == (picture.height, picture.width)
    assert pixel_path.with_exif(source, True) is not source
    assert pixel_path.pixel_path(pixel_path.with_exif(source, False)) == pixel_path.PIXEL_PATH
