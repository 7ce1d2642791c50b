"""The digits: the split, the pictures, and a small teacher that featcache loads as it was
trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from sklearn.utils import Bunch

from featcache import rng, teachers
from featcache.pictures.open_source import open_source
from pipelines import digits, small_teacher


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Bunch:
    """The first 120 digits as if they were all, 60 of them for training."""
    whole = sklearn.datasets.load_digits()
    cut = Bunch(images=whole.images[:120], target=whole.target[:120])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: cut)
    monkeypatch.setattr(digits, "TRAIN", 60)
    return cut


@pytest.mark.slow
def test_the_split_is_1400_to_397_of_different_digits(tmp_path: Path) -> None:
    digits.write_pictures(tmp_path, seed=0)
    train, test = (open_source(tmp_path / part) for part in ("train", "test"))
    assert (len(train), len(test)) == (1400, 397) == (digits.TRAIN, digits.TEST)
    numbers = [int(key.split("/")[1]) for source in (train, test) for key in source.keys]
    assert sorted(numbers) == list(range(1797))
    assert train.classes == test.classes == [str(label) for label in range(10)]


def test_a_picture_is_its_digit(few: Bunch, tmp_path: Path) -> None:
    digits.write_pictures(tmp_path, seed=3)
    source = open_source(tmp_path / "train")
    assert {int(key.split("/")[1]) for key in source.keys} == set(
        rng.permutation(120, 3, 0)[:60].tolist()
    )
    assert source.labels is not None
    for row, key in enumerate(source.keys):
        number = int(key.split("/")[1])
        assert source.labels[row] == few.target[number]
        with Image.open(tmp_path / "train" / f"{key}.png") as picture:
            assert (picture.mode, picture.size) == ("L", (32, 32))
            small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float64) * 16 / 255
        assert np.corrcoef(small.ravel(), few.images[number].ravel())[0, 1] > 0.97


def test_enlarge_maps_ink_to_white() -> None:
    assert np.asarray(digits.enlarge(np.full((8, 8), 16.0))).tolist() == [[255] * 32] * 32
    assert np.asarray(digits.enlarge(np.zeros((8, 8)))).tolist() == [[0] * 32] * 32
    # 127.5 rounds to even
    assert np.asarray(digits.enlarge(np.full((8, 8), 8.0))).tolist() == [[128] * 32] * 32


def test_teacher_and_student_of_one_seed_start_apart() -> None:
    assert digits.start_of(0) == "random:1000"
    assert digits.start_of(7) == "random:1007"


@pytest.mark.slow
def test_training_is_repeatable_and_draws_from_no_global_generator(
    few: Bunch, tmp_path: Path
) -> None:
    digits.write_pictures(tmp_path, seed=0)
    source = open_source(tmp_path / "train")
    before = torch.get_rng_state()
    one, two, other = (digits.train_teacher(source, seed=seed, epochs=2) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_training_learns(tmp_path: Path) -> None:
    digits.write_pictures(tmp_path, seed=0)
    train, test = (open_source(tmp_path / part) for part in ("train", "test"))
    kind = digits.teacher(depth=2)
    vit = small_teacher.train(kind, train, seed=0, epochs=3, batch_size=16, lr=1e-3)
    assert small_teacher.accuracy(kind, vit, test) > 20  # a guess is right for 10 in 100


@pytest.mark.slow
def test_the_command_leaves_shards_and_a_teacher_that_featcache_loads(
    few: Bunch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["digits", str(tmp_path / "out"), "--epochs", "2"])
    digits.main()
    assert "60 training and 60 held-out digits" in capsys.readouterr().out
    train = open_source(str(tmp_path / "out/data/train-*.tar"))
    test = open_source(str(tmp_path / "out/data/test-*.tar"))
    assert (len(train), len(test)) == (60, 60)
    facts = json.loads((tmp_path / "out/teacher.json").read_text())
    assert facts["spec"] == digits.SPEC

    loaded = teachers.load(facts["spec"], str(tmp_path / "out/teacher.safetensors"))
    assert (loaded.input_px, loaded.patches, loaded.width, loaded.depth) == (32, 64, 128, 6)
    vit = digits.train_teacher(train, seed=0, epochs=2)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8))
    (last,), _ = loaded(pixels, (6,))
    # the statistics by hand: timm's augreg models take (x / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = vit.forward_features((pixels.float() / 255 - 0.5) / 0.5)
    assert torch.allclose(vit.norm(last), expected, atol=1e-5)


def test_a_second_run_does_not_overwrite(
    few: Bunch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits.write_shards(tmp_path, seed=0)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["digits", str(tmp_path), "--epochs", "2"])
    with pytest.raises(SystemExit) as stop:
        digits.main()
    assert stop.value.code == 1
    assert "holds 1 shard already" in capsys.readouterr().err
