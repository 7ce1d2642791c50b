"""A teacher that a cache or a --config file records is code, a file or an address only where the
command line names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from featcache import teachers
from featcache.errors import UserError
from featcache.storage import json_file, manifest
from featcache.storage.store import record_path
from tests import student_fixtures as fixtures
from tests.conftest import flip
from tests.student_fixtures import feat, good, train

OWN = """
from pathlib import Path
from featcache.teachers import synthetic
Path(__file__).with_suffix(".ran").touch()
def load(name, options, weights):
    sizes = {"levels": 4, "tokens": 16, "width": 24, "size": 32}
    return synthetic.load("synthetic", sizes, weights)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The user's file, and a cache that was made with it, beside each other."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    fixtures.extract(
        fixtures.pictures(), tmp_path / "cache", "--rows-per-shard", "8", teacher=str(file)
    )
    file.with_suffix(".ran").unlink()
    return file


@pytest.fixture
def cache(own: Path) -> Path:
    return own.with_name("cache")


def has_run(own: Path) -> bool:
    return own.with_suffix(".ran").exists()


@pytest.mark.parametrize(
    "spec",
    [
        "x.py", "./x.py", "x.py,option=1", "/tmp/x.py", "a/b/x.PY", "x.py:a=1", "open_clip:c.json",
        "open_clip:local-dir:x", "open_clip:hf-hub:a/b", "timm:hf-hub:a/b", "timm:local-dir:x",
        "timm:hf-hub:a/b,depth=2", "https://example.org/x", "open_clip:../x", "s3://a/b", "timm:",
        "open_clip:/etc/x", "timm:x/y/z", "", "clip-b16\n", "timm:file:x",
    ],
)  # fmt: skip
def test_a_spec_of_code_a_file_or_an_address_is_not_registered(spec: str) -> None:
    assert not teachers.is_registered(spec)
    with pytest.raises(UserError, match="only from your own command line"):
        teachers.recorded_spec(spec, [], "cache 'c'", "--teacher")
    assert teachers.recorded_spec(spec, [spec], "cache 'c'", "--teacher") == spec


@pytest.mark.parametrize("spec", [*teachers.model_cards(), "timm:vit_tiny_patch16_224,depth=2"])
def test_every_registered_teacher_is_loaded_as_recorded(spec: str) -> None:
    assert teachers.recorded_spec(spec, ["./other.py"], "cache 'c'", "--teacher") == spec


def test_several_named_teachers_must_name_the_recorded_one() -> None:
    with pytest.raises(UserError, match="only from your own"):
        teachers.recorded_spec("x.py", ["a.py", "b.py"], "cache 'c'", "--teacher")


def test_recompute_runs_an_own_teacher_only_where_it_is_named(own: Path, cache: Path) -> None:
    refused = feat("verify", str(cache), "--recompute", "2")
    assert refused.status == 1
    assert "--teacher SPEC" in refused.line
    assert not has_run(own)
    good(feat("verify", str(cache), "--recompute", "2", "--teacher", str(own)))
    assert has_run(own)


def test_repair_runs_an_own_teacher_only_where_it_is_named(own: Path, cache: Path) -> None:
    damaged = next((cache / "shards/000001.zarr/features").glob("c*"))
    whole = damaged.read_bytes()
    flip(damaged, 100)
    refused = feat("repair", str(cache))
    assert refused.status == 1
    assert "--teacher SPEC" in refused.line
    assert not has_run(own)
    moved = own.with_name("moved.py")
    shutil.copy(own, moved)
    good(feat("repair", str(cache), "--teacher", str(moved)))
    assert damaged.read_bytes() == whole
    good(feat("verify", str(cache)))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("how", [("--teacher", "online"), ("--fallback", "online")])
def test_training_runs_a_caches_own_teacher_only_where_it_is_named(
    own: Path, cache: Path, how: tuple[str, str]
) -> None:
    if how[0] == "--fallback":
        record_path(cache, manifest.read(cache)["shards"][2]["name"]).unlink()
    options = ("--cache", cache, "--steps", "1", "--batch-size", "4", *how)
    if how[0] == "--fallback":
        options += ("--fallback-limit", "1")
    out = own.with_name("run")
    refused = train("maskalign", out, *options)
    assert refused.status == 1
    assert "--teacher-name SPEC" in refused.line
    assert not has_run(own)
    assert not out.exists()
    good(train("maskalign", out, *options, sets=(f"teacher={own}",)))
    assert has_run(own)
    moved = own.with_name("moved.py")
    shutil.copy(own, moved)
    good(train("maskalign", own.with_name("again"), *options, "--teacher-name", moved))


def test_a_teacher_of_a_config_file_is_not_run(own: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"recipe": "x", "steps": 1, "config": {"teacher": str(own)}}))
    options = ("--images", fixtures.pictures(), "--teacher", "online", "--policy",
               fixtures.policy_file(), "--steps", "1", "--config", config)  # fmt: skip
    refused = train("maskalign", tmp_path / "run", *options)
    assert refused.status == 1
    assert "--config" in refused.line
    assert not has_run(own)
    good(train("maskalign", tmp_path / "run", *options, "--teacher-name", own))


@pytest.mark.slow
def test_commands_that_only_look_run_no_teacher(own: Path, cache: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    cache.rename(home / "cache")
    cache = home / "cache"
    feat("info", str(cache), home=home)
    feat("ls", home=home)
    feat("gc", home=home)
    feat("copy", str(cache), str(tmp_path / "copy"), home=home)
    feat("convert", str(cache), str(tmp_path / "tars"), "--store", "webdataset", home=home)
    train("maskalign", tmp_path / "run", "--cache", cache, "--steps", "1")
    assert not has_run(own)


def test_a_forged_name_is_refused_in_one_line(tmp_path: Path) -> None:
    cache = Path(shutil.copytree(fixtures.cache_path(), tmp_path / "cache"))
    about = json_file.read_json(cache / manifest.NAME)
    about["identity"]["teacher"]["name"] = "open_clip:local-dir:/somewhere"
    about["id"] = json_file.digest(about["identity"])[:16]
    for path in (cache / manifest.NAME, cache / "shards" / manifest.COPY):
        json_file.write_json(path, about)
    ran = feat("verify", str(cache), "--recompute", "1")
    assert ran.status == 1, ran
    assert "Traceback" not in ran.err
