"""The digits' tokenizer: its losses by hand, that it learns, and that featcache reads what it
wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featcache
from featcache import teachers
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from pipelines import digits, tokenizer
from tests import student_fixtures as fx


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits to learn from and 60 held out, as shards."""
    out = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        write_few(out, patch, train=60, test=60)
    return out


def write_few(out: Path, patch: pytest.MonkeyPatch, *, train: int, test: int) -> None:
    """The first digits of all, as shards."""
    import sklearn.datasets
    from sklearn.utils import Bunch

    whole = sklearn.datasets.load_digits()
    cut = Bunch(images=whole.images[: train + test], target=whole.target[: train + test])
    patch.setattr(sklearn.datasets, "load_digits", lambda: cut)
    patch.setattr(digits, "TRAIN", train)
    digits.write_shards(out, seed=0)


class Fixed(nn.Module):
    """Two words, two patches; the second word is e times as likely as the first at the left patch,
    and the reverse."""

    def logits(self, mapped: Tensor) -> Tensor:
        return torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]]).expand(len(mapped), -1, -1, -1)


class Constant(nn.Module):
    def forward(self, words: Tensor) -> Tensor:
        assert torch.allclose(words.sum(1), torch.ones(()))
        return torch.full((len(words), 1, 2, 4), 0.5)


def test_losses_by_hand() -> None:
    """Both words are used alike over the two patches: entropy log 2. White pixels are 0.9, a guess
    of 0.5 misses each by 0.4."""
    pixels = torch.full((3, 3, 2, 4), 255, dtype=torch.uint8)
    noise = torch.Generator().manual_seed(0)
    error, use = tokenizer.losses(Fixed(), Constant(), pixels, 0.5, noise)  # type: ignore[arg-type]
    assert error.item() == pytest.approx(0.16, rel=1e-5)
    assert use.item() == pytest.approx(math.log(2), rel=1e-5)


def test_words_are_drawn_in_proportion() -> None:
    """At a low temperature the relaxation is a draw: the likelier word wins e / (1 + e) of the
    time."""
    seen: list[Tensor] = []

    class Watch(Constant):
        def forward(self, words: Tensor) -> Tensor:
            seen.append(words)
            return super().forward(words)

    pixels = torch.zeros((20_000, 3, 2, 4), dtype=torch.uint8)
    tokenizer.losses(Fixed(), Watch(), pixels, 1e-3, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    second_left = seen[0][:, 1, 0, 0]
    assert ((second_left < 0.01) | (second_left > 0.99)).float().mean() > 0.99
    p = math.e / (1 + math.e)
    assert second_left.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


@pytest.mark.slow
def test_training_is_repeatable_and_draws_from_no_global_generator(few: Path) -> None:
    source = open_source(f"{few}/data/train-*.tar")
    before = torch.get_rng_state()
    (one, _), (two, _), (other, _) = (
        tokenizer.train(source, seed=seed, epochs=2) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.blocks.input.weight, other.blocks.input.weight)


def test_quality_by_hand(few: Path) -> None:
    """One word for everything and the mean colour: one word of perplexity 1, which explains
    nothing."""
    source = open_source(f"{few}/data/test-*.tar")

    class One(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.zeros(len(pixels), 64, dtype=torch.int64)

    class Mean(nn.Module):
        def forward(self, words: Tensor) -> Tensor:
            assert words.shape == (60, 64, 8, 8)
            return torch.full((60, 1, 64, 64), level)

    whole = [
        np.asarray(decode(source.read(row)).resize((64, 64), 1), np.float64) for row in range(60)
    ]
    level = 0.8 * float(np.mean(whole)) / 255 + 0.1
    found = tokenizer.quality(One(), Mean(), source)  # type: ignore[arg-type]
    assert (found["words"], found["perplexity"]) == (1, 1.0)
    assert found["explained"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.slow
def test_the_command_leaves_a_tokenizer_that_extract_adds(
    few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["tokenizer", str(few), "--epochs", "3"])
    tokenizer.main()
    assert "of 64 words in use on held-out digits" in capsys.readouterr().out
    facts = json.loads((few / "tokenizer.json").read_text())
    assert facts["spec"] == tokenizer.SPEC
    weights = str(few / "tokenizer.safetensors")

    out, teacher = tmp_path / "c", "synthetic:levels=1,tokens=64,width=8,size=32"
    shared = (
        "--images",
        f"{few}/data/train-*.tar",
        "--out",
        str(out),
        "--size",
        "32",
        "--views",
        "1",
    )
    fx.good(fx.feat("extract", "--teacher", teacher, *shared, "--levels", "1"))
    fx.good(fx.feat("extract", "--add", "--teacher", tokenizer.SPEC, "--weights", weights, *shared))
    with featcache.open(out) as cache:
        got = cache.read([0], fields=[tokenizer.FIELD, "crop", "flip"])
        key = cache.keys[0]
    source = open_source(f"{few}/data/train-*.tar")
    top, left, height, width = got["crop"][0].tolist()
    view = decode(source.read(list(source.keys).index(key))).crop(
        (left, top, left + width, top + height)
    )
    view = view.resize((64, 64), 1)  # Lanczos
    pixels = np.asarray(view.transpose(0) if got["flip"][0] else view)
    ids = teachers.load_tokenizer(tokenizer.SPEC, weights)(
        torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    )
    assert got[tokenizer.FIELD][0].tolist() == ids[0].tolist()


def test_digits_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tokenizer", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        tokenizer.main()
    assert stop.value.code == 1
    assert "write them first with `python -m pipelines.digits" in capsys.readouterr().err


@pytest.mark.slow
def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 400 digits in small batches: most of the pixels' variance, by several words. One word
    alone would explain none, and its perplexity would be 1."""
    write_few(tmp_path, monkeypatch, train=400, test=100)
    train, test = (open_source(f"{tmp_path}/data/{part}-*.tar") for part in ("train", "test"))
    found = tokenizer.quality(*tokenizer.train(train, seed=0, epochs=6, batch_size=16), test)
    assert found["explained"] > 0.5
    assert found["perplexity"] > 3
