"""Block orders keep their promises, beside those that tests/student/data/test_loader.py asks of
every order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache import rng
from student.data.sampler import BLOCK, WINDOW, SampleOrder


def shuffled(n: int) -> np.ndarray:
    return np.random.default_rng(n).permutation(n)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_of_blocks_shows_each_picture_once(n: int, seed: int, epoch: int) -> None:
    rows = SampleOrder(n, seed, shuffled(n)).step(epoch, 0, n)
    assert np.array_equal(np.sort(rows), np.arange(n))


def test_a_window_is_sixteen_blocks_of_sixty_four_neighbours() -> None:
    """Places of each window of 1,024 samples, told apart at gaps: at most 16 stretches of at most
    64 neighbours."""
    n, positions = 64 * 100, shuffled(64 * 100)
    order = SampleOrder(n, 3, positions)
    rows = np.concatenate([order.step(1, first, 128) for first in range(0, n, 128)])
    sizes = []
    for low in range(0, n - BLOCK * WINDOW, BLOCK * WINDOW):
        here = np.sort(positions[rows[low : low + BLOCK * WINDOW]])
        stretches = np.split(here, np.flatnonzero(np.diff(here) > 1) + 1)
        sizes.append(len(stretches))
    # The first and the last block of storage are cut short, so windows after theirs begin a few
    # rows late.
    assert np.median(sizes) <= WINDOW + 2
    assert max(sizes) <= 2 * WINDOW + 2
    random = SampleOrder(n, 3).step(1, 0, BLOCK * WINDOW)
    stretches_of_random = (np.diff(np.sort(positions[random])) > 1).sum() + 1
    assert stretches_of_random > 500  # what rows at random would open


def test_blocks_are_cut_elsewhere_in_each_epoch() -> None:
    """Were blocks cut at multiples of 64, rows 0 and 63 would be of one block, and so in one
    window, in every epoch."""
    n, window = 64 * 64, BLOCK * WINDOW
    order, apart = SampleOrder(n, 0, np.arange(n)), 0
    for epoch in range(40):
        number = np.empty(n, int)
        for low in range(0, n, window):
            number[order.step(epoch, low, window)] = low
        apart += int(number[0] != number[63])
    assert 10 < apart < 40


def test_orders_of_blocks_differ_between_epochs_and_seeds() -> None:
    first = [
        tuple(SampleOrder(1024, seed, np.arange(1024)).step(epoch, 0, 256))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(first)) == 4


def test_a_step_of_blocks_is_in_storage_order() -> None:
    """So that a process's slice of it lies in few files."""
    positions = shuffled(2000)
    rows = SampleOrder(2000, 5, positions).step(2, 512, 256)
    assert (np.diff(positions[rows]) > 0).all()


@pytest.mark.parametrize("n", [12, 100])
def test_rows_at_random_are_the_stable_argsort_of_words(n: int) -> None:
    words = rng.words(rng.key_digests([f"rows:{n}"]), rng.stream("order", 9), n, epoch=4)[0]
    assert (
        SampleOrder(n, 9).step(4, 3, 5).tolist() == np.argsort(words, kind="stable")[3:8].tolist()
    )
