"""Rows are added to a cache from the pictures that its rows are of, and from no others under their
names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache import teachers
from featcache.errors import IdentityError
from featcache.extraction import extend, extract, picture_check
from featcache.maintenance import repair
from featcache.pictures.open_source import open_source
from featcache.storage.store import STORES
from tests.conftest import SYNTHETIC, files_below, make_plan

OTHER = "synthetic:levels=2,tokens=4,width=8,size=28"


def noise(folder: Path, count: int = 20, seed: int = 0) -> Path:
    """Pictures of one size, so that their boxes are those of any others under the same names."""
    draw = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        coarse = draw.integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((40, 40)).save(folder / f"p{i:02d}.png")
    return folder


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    return noise(tmp_path / "these"), noise(tmp_path / "others", seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_a_teacher_is_added_from_the_same_pictures_alone(
    both: tuple[Path, Path], tmp_path: Path, store: str
) -> None:
    these, others = both
    extract.run(make_plan(these, store=store, views=2), tmp_path / "c", batch_size=4)
    before = files_below(tmp_path / "c")
    for wanted in (
        make_plan(others, OTHER, store=store, views=2),
        make_plan(others, SYNTHETIC, store=store, views=3),
        make_plan(others, SYNTHETIC, store=store, views=2, levels=(2,)),
    ):
        part = extend.plan_part(wanted, tmp_path / "c")
        assert part is not None
        with pytest.raises(IdentityError, match=r"view \d: .* another picture.*--images SRC"):
            extract.run(*part, batch_size=4)
        shutil.rmtree(tmp_path / "c/parts")
        assert files_below(tmp_path / "c") == before
    part = extend.plan_part(make_plan(these, OTHER, store=store, views=2), tmp_path / "c")
    assert part is not None
    extract.run(*part, batch_size=4)


def test_a_cache_is_finished_from_the_same_pictures_alone(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    these, others = both
    extract.run_jobs(
        [extend.ExtractJob(make_plan(these), tmp_path / "c")], batch_size=4, share=(0, 2)
    )
    with pytest.raises(IdentityError, match="another picture"):
        extract.run(make_plan(others), tmp_path / "c", batch_size=4)
    extract.run(make_plan(these), tmp_path / "c", batch_size=4)
    extract.run(make_plan(others), tmp_path / "c", batch_size=4)  # nothing is missing, none is read


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_a_shard_is_repaired_from_the_same_pictures_alone(
    both: tuple[Path, Path], tmp_path: Path, store: str
) -> None:
    these, others = both
    extract.run(make_plan(these, store=store), tmp_path / "c", batch_size=4)
    before = files_below(tmp_path / "c")
    victim = max(
        (path for path in (tmp_path / "c/shards").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[:-1])

    def load(folder: Path) -> repair.Load:
        return lambda about: (open_source(folder), teachers.load(SYNTHETIC))

    with pytest.raises(IdentityError, match="another picture"):
        repair.run(tmp_path / "c", load(others))
    repair.run(tmp_path / "c", load(these))
    assert files_below(tmp_path / "c") == before


def test_pictures_that_can_no_longer_be_decoded_keep_their_rows(
    both: tuple[Path, Path], tmp_path: Path
) -> None:
    these, _ = both
    extract.run_jobs(
        [extend.ExtractJob(make_plan(these), tmp_path / "c")], batch_size=4, share=(0, 2)
    )
    (these / "p00.png").write_bytes(b"no picture any more")
    extract.run(make_plan(these), tmp_path / "c", batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [(40, 40), (40, 41)])
def test_one_other_picture_of_many_is_found_as_a_teacher_is_added(
    both: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: str,
    size: tuple[int, int],
) -> None:
    """Which the sample may miss; new views show it by its size alone."""
    monkeypatch.setattr(picture_check, "check_same_pictures", lambda *args, **more: None)
    monkeypatch.setattr(extract, "check_same_pictures", lambda *args, **more: None)
    these, others = both
    extract.run(make_plan(these, store=store, views=2), tmp_path / "c", batch_size=4)
    with Image.open(others / "p13.png") as picture:
        picture.resize(size).save(these / "p13.png")
    wanted = [make_plan(these, OTHER, store=store, views=2)]
    if size != (40, 40):
        wanted += [make_plan(these, SYNTHETIC, store=store, views=3)]
    for each in wanted:
        part = extend.plan_part(each, tmp_path / "c")
        assert part is not None
        with pytest.raises(IdentityError, match=r"'p13': .* likely another picture under this key"):
            extract.run(*part, batch_size=4)
        assert not (part.out / "shards/000002.json").exists()
        shutil.rmtree(tmp_path / "c/parts")
