"""Every row of every path: extracted and trained alike the proof passes, and a path that differs
stops the run.

Through the commands. Paths: tars, the .beton of the same JPEGs through our decoder, the same
through FFCV's, and pixels that the cache stores. The pictures are JPEGs but for two PNGs, as FFCV
stores those in another way.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from featcache.errors import IdentityError
from featcache.maintenance import pack_beton, pack_tars
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.reading import pairing, pixel_check
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.torch import Dataset
from featcache.views import pixel_path
from featcache.views.policy import policy_from_dict
from featcache.views.render import render
from student.targets.cached import CachedTargets
from tests import student_fixtures as fx
from tests.conftest import copy_tree, flip

EPOCHS = str(fx.VIEWS)  # every view of every row is shown once


@functools.cache
def tars() -> Path:
    """24 pictures in two shards."""
    source = fx.save_pictures(fx.root() / "proof", seed=3, classes=2)
    for i, path in enumerate(sorted(source.rglob("*.png"))[:-2]):
        with Image.open(path) as picture:
            picture.convert("L" if i == 4 else "RGB").save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    pack_tars.pack(open_source(source), fx.root() / "proof-tars", 12, seed=0)
    return fx.root() / "proof-tars"


@functools.cache
def packed() -> Path:
    """The same pictures as a .beton, in another order."""
    pack_beton.pack(open_source(tars()), fx.root() / "proof.beton", seed=5)
    return fx.root() / "proof.beton"


@functools.cache
def recoded() -> Path:
    """The same keys and crops, each picture decoded and compressed again: what FFCV's own writer
    makes of JPEGs."""
    source, folder = open_source(tars()), fx.root() / "recoded"
    for i, key in enumerate(source.keys):
        path = folder / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        decode(source.read(i)).save(path, quality=80)
    pack_beton.pack(open_source(folder), fx.root() / "recoded.beton", seed=0)
    return fx.root() / "recoded.beton"


# Where pictures come from, and the options of extraction and of training.
PATHS: dict[str, tuple[Callable[[], Path], tuple[str, ...]]] = {
    "tar": (tars, ()),
    "beton": (packed, ()),
    "ffcv": (packed, ("--decoder", "ffcv")),
    "jitter": (tars, ("--jitter", "0.4")),
    "jitter-ffcv": (packed, ("--policy", "caev2", "--decoder", "ffcv")),
    "stored": (tars, ("--pixels", "raw")),
    "stored-ffcv": (packed, ("--decoder", "ffcv", "--pixels", "raw")),
}


@functools.cache
def cache_of(name: str) -> Path:
    pictures, options = PATHS[name]
    return fx.extract(pictures(), fx.root() / f"proof-{name}", *options)


def train(cache: Path, out: Path, *options: str | Path) -> fx.Ran:
    """Every view of every row, each compared with what the teacher saw."""
    every = ("--epochs", EPOCHS, "--batch-size", "8", "--check-pixels", "1")
    return fx.train("maskalign", out, "--cache", cache, *every, *options)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """(row, view) of every comparison that a run makes."""
    seen: set[tuple[int, int]] = set()
    check = CachedTargets.check_pixels

    def note(self: CachedTargets, pixels: Any, at: int, view: int, stored: int) -> None:
        check(self, pixels, at, view, stored)
        seen.add((int(self.rows[at]), view))

    monkeypatch.setattr(CachedTargets, "check_pixels", note)
    return seen


EVERY = {(row, view) for row in range(fx.PICTURES) for view in range(fx.VIEWS)}


# ------------------------------------------------------------ the same path


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_the_proof_passes_on_every_row_of_the_same_path(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, checked: set[tuple[int, int]]
) -> None:
    """Without --images the pictures are those of the extraction, and go through its decoder."""
    if PATHS[name][0] is packed:
        request.getfixturevalue("ffcv")
    fx.good(train(cache_of(name), tmp_path / "run"))
    assert checked == EVERY
    about = json.loads((tmp_path / "run" / "config.json").read_text())["targets"]
    decoder = "ffcv" if "ffcv" in name else "pillow"
    assert about["identity"]["pixel_path"]["decoder"] == decoder
    assert about["reading"]["pixels"] == ("stored" if "stored" in name else "decoded")


@pytest.mark.parametrize(
    ("name", "options"),
    [("tar", ()), ("beton", ("--decoder", "pillow")), ("stored", ("--decode",))],
)
def test_tars_and_their_beton_are_one_path(
    ffcv: None, name: str, options: tuple[str, ...], tmp_path: Path, checked: set[tuple[int, int]]
) -> None:
    """The JPEGs of a .beton through our decoder are the pixels of the tars they came from,
    whichever was extracted."""
    other = packed() if name != "beton" else tars()
    fx.good(train(cache_of(name), tmp_path / "run", "--images", other, *options))
    assert checked == EVERY


def test_the_caches_of_both_hold_the_same_rows(ffcv: None) -> None:
    """Pictures come in another order from the .beton: rows are compared by key."""
    with Cache(cache_of("tar")) as one, Cache(cache_of("beton")) as other:
        ours, theirs = pairing.pair(one, other)
        assert len(ours) == fx.PICTURES
        for view in range(fx.VIEWS):
            a, b = (
                one.read(ours, view, ("features", "pixel_hash")),
                other.read(theirs, view, ("features", "pixel_hash")),
            )
            assert all(np.array_equal(a[field], b[field]) for field in a)


@pytest.mark.parametrize(
    "options",
    [("--decoder", "ffcv"), ("--images", "PACKED"), ("--images", "PACKED", "--decoder", "ffcv")],
)
def test_a_cache_of_ffcvs_path_takes_it_however_the_pictures_are_named(
    ffcv: None, options: tuple[str, ...], tmp_path: Path, checked: set[tuple[int, int]]
) -> None:
    given = [str(packed()) if word == "PACKED" else word for word in options]
    fx.good(train(cache_of("ffcv"), tmp_path / "run", *given))
    assert checked == EVERY


def test_stored_pixels_need_no_decoder_and_their_proof_is_of_what_is_stored(
    ffcv: None, tmp_path: Path, checked: set[tuple[int, int]]
) -> None:
    """Pictures name the training set only: tars do as well, although the pixels are FFCV's."""
    fx.good(train(cache_of("stored-ffcv"), tmp_path / "run", "--images", tars()))
    assert checked == EVERY


