"""The check before extraction passes a teacher that tells classes apart and refuses one that does
not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.errors import UserError
from featcache.extraction import teacher_check
from featcache.maintenance.pack_tars import pack
from featcache.pictures.open_source import open_source
from featcache.teachers.synthetic import Synthetic
from featcache.views.fingerprint import pixel_hash
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, files_below

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight noisy pictures of one colour, and one class of a single picture."""
    root, random = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(8):
            pixels = np.clip(np.array(colour) + random.normal(0, 30, (40, 36, 3)), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    (root / "lonely").mkdir()
    shutil.copy(root / "red/0.png", root / "lonely/0.png")
    return root


class Blind(Synthetic):
    """Sees nothing: its features are a hash of the pixels."""

    def __init__(self, value: float | None = None) -> None:
        super().__init__(3, 4, 8, 28)
        self.name, self.value = "blind", value

    def forward(
        self, batch: torch.Tensor, levels: Sequence[int]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        ys, attention = super().forward(batch, levels)
        for i, picture in enumerate(batch):
            seed = pixel_hash(picture.permute(1, 2, 0).numpy()) % 2**32
            noise = torch.randn(ys[0][i].shape, generator=torch.Generator().manual_seed(seed))
            ys[0][i] = noise if self.value is None else self.value
        return ys, attention


def score(teacher: Synthetic, source: Path | str) -> teacher_check.Score:
    return teacher_check.check(teacher, open_source(source), Policy(size=28), 5)


def sighted() -> Synthetic:
    teacher = Synthetic(3, 4, 8, 28)
    teacher.name = "sighted"
    return teacher


def test_a_teacher_that_sees_colour_passes(labelled: Path) -> None:
    found = score(sighted(), labelled)
    assert (found.pictures, found.classes, found.right, found.pixels) == (24, 3, 1.0, 1.0)
    assert found.chance == pytest.approx(1 / 3)
    assert found.needed == pytest.approx(1 / 3 + 3 * math.sqrt(2 / 9 / 24))
    assert found.text == (
        "check of sighted: k-NN 100.0% of 24 pictures of 3 classes, chance 33.3%, bare pixels "
        "100.0%; no better than the pixels: are these the right weights?"
    )
    found.refuse()


@pytest.mark.parametrize("value", [None, 0.5, float("nan")])
def test_a_blind_teacher_is_refused(labelled: Path, value: float | None) -> None:
    """Noise, the same for all, not a number."""
    found = score(Blind(value), labelled)
    assert found.right < found.needed
    with pytest.raises(
        UserError, match=r"'blind' is at chance level.*above 62\.2% is needed.*check --weights"
    ):
        found.refuse()


def test_votes_by_hand() -> None:
    """Cosines to row 0 are 1, 0, -1; each row's neighbours are all others, weighed by exp(cosine /
    0.07)."""
    features = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    assert (
        teacher_check.right_share(features, np.array([0, 0, 1, 1])) == 0.75
    )  # the third is as near to two of 0 as to one of 1
    assert teacher_check.right_share(features, np.array([0, 0, 0, 1])) == 0.75
    assert teacher_check.right_share(features, np.array([0, 1, 0, 1])) == 0.0


def test_chance_is_the_commonest_class(labelled: Path, tmp_path: Path) -> None:
    for name in ("red", "green"):
        shutil.copytree(labelled / name, tmp_path / name)
    for i in range(2, 8):
        (tmp_path / "green" / f"{i}.png").unlink()
    assert score(sighted(), tmp_path).chance == pytest.approx(0.8)


def test_many_pictures_are_chosen_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        spec, keys = "many", [str(i) for i in range(100 * 40)]
        labels = np.repeat(np.arange(100), 40)

    numbers, labels = teacher_check._choose(Many())  # type: ignore[arg-type]
    assert len(numbers) == 32 * 16
    assert np.bincount(labels)[np.unique(labels)].tolist() == [16] * 32
    assert np.unique(labels)[[0, 1, 2, -1]].tolist() == [0, 3, 6, 96]
    assert (numbers[:4] % 40).tolist() == [0, 2, 5, 7]


def test_tars_with_labels(labelled: Path, tmp_path: Path) -> None:
    pack(open_source(labelled), tmp_path, 100, seed=0)
    found = score(sighted(), next(iter(tmp_path.glob("*.tar"))).as_posix())
    assert (found.pictures, found.right) == (24, 1.0)


def test_large_numbers_of_classes_cost_no_memory(labelled: Path) -> None:
    """A label is a name: counting up to it would take eight exabytes."""
    source = open_source(labelled)
    assert source.labels is not None
    far = SimpleNamespace(
        spec="far", keys=source.keys, read=source.read, labels=source.labels * 10**17
    )
    plain = score(sighted(), labelled)
    assert teacher_check.check(sighted(), far, Policy(size=28), 5) == plain  # type: ignore[arg-type]


def test_pictures_without_labels_are_refused(photos: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has no labels: a folder with one sub-folder for each class"
    ):
        score(sighted(), photos)
    shutil.copytree(labelled / "red", tmp_path / "red")
    with pytest.raises(UserError, match="1 class has two pictures or more"):
        score(sighted(), tmp_path)
    (tmp_path / "green").mkdir()
    for i in range(2):
        (tmp_path / f"green/{i}.png").write_text("no picture")
    with pytest.raises(
        UserError, match=r"picture 'green/0' cannot be used: not a readable picture"
    ):
        score(sighted(), tmp_path)


def test_the_command_prints_and_goes_on(
    featcache_command: Callable[..., Ran],
    labelled: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = (
        "extract",
        "--teacher",
        SYNTHETIC,
        "--images",
        photos,
        "--size",
        28,
        "--levels",
        "all",
        "--out",
        tmp_path / "c",
    )
    ran = featcache_command(*base, "--check-teacher", labelled, "--dry-run")
    assert ran.status == 0
    assert "k-NN 100.0% of 24 pictures" in ran.err
    assert "would write" in ran.out
    monkeypatch.setattr(
        Synthetic, "forward", lambda self, batch, levels: ([torch.ones(len(batch), 5, 8)], None)
    )
    ran = featcache_command(*base, "--check-teacher", labelled)
    assert ran.status == 1
    assert "at chance level" in ran.error
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    assert featcache_command(*base, "--check-teacher", labelled).status == 0
    assert "c/manifest.json" in files_below(tmp_path)
