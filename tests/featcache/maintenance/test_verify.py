"""`featcache verify`: any flipped bit in any file is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from featcache import teachers
from featcache.errors import UserError
from featcache.extraction import extract, plan
from featcache.maintenance import verify
from featcache.pictures.open_source import open_source
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, files_below, make_photos


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


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache"))


def test_a_sound_cache_has_no_problems(sound: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify.verify_cache(sound, lambda done, total: seen.append((done, total))) == ([], 2)
    assert seen == [(1, 2), (2, 2)]


def told(cache: Path) -> str:
    """All that verify says of a cache, whether it raises at once or lists."""
    try:
        return "\n".join(verify.verify_cache(cache)[0])
    except UserError as error:
        return str(error)


def test_a_flipped_bit_in_any_file_is_named(copy: Path) -> None:
    """Manifest, teacher's tail, quarantine report, records, metadata, chunks: first, middle and
    last byte."""
    names = sorted(files_below(copy))
    assert {"manifest.json", "quarantine.json", "shards/000000.json"} <= set(names)
    silent = []
    for name in names:
        path = copy / name
        data = path.read_bytes()
        for at in sorted({0, len(data) // 2, len(data) - 3}):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            if path.name not in told(copy):
                silent.append((name, at))
        path.write_bytes(data)
    assert silent == []
    assert verify.verify_cache(copy)[0] == []


def test_missing_and_cut_files_are_named(copy: Path) -> None:
    chunk = copy / "shards/000001.zarr/features/c.0.1.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    (copy / "shards/000000.zarr/crop/zarr.json").unlink()
    next(copy.glob("*.safetensors")).unlink()
    problems, shards = verify.verify_cache(copy)
    assert shards == 2
    assert len(problems) == 3
    assert ".safetensors: missing" in problems[0]
    assert "000000.zarr/crop/zarr.json: missing" in problems[1]
    assert "features/c.0.1.0.0.0" in problems[2]
    assert "recorded" in problems[2]


def test_unfinished_shards_are_told(copy: Path) -> None:
    (copy / "shards/000001.json").unlink()
    problems, _ = verify.verify_cache(copy)
    assert len(problems) == 1
    assert "000001.json: missing" in problems[0]
