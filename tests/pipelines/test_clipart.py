"""The clip art: how drawings are parted, put on white and told apart, on a library drawn here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from featcache import teachers
from featcache.errors import UserError
from featcache.pictures.open_source import open_source
from pipelines import clipart


def draw(path: Path, seed: int) -> None:
    """Write a drawing of six rectangles on a transparent sheet."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGBA", (90, 70), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        left, top = random.integers(0, 80), random.integers(0, 60)
        fill = (*random.integers(0, 200, 3).tolist(), 255)
        pen.rectangle((left, top, left + 9 + random.integers(0, 30), top + 9), fill=fill)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 9 classes x 12 words x 2 variants, of which each class gives 6 and 3."""
    monkeypatch.setattr(clipart, "TRAIN", 6)
    monkeypatch.setattr(clipart, "TEST", 3)
    root = tmp_path / "library"
    for number, folder in enumerate(clipart.CLASSES.values()):
        for word in "abcdefghijkl":
            for variant in (1, 2):
                seed = 1000 * number + 10 * ord(word) + variant
                draw(root / folder / f"{word * 3}{number}_{variant:02d}.png", seed)
    return root


def words(folder: Path) -> set[str]:
    return {path.stem.split("-")[1][:3] for path in folder.rglob("*.png")}


def test_classes_are_balanced_and_words_are_of_one_part(library: Path, tmp_path: Path) -> None:
    clipart.write_pictures(library, tmp_path / "out", seed=0)
    for name in clipart.CLASSES:
        assert len(list((tmp_path / "out/train" / name).iterdir())) == 6
        assert len(list((tmp_path / "out/test" / name).iterdir())) == 3
    train, test = (words(tmp_path / "out" / part) for part in ("train", "test"))
    assert not train & test
    assert len(train | test) > 6


@pytest.mark.slow
def test_a_seed_chooses_and_the_same_seed_chooses_the_same(library: Path, tmp_path: Path) -> None:
    names = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        clipart.write_pictures(library, out, seed)
        names.append(sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")))
    assert names[0] == names[1] != names[2]


def test_links_and_drawings_of_two_classes_are_passed_over(library: Path, tmp_path: Path) -> None:
    (library / "food/zzz_01.png").symlink_to(library / "tools/aaa7_01.png")
    found = clipart.find(library)
    assert "zzz" not in found["food"]
    assert [path.name for path in found["food"]["aaa"]] == ["aaa3_01.png", "aaa3_02.png"]
    chosen, picture = clipart.Chosen(), clipart.on_white(library / "food/aaa3_01.png")
    assert picture is not None
    assert chosen.accepts(picture, "test", "food")
    assert chosen.accepts(picture, "test", "food")  # variants of one class and part may be alike
    darker = picture.point(lambda level: level // 2)
    assert not chosen.accepts(darker, "train", "food")
    assert not chosen.accepts(picture, "test", "tools")
    other = clipart.on_white(library / "food/bbb3_01.png")
    assert other is not None
    assert chosen.accepts(other, "train", "food")
    assert not chosen.accepts(Image.new("RGB", (64, 64), "red"), "train", "food")


def test_a_drawing_lies_on_white_cut_to_what_is_drawn(tmp_path: Path) -> None:
    sheet = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    sheet.paste((255, 0, 0, 255), (50, 20, 90, 40))  # 40 wide, 20 high
    sheet.save(tmp_path / "red.png")
    picture = clipart.on_white(tmp_path / "red.png")
    assert picture is not None
    levels = np.asarray(picture)
    assert levels.shape == (64, 64, 3)
    assert (levels[16:48] == (255, 0, 0)).all()  # 64 wide, 32 high, in the middle
    assert (levels[:16] == 255).all()
    assert (levels[48:] == 255).all()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert clipart.on_white(tmp_path / "nothing.png") is None
    Image.new("1", (2001, 2000)).save(tmp_path / "map.png")
    assert clipart.on_white(tmp_path / "map.png") is None


def test_what_is_missing_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder animals; `apt-get install openclipart-png`"):
        clipart.find(tmp_path)
    for path in (library / "tools").glob("[d-l]*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"too little clip art in '.*tools': 2 pictures for the"):
        clipart.write_pictures(library, tmp_path / "out", seed=0)


@pytest.mark.slow
def test_the_command_leaves_shards_and_a_teacher_that_featcache_loads(
    library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    given = [str(tmp_path / "out"), "--epochs", "2", "--clipart", str(library)]
    monkeypatch.setattr("sys.argv", ["clipart", *given])
    clipart.main()
    assert "54 training and 27 held-out drawings" in capsys.readouterr().out
    train = open_source(str(tmp_path / "out/data/train-*.tar"))
    assert train.classes == sorted(clipart.CLASSES)
    facts = json.loads((tmp_path / "out/teacher.json").read_text())
    loaded = teachers.load(facts["spec"], str(tmp_path / "out/teacher.safetensors"))
    assert (loaded.input_px, loaded.patches, loaded.width, loaded.depth) == (64, 64, 128, 6)
