"""Weighted k-NN: votes by hand, a plain numpy reference, ties, and the whole eval on coloured
pictures."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.errors import UsageError
from featcache.pictures.open_source import open_source
from student import evals
from student.evals import hits, knn, percent
from student.features.frozen import FrozenEncoder

BANK = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
BANK_LABELS = torch.tensor([0, 1, 1, 2])


def test_votes_by_hand() -> None:
    """Cosines of (3, 0) with the bank: 1, 0.6, 0.8, 0; votes over exp(1/T): 1, then exp(-0.2/T),
    exp(-0.4/T)."""
    one = torch.tensor([[3.0, 0.0]])
    got = knn.votes(one, BANK, BANK_LABELS, 3, k=1, temperature=0.5)
    assert got.tolist() == [[1.0, 0.0, 0.0]]
    got = knn.votes(one, BANK, BANK_LABELS, 3, k=2, temperature=0.5)
    np.testing.assert_allclose(got, [[1.0, math.exp(-0.4), 0.0]], rtol=1e-6)  # class 0 wins
    got = knn.votes(one, BANK, BANK_LABELS, 3, k=3, temperature=0.5)
    # 1.12: class 1 wins
    np.testing.assert_allclose(got, [[1.0, math.exp(-0.4) + math.exp(-0.8), 0.0]], rtol=1e-6)
    got = knn.votes(one, BANK, BANK_LABELS, 3, k=3, temperature=0.1)
    # 0.15: class 0 again
    np.testing.assert_allclose(got, [[1.0, math.exp(-2) + math.exp(-4), 0.0]], rtol=1e-6)


def test_votes_do_not_depend_on_lengths_and_do_not_overflow() -> None:
    one = torch.tensor([[0.5, 0.1]])
    want = knn.votes(one, BANK, BANK_LABELS, 3, k=4)
    scaled = knn.votes(
        one * 100, BANK * torch.tensor([[7.0], [0.1], [3.0], [1.0]]), BANK_LABELS, 3, k=4
    )
    torch.testing.assert_close(scaled, want, rtol=1e-5, atol=1e-8)
    assert torch.isfinite(knn.votes(one, BANK, BANK_LABELS, 3, k=4, temperature=1e-4)).all()


def reference(
    test: np.ndarray, bank: np.ndarray, labels: np.ndarray, classes: int, k: int, t: float
) -> np.ndarray:
    """Votes (n,C), one test row and one neighbour at a time, in float64 and without the common
    factor."""
    out = np.zeros((len(test), classes))
    for row, x in enumerate(test.astype(np.float64)):
        cosine = np.array(
            [x @ b / (np.linalg.norm(x) * np.linalg.norm(b)) for b in bank.astype(np.float64)]
        )
        for neighbour in sorted(range(len(bank)), key=lambda i: -cosine[i])[:k]:
            out[row, labels[neighbour]] += math.exp(cosine[neighbour] / t)
    return out


def test_votes_equal_a_plain_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    test, bank = (
        draw.normal(size=(23, 16)).astype(np.float32),
        draw.normal(size=(90, 16)).astype(np.float32),
    )
    labels = draw.integers(0, 7, 90)
    monkeypatch.setattr(knn, "CHUNK_ROWS", 5)
    got = knn.votes(
        torch.from_numpy(test), torch.from_numpy(bank), torch.from_numpy(labels), 7
    ).numpy()
    want = reference(test, bank, labels, 7, 20, 0.07)
    np.testing.assert_allclose(
        got / got.sum(1, keepdims=True), want / want.sum(1, keepdims=True), rtol=1e-4
    )


def test_hits_rank_ties_by_class_number() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    ranks = [
        next(r for r in range(1, 5) if hits(scores, torch.tensor([c]), r).item()) for c in range(4)
    ]
    assert ranks == [4, 1, 2, 3]
    assert percent(torch.tensor([True, True, False])) == 66.6667


def test_errors() -> None:
    with pytest.raises(
        UsageError, match="5 nearest neighbours: there are 4 training pictures, --k is 1 to 4"
    ):
        knn.votes(BANK, BANK, BANK_LABELS, 3, k=5)
    with pytest.raises(UsageError, match="--k is 1 to 4"):
        knn.votes(BANK, BANK, BANK_LABELS, 3, k=0)
    with pytest.raises(UsageError, match="temperature 0: --temperature is above 0"):
        knn.votes(BANK, BANK, BANK_LABELS, 3, k=1, temperature=0.0)


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
    with pytest.raises(UsageError, match="20 nearest neighbours: there are 15"):
        knn.evaluate(broken, train, test)


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
