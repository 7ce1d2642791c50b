"""Where a derived cache does not serve, its parent is named; whatever the parent is called, and
whatever has become of it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from featcache.extraction import extract
from featcache.maintenance.derive import derive
from featcache.maintenance.derive_plan import Wish
from featcache.reading.cache import Cache
from student.recipes import fd
from student.setup.remedy import extract_remedy
from tests import hostile_json as hostile
from tests.conftest import make_photos, make_plan


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Level 1 of a cache at home/parent, of which fd reads the last level."""
    root = tmp_path_factory.mktemp("remedy") / "all"
    plan = make_plan(make_photos(root / "pictures"))
    extract.run(plan, root / "home/parent", batch_size=16)
    derive(root / "home/parent", root / "one", Wish(levels=(1,)))
    return root


@pytest.fixture
def derived(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Return a copy whose parent is a copy, too."""
    root = Path(shutil.copytree(origin, tmp_path / "all"))
    monkeypatch.setenv("FEATCACHE_HOME", str(root / "home"))
    return Cache(root / "one")


def remedy_of(cache: Cache) -> str:
    config = fd.Config(teacher_depth=3, img_size=28, patch_size=14)
    return extract_remedy(fd.needs(config), config, cache)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", ["parent", "a b", "a'b", "$(x)`x`\"'", "-x"])
def test_a_parent_that_serves_is_named_for_a_shell(derived: Cache, name: str) -> None:
    parent = derived.path.parent / "home/parent"
    path = parent.rename(parent.with_name(name))
    line = remedy_of(derived)
    assert line.startswith("the cache that it was derived from serves: --cache ")
    words = shlex.split(line.partition("serves: ")[2].rpartition(", or")[0])
    assert words == ["--cache", str(path)]


def test_a_parent_that_cannot_be_read_is_told_as_such(derived: Cache) -> None:
    shutil.rmtree(derived.path.parent / "home/parent/shards/000001.zarr")
    line = remedy_of(derived)
    assert line.startswith("the cache that it was derived from cannot be read: cache file ")


@pytest.mark.parametrize("recorded", ["", "-x", "x\n", "~root", "/a\0b"])
def test_a_parent_that_is_nowhere_is_named_by_its_id(derived: Cache, recorded: str) -> None:
    shutil.rmtree(derived.path.parent / "home/parent")
    about = hostile.read(derived.path / "manifest.json")
    about["provenance"]["derived_from"] = recorded
    hostile.make_valid(derived.path, about)
    line = remedy_of(Cache(derived.path))
    assert f"derived from cache {about['identity']['parent']}, which is not below" in line
