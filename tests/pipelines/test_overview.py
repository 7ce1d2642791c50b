"""The overview picture: what it shows is what the cache holds, checked on a small cache and on
numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import featcache
from featcache import teachers
from featcache.errors import UserError
from featcache.extraction import extract
from featcache.extraction.plan import Plan
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.views.fingerprint import pixel_hash
from featcache.views.policy import Policy
from pipelines import overview
from tests.conftest import SYNTHETIC


@pytest.fixture(scope="module")
def cache(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Eleven pictures, five views of them: one more than is shown."""
    out = tmp_path_factory.mktemp("overview") / "cache"
    policy = Policy(size=28, jitter=0.4, seed=1)
    extract.run(
        Plan(
            source=open_source(photos),
            teacher=teachers.load(SYNTHETIC),
            policy=policy,
            views=5,
            levels=(2, 3),
        ),
        out,
    )
    return featcache.open(out)


def write_run(path: Path, parts: dict[str, float], steps: int = 90) -> Path:
    path.mkdir(parents=True)
    rows = [
        {"step": i + 1, **{name: value / (i + 1) for name, value in parts.items()}}
        for i in range(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_the_picture_is_drawn(cache: Cache, photos: Path, tmp_path: Path) -> None:
    runs = {
        "mae": write_run(tmp_path / "mae", {"loss": 2.0, "pixel": 2.0}),
        "mralign": write_run(tmp_path / "mralign", {"loss": 3.0, "align": 4.0, "pixel": 2.0}),
        "untrained": write_run(tmp_path / "untrained", {}, steps=0),
    }
    path = tmp_path / "deep/overview.png"
    overview.draw(open_source(photos), cache, ["photo0", "palette", "rgba"], runs, path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 1500
    assert pixels.std() > 20


def test_without_curves_and_with_one_sample(cache: Cache, photos: Path, tmp_path: Path) -> None:
    overview.draw(open_source(photos), cache, ["photo1"], {}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_samples_are_the_stored_views(cache: Cache, photos: Path) -> None:
    (sample,) = overview.samples(open_source(photos), cache, ["photo2"], 5)
    row = list(cache.keys).index("photo2")
    for number, view in enumerate(sample["views"]):
        stored = cache.read([row], view=number, fields=("pixel_hash", "attention"))
        assert pixel_hash(view["pixels"]) == stored["pixel_hash"][0]
        assert np.array_equal(view["attention"], stored["attention"][0])
    assert len(sample["views"]) == 5


def test_an_unknown_key_is_one_line(cache: Cache, photos: Path) -> None:
    with pytest.raises(UserError, match="'nobody' is not in both"):
        overview.samples(open_source(photos), cache, ["photo0", "nobody"], 1)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([1.0, 2.0, 3.0], 0, [1, 2, 3]),
        ([3.0, 0.0, 3.0, 6.0], 1, [1.5, 2, 3, 4.5]),
        ([1.0, 3.0], 9, [2, 2]),
    ],
)
def test_running_mean(values: list[float], width: int, expected: list[float]) -> None:
    assert overview.running_mean(np.array(values), width).tolist() == expected


@pytest.mark.slow
def test_the_command_draws_the_first_samples_and_refuses_another_suffix(
    cache: Cache, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "mae", {"loss": 2.0})
    (run / "config.json").write_text('{"recipe": "mae", "config": {}}')
    out = tmp_path / "a.png"
    words = [str(cache.path), str(out), "--run", str(run)]
    done = CliRunner().invoke(overview.command, words, catch_exceptions=False)
    assert done.output == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.width > 500
    refused = CliRunner().invoke(overview.command, [str(cache.path), str(tmp_path / "a.exe")])
    assert isinstance(refused.exception, UserError)
    assert ".png or .pdf" in str(refused.exception)
    words = [str(cache.path), str(tmp_path / "b.png"), "--run", str(tmp_path / "no run")]
    refused = CliRunner().invoke(overview.command, words)
    assert "no run at" in str(refused.exception)
    assert [path.name for path in tmp_path.glob("*.*")] == ["a.png"]
