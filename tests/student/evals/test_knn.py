"""Weighted k-NN scores coloured pictures, ranks ties, and refuses wrong options."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from featcache.errors import UsageError
from featcache.pictures.open_source import open_source
from student import evals
from student.evals import hits, knn, percent
from student.features.frozen import FrozenEncoder


def test_hits_rank_ties_by_class_number() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    ranks = [
        next(r for r in range(1, 5) if hits(scores, torch.tensor([c]), r).item()) for c in range(4)
    ]
    assert ranks == [4, 1, 2, 3]
    assert percent(torch.tensor([True, True, False])) == 66.6667


# --- the whole eval -------------------------------------------------------------------------------

COLOURS = {
    "a": (200, 0, 0),
    "b": (0, 200, 0),
    "c": (0, 0, 200),
    "d": (200, 200, 0),
    "e": (0, 200, 200),
}


def write(folder: Path, name: str, file: str, colour: tuple[int, int, int]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(out, "png")
    (folder / name / f"{file}.png").write_bytes(out.getvalue())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, colour in COLOURS.items():
        for shade in range(3):
            write(
                tmp_path / "train", name, str(shade), tuple(max(0, c - 9 * shade) for c in colour)
            )  # type: ignore[arg-type]
    for name, colour in COLOURS.items():
        write(tmp_path / "test", name, "0", colour)
    write(tmp_path / "test", "e", "wrong", COLOURS["a"])
    return tmp_path / "train", tmp_path / "test"


def mean_colour() -> FrozenEncoder:
    return FrozenEncoder(
        "colour", 8, "cls", lambda pixels: pixels.float().mean((2, 3)), lambda device: None
    )


def test_evaluate_scores_colours(folders: tuple[Path, Path]) -> None:
    """Five of six test pictures have their class's colour; nobody near the sixth votes for 'e'."""
    train, test = map(open_source, folders)
    told = []
    got = knn.evaluate(
        mean_colour(), train, test, seed=0, k=3, progress=lambda *report: told.append(report)
    )
    assert json.loads(json.dumps(got)) == {
        "top1": 83.3333, "top5": 83.3333, "k": 3, "temperature": 0.07, "n_train": 15, "n_test": 6,
        "classes": 5, "features": "colour", "pool": "cls",
    }  # fmt: skip
    assert told == [("train", 15, 15), ("test", 6, 6)]
    assert knn.evaluate(mean_colour(), train, test, k=15, temperature=0.07)["top5"] == 100.0


def test_evaluate_refuses_before_it_reads(folders: tuple[Path, Path]) -> None:
    train, test = map(open_source, folders)
    broken = FrozenEncoder("never", 8, "cls", lambda pixels: 1 / 0, lambda device: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(
        UsageError, match="20 nearest neighbours: there are 15 training pictures, --k is 1 to 15"
    ):
        knn.evaluate(broken, train, test)
    with pytest.raises(UsageError, match="--k is 1 to 15"):
        knn.evaluate(broken, train, test, k=0)
    with pytest.raises(UsageError, match="temperature 0: --temperature is above 0"):
        knn.evaluate(broken, train, test, k=1, temperature=0.0)


def test_evals_are_found_by_module_name() -> None:
    assert {"knn", "linear"} <= set(evals.names())
    for name in evals.names():
        module = evals.load(name)
        assert all(
            len(option) == 2 and isinstance(option[1], str) for option in module.OPTIONS.values()
        )
        assert module.OPTIONS.keys() <= set(module.evaluate.__kwdefaults__)
        assert all(
            module.evaluate.__kwdefaults__[key] == value
            for key, (value, _) in module.OPTIONS.items()
        )
    with pytest.raises(UsageError, match=r"unknown eval 'kn': did you mean knn\? known: "):
        evals.load("kn")
