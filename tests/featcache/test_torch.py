"""The PyTorch dataset: samples against the cache read by hand, workers of both kinds, epochs, and
what is refused."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from featcache.errors import IdentityError, UsageError, UserError
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from featcache.reading.tensors import to_image_order
from featcache.torch import Dataset
from tests import student_fixtures as fx

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch.py"


def by_hand(key: str, view: int) -> np.ndarray:
    """(3, S, S) of a stored view, with Pillow alone."""
    cache = fx.open_cache()
    stored = cache.read(cache.keys.find([key]), view, ("crop", "flip"))
    top, left, height, width = stored["crop"][0].tolist()
    with Image.open(fx.pictures() / f"{key}.png") as picture:
        crop = picture.convert("RGB").crop((left, top, left + width, top + height))
    pixels = np.asarray(crop.resize((fx.SIZE, fx.SIZE), Image.Resampling.BICUBIC))
    return (pixels[:, ::-1] if stored["flip"][0] else pixels).transpose(2, 0, 1)


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_is_a_picture_and_what_is_stored_of_its_view() -> None:
    data = Dataset(
        fx.pictures(),
        fx.cache_path(),
        fields=("features", "attention", "pixel_hash"),
        epoch=4,
    )
    cache = fx.open_cache()
    assert len(data) == fx.PICTURES
    for index in (0, 7, 23, -1):
        sample = data[index]
        names = ["attention", "features", "index", "key", "pixel_hash", "pixels", "row", "view"]
        assert sorted(sample) == names
        key, view = sample["key"], sample["view"]
        assert key == f"p{index % fx.PICTURES:02d}"
        assert (sample["index"], sample["row"]) == (index % 24, cache.keys.find([key])[0])
        np.testing.assert_array_equal(sample["pixels"], by_hand(key, view))
        stored = cache.read([sample["row"]], view, ("features", "attention", "pixel_hash"))
        assert sample["features"].dtype == torch.float32
        np.testing.assert_array_equal(sample["features"], stored["features"][0].astype(np.float32))
        np.testing.assert_array_equal(sample["attention"], stored["attention"][0])
        assert int(sample["pixel_hash"]) % 2**64 == int(stored["pixel_hash"][0])
    with pytest.raises(IndexError):
        data[24]


def test_levels_and_tokens_are_chosen() -> None:
    data = Dataset(fx.pictures(), fx.cache_path(), levels=[4, 2], tokens=3, return_key=False)
    sample = data[5]
    assert "key" not in sample
    stored = fx.open_cache().read([5], sample["view"], levels=[4, 2])["features"][0, :, :3]
    np.testing.assert_array_equal(sample["features"], stored.astype(np.float32))


def test_over_the_epochs_each_picture_shows_each_view_once() -> None:
    data = Dataset(fx.pictures(), fx.cache_path(), fields=())
    shown = []
    for epoch in range(fx.VIEWS):
        data.set_epoch(epoch)
        assert data.epoch == epoch
        shown.append([sample["view"] for sample in data.__getitems__(range(24))])
    assert np.sort(np.array(shown), axis=0).T.tolist() == [[0, 1, 2]] * 24


def test_a_batch_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset(fx.pictures(), fx.cache_path(), check_pixels=0)
    reads: list[int] = []
    whole = Cache.read

    def watch(self: Cache, rows: Any, *args: Any, **others: Any) -> Any:
        reads.append(len(rows))
        return whole(self, rows, *args, **others)

    monkeypatch.setattr(Cache, "read", watch)
    (batch,) = DataLoader(data, batch_size=24)
    assert reads == [24]
    assert batch["features"].shape == (24, 3, 17, 24)


def test_a_transform_sees_the_pixels() -> None:
    plain, changed = (
        Dataset(fx.pictures(), fx.cache_path(), transform=transform)
        for transform in (None, lambda x: x.float() / 255)
    )
    torch.testing.assert_close(
        changed[3]["pixels"], plain[3]["pixels"].float() / 255, rtol=0, atol=0
    )


# --- other layouts --------------------------------------------------------------------------------


def test_raster_by_hand() -> None:
    """Two of three patches were read, ranked 2, 0, 1: they go to patches 2 and 0, and patch 1 is
    not a number."""
    features = torch.tensor([[[[1.0], [5.0], [7.0]]]])
    out = to_image_order(features, torch.tensor([[2, 0, 1]], dtype=torch.uint8)).flatten().tolist()
    assert out[:2] + out[3:] == [1, 7, 5]
    assert np.isnan(out[2])


def test_a_ranked_cache_and_its_stored_pixels_give_the_same_samples() -> None:
    plain = Dataset(fx.pictures(), fx.cache_path())
    ranked = Dataset(None, fx.ranked_path(), check_pixels=1)
    kept = Dataset(fx.pictures(), fx.kept_path())
    for a, b, c in zip(
        *(each.__getitems__(range(24)) for each in (plain, ranked, kept)), strict=True
    ):
        assert (a["key"], a["view"]) == (b["key"], b["view"]) == (c["key"], c["view"])
        assert torch.equal(a["pixels"], b["pixels"])
        assert torch.equal(a["features"], b["features"])
        there = ~c["features"].isnan().any(-1).any(0)
        assert there.sum() == 6
        assert torch.equal(a["features"][:, there], c["features"][:, there])


def test_features_as_stored_and_decoded_by_the_batch() -> None:
    for cache in (fx.cache_path(), fx.kept_path()):
        ready, stored = (Dataset(fx.pictures(), cache, decode=decode) for decode in (True, False))
        (whole,), (raw,) = (list(DataLoader(each, 24)) for each in (ready, stored))
        assert raw["features"].dtype == torch.float16
        decoded = stored.decode(raw)
        torch.testing.assert_close(
            decoded["features"], whole["features"], rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(decoded["pixels"], whole["pixels"])


def test_features_of_a_second_teacher(tmp_path: Path) -> None:
    """Added to a cache, they are read by its name, decoded and put in image order by its own
    rules."""
    other = fx.TEACHER.replace("width=24", "width=16")
    path = Path(shutil.copytree(fx.cache_path(), tmp_path / "c"))
    fx.extract(fx.pictures(), path, "--add", "--tokens", "ranked", teacher=other)
    alone = fx.extract(fx.pictures(), tmp_path / "alone", teacher=other)
    name = f"{other}/features"
    both = Dataset(fx.pictures(), path, fields=("features", name), levels=[3, 4])
    mine, theirs = (
        Dataset(fx.pictures(), cache, levels=[3, 4]) for cache in (fx.cache_path(), alone)
    )
    for index in (0, 11):
        sample = both[index]
        assert torch.equal(sample["features"], mine[index]["features"])
        assert torch.equal(sample[name], theirs[index]["features"])


# --- workers --------------------------------------------------------------------------------------


def batches(loader: Any) -> Iterator[tuple[list[str], list[int], float]]:
    for batch in loader:
        yield (
            batch["key"],
            batch["view"].tolist(),
            float(batch["features"].double().sum() + batch["pixels"].sum()),
        )


@pytest.mark.slow_after(2)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("start", "workers"), [(None, 0), ("fork", 2), ("spawn", 1)])
def test_workers_give_what_this_process_gives(start: str | None, workers: int) -> None:
    """Also after this process has read; and what `set_epoch` says reaches workers that live on."""
    data = Dataset(fx.pictures(), fx.cache_path())
    reference = Dataset(fx.pictures(), fx.cache_path())
    loader = DataLoader(
        data,
        8,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=workers > 0,
        timeout=60 * workers,
    )
    assert data[0]["key"] == "p00"
    seen = []
    for epoch in (0, 1, 5):
        data.set_epoch(epoch)
        reference.set_epoch(epoch)
        seen.append(list(batches(loader)))
        assert seen[-1] == list(batches(DataLoader(reference, 8)))
    assert len({str(each) for each in seen}) == 3  # the views took turns
    del loader


# --- what is skipped and refused ------------------------------------------------------------------


def test_quarantined_pictures_are_skipped_and_strangers_refused(tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(fx.pictures(), tmp_path / "p"))
    (pictures / "bad.png").write_text("not a picture")
    cache = fx.extract(pictures, tmp_path / "c")
    data = Dataset(open_source(pictures), cache)
    assert (len(data), data.skipped) == (24, 1)
    assert [data[i]["key"] for i in (0, 23)] == ["p00", "p23"]
    shutil.copy(pictures / "p00.png", pictures / "zebra.png")
    with pytest.raises(IdentityError, match="'zebra'"):
        Dataset(pictures, cache)


def test_a_changed_picture_is_refused_unless_allowed(tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(fx.pictures(), tmp_path / "p"))
    with Image.open(pictures / "p07.png") as picture:
        pixels = np.asarray(picture).astype(int)
    Image.fromarray((pixels + np.where(pixels < 128, 2, -2)).astype(np.uint8)).save(
        pictures / "p07.png"
    )
    with pytest.raises(IdentityError, match=r"'p07'.*pixel_tolerance=LEVELS"):
        Dataset(pictures, fx.cache_path(), check_pixels=1, check_sample=False)[7]
    assert Dataset(pictures, fx.cache_path(), check_pixels=1, check_sample=False)[6]["key"] == "p06"
    assert Dataset(pictures, fx.cache_path(), check_pixels=1, pixel_tolerance=3)[7]["key"] == "p07"
    (pictures / "p05.png").write_text("not a picture")
    with pytest.raises(UserError, match="'p05'"):
        Dataset(pictures, fx.cache_path(), check_sample=False)[5]


def test_what_is_not_stored_is_told_at_once(tmp_path: Path) -> None:
    for options, message in (
        ({"fields": ("featurs",)}, "features"),
        ({"levels": [1]}, "level 1"),
        ({"tokens": 18}, "1 to 17"),
    ):
        with pytest.raises(UsageError, match=message):
            Dataset(fx.pictures(), fx.cache_path(), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stores no pixels"):
        Dataset(None, fx.cache_path())
    partial = fx.extract(fx.pictures(), tmp_path / "c", "--rows-per-shard", "12")
    (partial / "shards" / "000001.json").unlink()
    with pytest.raises(UserError, match="1 of 2 shards"):
        Dataset(fx.pictures(), partial)


# --- the example ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["decoded", "stored", "kept"])
def test_the_example_learns(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A loop of plain PyTorch: its loss falls by a third in a few epochs, from pictures, from
    stored pixels, and from a cache that keeps 5 of 16 patches."""
    torch.manual_seed(0)
    train = runpy.run_path(str(EXAMPLE))["train"]
    paths = {
        "decoded": fx.cache_path,
        "stored": fx.ranked_path,
        "kept": fx.kept_path,
    }
    given = (None if cache == "stored" else str(fx.pictures()), str(paths[cache]()))
    losses = train(*given, epochs=6, batch_size=8, workers=0)
    assert losses[-1] < 0.67 * losses[0]
    assert capsys.readouterr().out.startswith("epoch 0: loss ")


