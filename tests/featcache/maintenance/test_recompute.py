"""`featcache verify --recompute`: a sample of rows is compared with pictures and teacher, which are
told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

import featcache
from featcache import teachers
from featcache.errors import IdentityError
from featcache.extraction import extract, plan
from featcache.maintenance import recompute, verify
from featcache.pictures.open_source import open_source
from featcache.storage import json_file
from featcache.storage.store import STORES
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, make_photos, waves

VIT = "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=16,depth=2,num_heads=2"


def make(
    folder: Path, out: Path, teacher: str = SYNTHETIC, weights: str | None = None, **options: object
) -> Path:
    loaded, policy = teachers.load(teacher, weights), Policy(size=28)
    made = plan.Plan(
        source=open_source(folder),
        teacher=loaded,
        policy=policy,
        views=2,
        levels=(1, 2),
        rows_per_shard=6,
        **options,
    )
    extract.run(made, out, batch_size=4)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_photos(tmp_path_factory.mktemp("verify") / "pictures")
    (root / "bad.jpg").write_text("nothing")
    return root


@pytest.fixture(scope="module")
def sound(pictures: Path) -> Path:
    return make(pictures, pictures.parent / "sound")


@pytest.fixture(scope="module")
def vit(pictures: Path) -> Path:
    return make(pictures, pictures.parent / "vit", VIT, "random:0")


def ask(
    cache: Path, pictures: Path, count: int = 100, weights: str | None = None, seed: int = 0
) -> dict:
    with featcache.open(cache) as opened:
        return recompute.recompute(opened, open_source(pictures), weights, count, seed, "cpu")


@pytest.mark.parametrize("name", ["sound", "vit"])
def test_a_clean_sample(request: pytest.FixtureRequest, pictures: Path, name: str) -> None:
    found = ask(request.getfixturevalue(name), pictures)
    assert found["rows"] == 11
    assert found["problems"] == []
    assert found["feature_error"] < 1e-3
    assert found["attention_error"] < 1e-5
    assert found["bad_rows_below"] == pytest.approx(1 - 0.05 ** (1 / 11))  # (1 - p)^11 = 5 %
    fewer = ask(request.getfixturevalue(name), pictures, 3)
    assert fewer["rows"] == 3
    assert fewer["bad_rows_below"] == pytest.approx(0.6316, abs=1e-3)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    "options", [{"tokens": "ranked"}, {"tokens": "ranked", "keep": 2, "pixels": True}], ids=str
)
@pytest.mark.parametrize("teacher", [SYNTHETIC, VIT])
def test_a_clean_sample_of_ranked_tokens(
    pictures: Path, tmp_path: Path, teacher: str, options: dict, store: str
) -> None:
    """The teacher gives image order; the stored order decides what a stored token is."""
    weights = "random:0" if teacher == VIT else None
    cache = make(pictures, tmp_path / "c", teacher, weights, store=store, **options)
    found = ask(cache, pictures)
    assert (found["rows"], found["problems"]) == (11, [])
    assert found["feature_error"] < 1e-3


def test_a_changed_picture_is_found_with_size_and_cause(
    sound: Path, pictures: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(pictures, tmp_path / "changed"))
    Image.fromarray(255 - waves(50, 60, 3.0)).save(changed / "rgb.png")
    found = ask(sound, changed)
    assert found["problems"]
    assert all("'rgb'" in problem for problem in found["problems"])
    assert "another picture under this key" in found["problems"][0]
    assert found["bad_rows_below"] is None


def test_another_decoders_levels_are_told_from_another_picture(
    sound: Path, pictures: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(pictures, tmp_path / "changed"))
    Image.fromarray(np.clip(waves(50, 60, 3.0).astype(int) + 1, 0, 255).astype(np.uint8)).save(
        changed / "rgb.png"
    )
    found = ask(sound, changed)
    assert "another decoder" in found["problems"][0]
    assert "differ by 1.0 levels" in found["problems"][0]


def test_another_version_of_pillow_is_named(
    sound: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next user can install it: the cache is as good as before."""
    changed = Path(shutil.copytree(pictures, tmp_path / "changed"))
    Image.fromarray(np.clip(waves(50, 60, 3.0).astype(int) + 1, 0, 255).astype(np.uint8)).save(
        changed / "rgb.png"
    )
    extracted = PIL.__version__
    monkeypatch.setattr(PIL, "__version__", "99.1.0")
    assert ask(sound, changed)["problems"][0].endswith(
        f"likely Pillow's version, {extracted} there and 99.1.0 here (pip install "
        f"pillow=={extracted}), or another file"
    )


def test_a_missing_picture_is_a_problem(sound: Path, pictures: Path, tmp_path: Path) -> None:
    fewer = Path(shutil.copytree(pictures, tmp_path / "fewer"))
    (fewer / "rgb.png").unlink()
    found = ask(sound, fewer)
    assert len(found["problems"]) == 1
    assert "'rgb' is not in" in found["problems"][0]


def test_a_picture_that_no_longer_decodes_is_a_problem_not_a_traceback(
    sound: Path, pictures: Path, tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(pictures, tmp_path / "cut"))
    path = cut / "photo0.jpg"
    path.write_bytes(path.read_bytes()[:400])
    found = ask(sound, cut)
    assert len(found["problems"]) == 1
    assert "'photo0'" in found["problems"][0]