# ------------------------------------------------------------ another path


@pytest.mark.parametrize(
    ("name", "pictures", "options", "words"),
    [
        ("tar", recoded, (), r"picture '.*', view \d: its pixels are not those the teacher saw"),
        ("beton", recoded, (), r"picture '.*', view \d: its pixels are not those the teacher saw"),
        ("ffcv", recoded, (), r"picture '.*', view \d: its pixels are not those the teacher saw"),
        (
            "stored",
            recoded,
            ("--decode",),
            r"picture '.*', view \d: its pixels are not those the teacher saw",
        ),
        ("tar", packed, ("--decoder", "ffcv"), "decoder is 'pillow' there, 'ffcv' here"),
        ("beton", None, ("--decoder", "ffcv"), "decoder is 'pillow' there, 'ffcv' here"),
        (
            "stored",
            packed,
            ("--decode", "--decoder", "ffcv"),
            "decoder is 'pillow' there, 'ffcv' here",
        ),
        ("ffcv", None, ("--decoder", "pillow"), "decoder is 'ffcv' there, 'pillow' here"),
        ("ffcv", tars, (), "decoder is 'ffcv' there, 'pillow' here"),
        ("stored-ffcv", tars, ("--decode",), "decoder is 'ffcv' there, 'pillow' here"),
        ("ffcv", tars, ("--teacher", "online"), "decoder is 'ffcv' there, 'pillow' here"),
    ],
)
def test_another_path_stops_the_run(
    ffcv: None,
    name: str,
    pictures: Callable[[], Path] | None,
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
) -> None:
    where = ("--images", pictures()) if pictures else ()
    ran = train(cache_of(name), tmp_path / "run", *where, *options)
    assert ran.status == 1
    assert re.search(words, ran.line), ran.line
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(("name", "other"), [("beton", "ffcv"), ("ffcv", "pillow")])
def test_no_row_of_one_decoder_passes_for_the_others(ffcv: None, name: str, other: str) -> None:
    """The identity is compared first; were it not, the proof itself would find every row of every
    view."""
    with Cache(cache_of(name)) as cache:
        source = pixel_path.open_with_decoder(packed(), other)
        policy = policy_from_dict(cache.identity["policy"])
        filter = "area" if other == "ffcv" else "bicubic"
        for row, key in enumerate(cache.keys):
            picture = pixel_path.decode_picture(source, list(source.keys).index(key))
            for view in range(fx.VIEWS):
                drawn = cache.read([row], view, ("crop", "flip", "jitter"))
                parts = (drawn["crop"][0], drawn["flip"][0], drawn["jitter"][0])
                with pytest.raises(IdentityError, match="not those the teacher saw"):
                    pixel_check.check_pixels(
                        cache, row, view, render(picture, *parts, policy.size, filter)
                    )


