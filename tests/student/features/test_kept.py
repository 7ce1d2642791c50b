"""Features are kept, found again without reading a picture, and made again where anything that they
depend on has changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.catalog import kept_features
from featcache.errors import UserError
from featcache.pictures import folder as picture_folder
from student.evals import linear
from student.features import kept
from student.features.embed import Skipped
from student.features.frozen import FrozenEncoder
from student.features.labels import low_shot, split_holdout
from student.features.task import Task
from tests.student import toy_task as toys


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/features"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of pictures that were read."""
    seen: list[str] = []
    real = picture_folder.regular_file.read_file

    def read_file(path: Any) -> bytes:
        seen.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(picture_folder.regular_file, "read_file", read_file)
    return seen


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            pixels = draw.integers(0, 256, (9, 11, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{name}{i}.png")
    return tmp_path / "photos"


def network(digest: str = "d" * 32, prefix: int = 1) -> FrozenEncoder:
    """Tokens (B,4,3): [CLS] is the mean colour, the others are pixels."""

    def tokens(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.float() / 255
        corners = torch.stack([images[:, :, 0, 0], images[:, :, 3, 4], images[:, :, 7, 7]], 1)
        return torch.cat([images.mean((2, 3))[:, None], corners], 1)

    return toys.encoder(tokens, digest=digest, prefix=prefix)


def task_of(photos: Path, frozen: FrozenEncoder | None = None, **options: Any) -> Task:
    return toys.folder_task(frozen or network(), photos, photos, **options)


def test_the_second_evaluation_reads_no_picture(home: Path, photos: Path, reads: list[str]) -> None:
    """[CLS], the mean of the patches, tokens: all come from one reading of the pictures."""
    first = task_of(photos)
    (cls,), labels = first.pooled(first.train, stage="train")
    assert len(reads) == 10
    second = task_of(photos, pool="mean")
    (mean,), again = second.pooled(second.train, stage="train")
    (tokens,), _ = second.tokens(second.train, stage="train")
    assert len(reads) == 10
    assert labels.tolist() == again.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_allclose(tokens[:, 0], cls, atol=1e-3)
    np.testing.assert_allclose(tokens[:, 1:].astype("f4").mean(1), mean, atol=1e-3)
    assert (cls.dtype, tokens.dtype) == (torch.float32, np.float16)
    # the test pictures are the same: their features too
    second.pooled(second.tests[0], stage="test")
    assert len(reads) == 10


def test_kept_features_are_those_that_are_made_without(home: Path, photos: Path) -> None:
    for views in (None, [0, 3]):
        results = []
        for keep in (False, True, True):
            task = task_of(photos, keep=keep, batch_size=3)
            results.append(task.pooled(task.train, views, stage="train")[0])
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    assert len(list(home.iterdir())) == 6  # pooled and tokens, of the centre and of two views


@pytest.mark.parametrize("what", ["weight", "crop", "size", "view", "block", "seed"])
def test_a_changed_weight_or_crop_is_noticed(
    what: str, home: Path, photos: Path, reads: list[str]
) -> None:
    """Two views are kept, and each of these is another's."""
    task = task_of(photos)
    task.pooled(task.train, None, stage="train")
    task.pooled(task.train, [0], stage="train")
    count, views = len(reads), None
    options: dict[str, Any] = {}
    frozen = network()
    if what == "weight":
        frozen = network("e" * 32)
    elif what == "crop":
        options["crop_pct"] = 0.5
    elif what == "size":
        frozen = FrozenEncoder("toy", 10, 1, 1, frozen.forward, frozen.to, frozen.digest)
    elif what == "block":
        frozen = FrozenEncoder("toy", 8, 2, 1, frozen.forward, frozen.to, frozen.digest)
    elif what == "view":
        views = [1]
    else:
        views, options["seed"] = [0], 1
    task = task_of(photos, frozen, **options)
    task.pooled(task.train, views, stage="train")
    assert len(reads) == count + 10


def test_a_changed_picture_is_noticed(home: Path, photos: Path, reads: list[str]) -> None:
    """Even one of the same size whose time was set back, which only its inode tells."""
    task = task_of(photos)
    before = task.pooled(task.train, stage="train")[0]
    path = photos / "a/a3.png"
    status, data = path.stat(), path.read_bytes()
    other = bytearray(data)
    Image.fromarray(np.full((9, 11, 3), 7, np.uint8)).save(photos / "new.png")
    new = (photos / "new.png").read_bytes()
    (photos / "new.png").unlink()
    other[: len(new)] = new
    path.write_bytes(bytes(other))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    count = len(reads)
    task = task_of(photos)
    after = task.pooled(task.train, stage="train")[0]
    assert len(reads) == count + 10
    assert (before != after).any(2)[0].tolist() == [i == 3 for i in range(10)]


def test_more_and_fewer_pictures(home: Path, photos: Path, reads: list[str]) -> None:
    """A part of pictures whose features are kept is read from them; one more picture is another
    set."""
    task = task_of(photos)
    (whole,), _ = task.pooled(task.train, stage="train")
    count = len(reads)
    train, test = split_holdout(task.train.source, 0.4, seed=1)
    few = low_shot(train, shots=1)
    parts = toys.task_of(network(), few, test)
    (rows,), labels = parts.pooled(parts.train, stage="train")
    assert len(reads) == count
    number = {key: i for i, key in enumerate(task.train.source.keys)}
    assert torch.equal(rows, whole[[number[key] for key in few.keys]])
    assert labels.tolist() == [0, 1]
    shutil.copy(photos / "a/a0.png", photos / "b/zz.png")
    task = task_of(photos)
    task.pooled(task.train, stage="train")
    assert len(reads) == count + 11


def test_several_blocks_lie_one_after_the_other(home: Path, photos: Path) -> None:
    def forward(pixels: torch.Tensor, blocks: Any, ids: Any) -> list[torch.Tensor]:
        (tokens,) = network().forward(pixels, (1,), None)
        return [tokens + 10 * block for block in blocks]

    frozen = FrozenEncoder("toy", 8, 4, 1, forward, lambda device: None, "f" * 32)
    one, two = (task_of(photos, frozen, blocks=n) for n in (1, 2))
    (last,), _ = one.pooled(one.train, stage="train")
    (both,), _ = two.pooled(two.train, stage="train")
    assert both.shape == (10, 6)
    assert torch.equal(both[:, 3:], last)
    torch.testing.assert_close(both[:, :3], last - 10)


def test_tokens_that_are_kept_are_not_written_again(
    home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    begin = kept.OnDisk.__init__

    def recorded(self: kept.OnDisk, of: dict[str, Any], *more: Any) -> None:
        written.append(of["what"])
        begin(self, of, *more)

    monkeypatch.setattr(kept.OnDisk, "__init__", recorded)

    def forward(pixels: torch.Tensor, blocks: Any, ids: Any) -> list[torch.Tensor]:
        return network().forward(pixels, (1,), None) * len(blocks)

    frozen = FrozenEncoder("toy", 8, 2, 1, forward, lambda device: None, "c" * 32)
    for blocks in (1, 2):
        task = task_of(photos, frozen, blocks=blocks)
        task.pooled(task.train, stage="train")
    task.tokens(task.train, stage="train")
    assert written == ["pooled", "tokens", "pooled"]


def test_without_a_class_token_there_is_the_mean_alone(home: Path, photos: Path) -> None:
    task = task_of(photos, network(prefix=0), pool="mean")
    (rows,), _ = task.pooled(task.train, stage="train")
    (tokens,), _ = task.tokens(task.train, stage="train")
    np.testing.assert_allclose(rows, tokens.astype("f4").mean(1), atol=1e-3)


# --- pictures that cannot be decoded --------------------------------------------------------------


def test_bad_pictures_are_skipped_and_counted(home: Path, photos: Path, reads: list[str]) -> None:
    for name in ("a/a1.png", "b/b4.png"):
        (photos / name).write_bytes(b"no picture")
    for allowed, told in ((0, "N$"), (1, "N; 1 other was left out already, as many as --skip-bad")):
        task = task_of(photos, skipped=Skipped(allowed))
        with pytest.raises(UserError, match=f"cannot decode the picture .*--skip-bad {told}"):
            task.pooled(task.train, stage="train")
    assert list(home.glob("[!.]*")) == []
    for _ in range(2):  # made, then kept
        task = task_of(photos, skipped=Skipped(2))
        (rows,), labels = task.pooled(task.train, stage="train")
        assert rows.shape == (8, 3)
        assert labels.tolist() == [0] * 4 + [1] * 4
        assert task.skipped.count == 2
        assert "a/a1" in task.skipped.told()["first"][0]
    assert reads.count("a0.png") == 3  # twice in vain, once for all
    task = task_of(photos, skipped=Skipped(1))
    with pytest.raises(UserError, match="as was found when its features were kept"):
        task.pooled(task.train, stage="train")
    # a good copy of the same pictures, without the bad ones
    for name in ("a/a1.png", "b/b4.png"):
        (photos / name).unlink()
    good = task_of(photos)
    assert torch.equal(good.pooled(good.train, stage="train")[0][0], rows)


def test_nothing_that_can_be_decoded_is_refused(home: Path, photos: Path) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    task = task_of(photos, skipped=Skipped(100))
    with pytest.raises(UserError, match="none of its 10 pictures can be decoded"):
        task.pooled(task.train, stage="train")


# --- what lies in the folder ----------------------------------------------------------------------


def only(home: Path) -> Path:
    """The folder of pooled features."""
    return next(
        path
        for path in home.iterdir()
        if json.loads((path / "about.json").read_text())["of"]["what"] == "pooled"
    )


DAMAGE = {
    "a flipped bit": lambda path: _flip(path / "features.npy"),
    "cut": lambda path: os.truncate(path / "features.npy", 100),
    "longer": lambda path: os.truncate(path / "features.npy", 1000),
    "gone": lambda path: (path / "features.npy").unlink(),
    "a pickle": lambda path: np.save(
        path / "features.npy", np.array([{}], object), allow_pickle=True
    ),
    "about.json cut": lambda path: os.truncate(path / "about.json", 40),
    "about.json of others": lambda path: shutil.copy(
        next(p for p in path.parent.iterdir() if p != path) / "about.json", path / "about.json"
    ),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_features_are_made_again_and_told(
    how: str, home: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(photos)
    (want,), _ = task.pooled(task.train, stage="train")
    DAMAGE[how](only(home))
    task = task_of(photos)
    (got,), _ = task.pooled(task.train, stage="train")
    assert torch.equal(got, want)
    assert "features are made again" in caplog.text
    caplog.clear()
    task_of(photos).pooled(task.train, stage="train")
    assert caplog.text == ""


def test_a_stranger_in_the_folder_is_left(home: Path, photos: Path) -> None:
    task = task_of(photos)
    task.pooled(task.train, stage="train")
    path = only(home)
    (path / "notes.txt").write_text("mine")
    _flip(path / "features.npy")
    with pytest.raises(UserError, match="holds what is none of its files; move that away"):
        task_of(photos).pooled(task.train, stage="train")
    assert (path / "notes.txt").read_text() == "mine"


def test_links_are_not_followed(home: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    home.parent.mkdir()
    home.symlink_to(tmp_path / "elsewhere")
    task = task_of(photos)
    with pytest.raises(UserError, match="is a link, and features are kept below FEATCACHE_HOME"):
        task.pooled(task.train, stage="train")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_in_the_place_of_features_is_refused(
    home: Path, photos: Path, tmp_path: Path
) -> None:
    task = task_of(photos)
    task.pooled(task.train, stage="train")
    path = only(home)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="is no folder, and features are kept there"):
        task_of(photos).pooled(task.train, stage="train")


def test_a_full_disk_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    sink = kept.OnDisk({"of": 3}, (2, 2), "<f4", "e", "p")
    sink.file.close()
    monkeypatch.setattr(sink, "file", Full())
    with pytest.raises(UserError, match="No space left on device; make room"):
        sink.add([0], np.ones((1, 2), "f4"))
    sink.discard()
    assert list(home.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(home: Path, photos: Path) -> None:
    calls = []

    def forward(pixels: torch.Tensor, blocks: Any, ids: Any) -> list[torch.Tensor]:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return network().forward(pixels, blocks, ids)

    frozen = FrozenEncoder("toy", 8, 1, 1, forward, lambda device: None, "d" * 32)
    task = task_of(photos, frozen, batch_size=4)
    with pytest.raises(RuntimeError):
        task.pooled(task.train, stage="train")
    assert list(home.iterdir()) == []


def test_features_that_are_not_finite_are_refused(home: Path, photos: Path) -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 2, 3), torch.nan)

    task = task_of(photos, toys.encoder(broken, digest="a" * 32))
    with pytest.raises(UserError, match="features of toy are not finite"):
        task.pooled(task.train, stage="train")
    large = toys.encoder(lambda pixels: torch.full((len(pixels), 2, 3), 1e5), digest="b" * 32)
    task = task_of(photos, large)
    with pytest.raises(UserError, match=r"not finite in float16 \(largest 100000, 65504"):
        task.tokens(task.train, stage="train")


def test_two_writers_of_the_same_features(home: Path) -> None:
    """The second finds those of the first, and leaves nothing behind."""
    first, second = (kept.OnDisk({"of": 1}, (3, 2), "<f4", "e", "p") for _ in range(2))
    values = np.arange(6, dtype="f4").reshape(3, 2)
    first.add([0, 1, 2], values)
    second.add([0], values[:1])
    second.add([2], values[2:])
    assert np.array_equal(first.finish([]), values)
    assert np.array_equal(second.finish([1]), values)
    assert len(list(home.iterdir())) == 1
    assert kept_features.read(next(home.iterdir())).skipped == []


def test_rows_of_skipped_pictures_are_zeros(home: Path) -> None:
    sink = kept.OnDisk({"of": 2}, (5, 2), "<f2", "e", "p")
    sink.add([1, 2], np.ones((2, 2), "f2"))
    assert sink.finish([0, 3, 4]).tolist() == [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0]]


def test_use_is_noted(home: Path, photos: Path) -> None:
    task = task_of(photos)
    task.pooled(task.train, stage="train")
    about = only(home) / "about.json"
    os.utime(about, (1e9, 1e9))
    task_of(photos).pooled(task.train, stage="train")
    assert about.stat().st_mtime > 1e9 + 1


def test_a_probe_on_fresh_views_keeps_none_of_them(home: Path, photos: Path) -> None:
    task = task_of(photos)
    linear.evaluate(task, epochs=3, warmup_epochs=1, blr="1", batch_size=5, train_views=None)
    assert len(list(home.iterdir())) == 2  # pooled and tokens of the test pictures' centre crops