@pytest.mark.slow
def test_the_example_tells_a_mistake_in_a_line(tmp_path: Path) -> None:
    for args, message in (
        ((), "two arguments are needed"),
        (("p", str(tmp_path)), "error: no cache at"),
    ):
        ran = subprocess.run(
            [sys.executable, EXAMPLE, *args], env=fx.environment(), capture_output=True, text=True
        )
        assert ran.returncode == 1
        assert ran.stderr.startswith(message)
        assert "Traceback" not in ran.stderr


def test_the_three_ways_to_take_features_from_a_kept_cache() -> None:
    """As the docstring says: NaN where a patch is not stored; as stored, with the order, for
    `decode` on a device."""
    whole, kept = (
        Dataset(fx.pictures(), fx.cache_path()),
        Dataset(fx.pictures(), fx.kept_path()),
    )
    known = kept[3]["features"].isfinite().all(-1)
    assert known.sum(1).tolist() == [6, 6, 6]  # [CLS] and 5 of 16 patches, at each of 3 levels
    assert kept[3]["features"].isnan().any(-1).equal(~known)
    assert torch.equal(kept[3]["features"][known], whole[3]["features"][known])
    raw = Dataset(fx.pictures(), fx.kept_path(), decode=False)
    batch = next(iter(DataLoader(raw, 8)))
    assert (batch["features"].dtype, tuple(batch["features"].shape)) == (
        torch.float16,
        (8, 3, 6, 24),
    )
    decoded = raw.decode(batch)["features"]
    assert decoded.shape == (8, 3, 17, 24)
    assert torch.equal(decoded[3][known], whole[3]["features"][known])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"check_pixels": float("nan")}, "check_pixels=nan; a number from 0 to 1"),
        ({"check_pixels": -0.1}, "check_pixels=-0.1"),
        ({"check_pixels": "1"}, "check_pixels='1'"),
        ({"pixel_tolerance": float("nan")}, "pixel_tolerance=nan; a number from 0 to 255"),
        ({"epoch": -1}, "epoch -1; a whole number from 0"),
        ({"epoch": 1.5}, "epoch 1.5; a whole number from 0"),
        ({"fields": ["dino-b16/features"]}, "unknown teacher 'dino-b16'"),
    ],
    ids=str,
)
def test_what_would_switch_the_proof_off_is_refused(given: dict, message: str) -> None:
    """NaN compares with nothing: no picture would be checked, or every difference would pass."""
    with pytest.raises(UserError) as caught:
        Dataset(fx.pictures(), fx.cache_path(), **given)
    assert message in str(caught.value)