# ------------------------------------------------------------ other commands


def test_verify_runs_the_teacher_through_the_caches_path(ffcv: None) -> None:
    ran = fx.good(fx.feat("verify", str(cache_of("ffcv")), "--recompute", str(fx.PICTURES)))
    assert f"{fx.PICTURES} rows recomputed: features within" in ran.out
    ran = fx.feat("verify", str(cache_of("ffcv")), "--recompute", "4", "--images", str(tars()))
    assert ran.status == 1
    assert "decoder is 'ffcv' there, 'pillow' here" in ran.line


def test_repair_extracts_the_same_bytes_by_the_caches_path(ffcv: None, tmp_path: Path) -> None:
    cache = copy_tree(cache_of("ffcv"), tmp_path / "cache")
    files = [path for path in cache.rglob("*") if path.is_file() and path.parent.name == "features"]
    victim = max(files, key=lambda path: path.stat().st_size)
    whole = victim.read_bytes()
    flip(victim, 100)
    ran = fx.feat("repair", str(cache), "--images", str(tars()))
    assert ran.status == 1
    assert "decoder is 'ffcv' there, 'pillow' here" in ran.line
    fx.good(fx.feat("repair", str(cache)))
    assert victim.read_bytes() == whole


def test_the_command_of_a_cache_names_its_decoder(ffcv: None, tmp_path: Path) -> None:
    """`info` prints it; typed again it finds nothing to do, and without the decoder it is another
    cache's."""
    cache = cache_of("ffcv")
    made = json.loads(fx.good(fx.feat("info", str(cache), "--json")).out)
    words = next(text for text in _texts(made) if text.startswith("featcache extract ")).split()[2:]
    assert words[words.index("--decoder") + 1] == "ffcv"
    assert json.loads(fx.good(fx.feat("extract", *words, "--json")).out)["new_pictures"] == 0
    at = words.index("--decoder")
    plain = [*words[:at], *words[at + 2 :]]
    plain[plain.index("--filter") + 1] = "bicubic"
    ran = fx.feat("extract", *plain)
    assert ran.status == 1
    assert (
        "identity.pixel_path.decoder (fatal): 'pillow' here, 'ffcv' there, give --decoder ffcv"
        in ran.line
    )


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def test_the_teacher_in_the_loop_sees_what_the_cache_holds(ffcv: None, tmp_path: Path) -> None:
    """Through FFCV's path too: losses agree to fp16 rounding of the targets."""
    steps = ("--steps", "6", "--batch-size", "8", "--cache", cache_of("ffcv"))
    fx.good(fx.train("maskalign", tmp_path / "cached", *steps))
    fx.good(fx.train("maskalign", tmp_path / "online", *steps, "--teacher", "online"))
    np.testing.assert_allclose(
        fx.losses(tmp_path / "cached"), fx.losses(tmp_path / "online"), rtol=2e-3
    )


def test_fresh_views_through_ffcv(ffcv: None, tmp_path: Path) -> None:
    """No cache: the policy's filter becomes the decoder's, and the run says which path it took."""
    given = (
        "--images",
        packed(),
        "--teacher",
        "online",
        "--decoder",
        "ffcv",
        "--policy",
        fx.policy_file(),
    )
    fx.good(fx.train("mae", tmp_path / "run", *given, "--steps", "2", "--batch-size", "8"))
    about = json.loads((tmp_path / "run" / "config.json").read_text())["targets"]
    assert (about["policy"]["filter"], about["pixel_path"]["decoder"]) == ("area", "ffcv")