def test_changed_features_are_found_even_with_good_checksums(
    pictures: Path, sound: Path, tmp_path: Path
) -> None:
    """Rows of another teacher under this cache's name: every byte is as recorded, the numbers are
    wrong."""
    other = make(pictures, tmp_path / "other", SYNTHETIC)
    path = other / "shards/000000.zarr"
    shutil.rmtree(path)
    (other / "shards/000000.json").unlink()
    loaded = teachers.load(SYNTHETIC)
    loaded.places[0] += 0.25
    made = plan.Plan(
        source=open_source(pictures),
        teacher=loaded,
        policy=Policy(size=28),
        views=2,
        levels=(1, 2),
        rows_per_shard=6,
    )
    extract.run(made, tmp_path / "wrong", batch_size=4)
    shutil.copytree(tmp_path / "wrong/shards/000000.zarr", path)
    record = json_file.read_json(tmp_path / "wrong/shards/000000.json")
    json_file.write_json(other / "shards/000000.json", record)
    assert [problem.split(": ")[1] for problem in verify.verify_cache(other)[0]] == [
        "is of a shard of another cache"
    ]
    del record["content"]
    json_file.write_json(other / "shards/000000.json", record)
    assert verify.verify_cache(other)[0] == []
    found = ask(other, pictures)
    assert len(found["problems"]) == 5  # the first shard's six less the one in quarantine
    assert "features differ by" in found["problems"][0]


def test_other_weights_are_refused(vit: Path, pictures: Path) -> None:
    with pytest.raises(
        IdentityError, match=r"'random:1' have hash \w+, the cache was made with \w+.*--weights"
    ):
        ask(vit, pictures, weights="random:1")


def test_the_sample_is_a_function_of_the_seed(
    vit: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[int, int]] = []
    original = recompute._recompute_row

    def noting(
        cache: object, source: object, at: object, teacher: object, row: int, view: int
    ) -> object:
        rows.append((row, view))
        return original(cache, source, at, teacher, row, view)

    monkeypatch.setattr(recompute, "_recompute_row", noting)
    for seed in (0, 0, 1):
        ask(vit, pictures, 4, seed=seed)
    first, again, other = rows[:4], rows[4:8], rows[8:]
    assert first == again != other
    assert len({row for row, _ in first}) == 4


# ---------------------------------------------------------------- the command's words

Command = Callable[..., Ran]


def other_pictures(pictures: Path, folder: Path) -> Path:
    """A picture of other colours under every key."""
    shutil.copytree(pictures, folder)
    for path in sorted(folder.glob("*.[pj]*g")):
        if path.name != "bad.jpg":
            with Image.open(path) as opened:
                size = opened.size
            Image.fromarray(255 - waves(*size[::-1], 9.0)).save(path)
    return folder


@pytest.mark.parametrize("how", ["other pixels", "other keys"])
def test_the_wrong_pictures_are_not_the_caches_fault(
    featcache_command: Command, sound: Path, pictures: Path, tmp_path: Path, how: str
) -> None:
    wrong = other_pictures(pictures, tmp_path / "wrong")
    if how == "other keys":
        for path in sorted(wrong.iterdir()):
            path.rename(path.with_name(f"x{path.name}"))
    ran = featcache_command("verify", sound, "--recompute", 11, "--images", wrong)
    assert ran.status == 1
    assert f"{str(wrong)!r} are not those that {sound} was extracted from" in ran.error
    assert "of 11 rows 11 have other pixels or no picture" in ran.error
    assert "--images" in ran.error
    assert "repair" not in ran.error
    assert "within" not in ran.out  # nothing was compared with the teacher
    facts = json.loads(
        featcache_command("verify", sound, "--recompute", 11, "--images", wrong, "--json").out
    )["recompute"]
    assert (facts["compared"], facts["feature_error"], facts["attention_error"]) == (0, None, None)


def test_one_other_picture_is_one_row(
    featcache_command: Command, sound: Path, pictures: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(pictures, tmp_path / "changed"))
    Image.fromarray(255 - waves(50, 60, 3.0)).save(changed / "rgb.png")
    ran = featcache_command("verify", sound, "--recompute", 11, "--images", changed)
    assert ran.status == 1
    assert "1 of 11 rows" in ran.error
    assert "'rgb'" in ran.error
    assert "repair" not in ran.error  # which would find nothing: every byte is as it was written
    assert "10 rows recomputed: features within" in ran.out


def test_rows_of_an_added_teacher_are_said_not_to_be_asked(
    featcache_command: Command, sound: Path, pictures: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(sound, tmp_path / "c"))
    assert (
        "were not recomputed"
        not in featcache_command("verify", cache, "--recompute", 2, "--images", pictures).out
    )
    options = (
        "--images",
        pictures,
        "--size",
        28,
        "--views",
        2,
        "--levels",
        "last:1",
        "--weights",
        "random:0",
    )
    assert (
        featcache_command("extract", "--teacher", VIT, *options, "--out", cache, "--add").status
        == 0
    )
    ran = featcache_command("verify", cache, "--recompute", 2, "--images", pictures)
    assert (ran.status, f"of {SYNTHETIC} only; rows of {VIT} were not recomputed" in ran.out) == (
        0,
        True,
    )


def test_all_rows_are_no_sample(featcache_command: Command, sound: Path, pictures: Path) -> None:
    some = featcache_command("verify", sound, "--recompute", 5, "--images", pictures).out
    assert "a clean sample of 5 rows" in some
    assert "a larger --recompute N" in some
    for count in (11, 500):
        every = featcache_command("verify", sound, "--recompute", count, "--images", pictures).out
        assert (
            "every row was recomputed, in one of its 2 views; another --seed takes others" in every
        )
        assert "larger" not in every
