"""Weighted k-NN votes are compared with numbers by hand and with a plain numpy reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featcache.extraction import knn

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


def test_nobody_votes_for_itself_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row asks a bank of all the others."""
    draw = np.random.default_rng(1)
    rows, labels = draw.normal(size=(24, 6)), draw.integers(0, 3, 24)
    monkeypatch.setattr(knn, "CHUNK_ROWS", 7)
    features = torch.from_numpy(rows)
    got = knn.votes(features, features, torch.from_numpy(labels), 3, k=5, leave_one_out=True)
    for i in range(24):
        others = np.delete(rows, i, 0), np.delete(labels, i)
        want = reference(rows[i : i + 1], *others, 3, 5, 0.07)[0]
        np.testing.assert_allclose(got[i] / got[i].sum(), want / want.sum(), rtol=1e-9)