def test_a_search_finds_the_cache_of_the_path_that_is_asked_for(ffcv: None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("beton", "ffcv"):
        copy_tree(cache_of(name), home / name)
    settings = ("--epochs", "1", "--batch-size", "8", "--images", packed(), "--dry-run", "--json")
    teacher = (
        f"teacher={fx.TEACHER}",
        "teacher_depth=4",
        "teacher_width=24",
        f"img_size={fx.SIZE}",
        "patch_size=8",
    )
    for name, options in (("beton", ()), ("ffcv", ("--decoder", "ffcv"))):
        ran = fx.good(
            fx.train("maskalign", tmp_path / "run", *settings, *options, home=home, sets=teacher)
        )
        assert ran.json["targets"] == f"cache {manifest.read(home / name)['id']}"


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("pictures", "options", "words"),
    [
        (
            packed,
            ("--decoder", "ffcv", "--filter", "bicubic"),
            "filter bicubic: --decoder ffcv resizes by area",
        ),
        (
            packed,
            ("--filter", "area"),
            "filter area: --decoder pillow resizes by bicubic, bilinear or lanczos",
        ),
        (tars, ("--decoder", "ffcv"), "--decoder ffcv decodes what FFCV wrote, a .beton"),
        (packed, ("--decoder", "turbo"), "'turbo'"),
    ],
)
def test_what_extraction_refuses(
    ffcv: None, pictures: Callable[[], Path], options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    ran = fx.feat(
        "extract",
        "--teacher",
        fx.TEACHER,
        "--levels",
        "all",
        "--images",
        str(pictures()),
        "--out",
        str(out),
        *options,
    )
    assert ran.status == 2
    assert words in ran.line
    assert not out.exists()


def test_a_tokenizer_resizes_by_its_own_filter(ffcv: None, tmp_path: Path) -> None:
    ran = fx.feat(
        "extract", "--teacher", "dvae", "--weights", "random:0", "--images", str(packed()),
        "--decoder", "ffcv", "--out", str(tmp_path / "cache"), "--dry-run",
    )  # fmt: skip
    assert ran.status == 2
    assert "filter lanczos: --decoder ffcv resizes by area" in ran.line


def test_a_decoder_for_pixels_that_are_stored(ffcv: None, tmp_path: Path) -> None:
    ran = train(cache_of("stored"), tmp_path / "run", "--decoder", "pillow")
    assert ran.status == 2
    assert "--decoder pillow is about decoding pictures, and the cache stores pixels" in ran.line


def test_a_check_of_the_teacher_looks_at_whole_pictures(ffcv: None, tmp_path: Path) -> None:
    """Its own views are Pillow's, whatever the path of the cache."""
    ran = fx.feat(
        "extract", "--teacher", fx.TEACHER, "--images", str(packed()), "--decoder", "ffcv",
        "--size", str(fx.SIZE), "--levels", "all", "--check-teacher", str(packed()), "--out",
        str(tmp_path / "cache"), "--dry-run",
    )  # fmt: skip
    assert "check of synthetic" in ran.err


def test_a_dataset_of_a_users_own_trainer_takes_the_caches_path(ffcv: None) -> None:
    data = Dataset(packed(), cache_of("ffcv"), check_pixels=1.0)
    here = [data[i]["pixels"] for i in range(len(data))]
    assert len(here) == fx.PICTURES
    # in another process the stages are compiled there
    batches = list(DataLoader(data, 8, num_workers=1))
    assert torch.equal(torch.cat([batch["pixels"] for batch in batches]), torch.stack(here))
    with pytest.raises(IdentityError, match="decoder is 'ffcv' there, 'pillow' here"):
        Dataset(tars(), cache_of("ffcv"))
    with pytest.raises(IdentityError, match="decoder is 'pillow' there, 'ffcv' here"):
        Dataset(pixel_path.open_with_decoder(packed(), "ffcv"), cache_of("tar"))
