"""Our Philox against numpy's, the documented counter layout, and the laws of what is drawn from
it."""

from __future__ import annotations

import hashlib
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache import rng

U64 = st.integers(0, 2**64 - 1)
FIRST = [
    "0xec22a7dcd64e7ed4",
    "0xc0a0f3211779151",
    "0xa63a6178aae79e32",
    "0x95ff2b97f7df3a63",
    "0x36e5486c42c079a6",
]
SECOND = ["0x8abe51c4ce948214", "0xf5994b2be97b2cae", "0xe392102b8f180008", "0x164b4c51f7975bae"]
PERMUTATION = [5, 3, 7, 2, 8, 6, 4, 1, 0, 9]


def numpy_words(counter: tuple[int, int, int, int], key: tuple[int, int], count: int) -> list[int]:
    """numpy's own Philox. It counts up before it draws, so it starts one below our first block."""
    start = sum(word << (64 * i) for i, word in enumerate(counter))
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=(start - 1) % 2**256)
    return [int(word) for word in generator.random_raw(count)]


@given(counter=st.tuples(U64, U64, U64, U64), key=st.tuples(U64, U64))
def test_one_block_is_numpys_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    ours = rng.philox(
        tuple(np.array([c], np.uint64) for c in counter),
        tuple(np.array([k], np.uint64) for k in key),
    )
    assert ours.shape == (1, 4)
    assert ours[0].tolist() == numpy_words(counter, key, 4)


@given(
    key=st.text(max_size=12),
    seed=st.integers(0, 2**63 - 1),
    view=st.integers(0, 2**31),
    epoch=st.integers(0, 2**31),
    count=st.integers(1, 19),
)
def test_counter_is_block_view_epoch_stream(
    key: str, seed: int, view: int, epoch: int, count: int
) -> None:
    pair = hashlib.blake2b(key.encode(), digest_size=16).digest()
    stream = int.from_bytes(
        hashlib.blake2b(f"crop:{seed}".encode(), digest_size=8).digest(), "little"
    )
    expected = numpy_words(
        (0, view, epoch, stream),
        (int.from_bytes(pair[:8], "little"), int.from_bytes(pair[8:], "little")),
        count,
    )
    ours = rng.words(
        rng.key_digests([key]), rng.stream("crop", seed), count, view=view, epoch=epoch
    )
    assert ours[0].tolist() == expected


def test_literal_words() -> None:
    """From numpy.random.Philox by tests/golden/make_views.py's `words`, never from our own code."""
    first = rng.words(rng.key_digests(["a"]), rng.stream("view", 0), 5)[0]
    assert [hex(w) for w in first] == FIRST
    second = rng.words(rng.key_digests(["a"]), rng.stream("mask", 3), 4, view=2, epoch=1)[0]
    assert [hex(w) for w in second] == SECOND


def test_a_keys_words_do_not_depend_on_its_neighbours() -> None:
    keys = [f"k{i}" for i in range(5)]
    together = rng.words(
        rng.key_digests(keys), rng.stream("x", 1), 7, view=[0, 1, 2, 3, 4], epoch=9
    )
    for i, key in enumerate(keys):
        alone = rng.words(rng.key_digests([key]), rng.stream("x", 1), 7, view=i, epoch=9)
        np.testing.assert_array_equal(together[i], alone[0])


def test_more_words_continue_the_same_sequence() -> None:
    digest = rng.key_digests(["k"])
    np.testing.assert_array_equal(
        rng.words(digest, rng.stream("x", 0), 3), rng.words(digest, rng.stream("x", 0), 50)[:, :3]
    )


def test_floats_at_the_edges() -> None:
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert rng.uniform(ends).tolist() == [0.0, 1 - 2**-53]
    low, high = rng.open_uniform(ends)
    assert low == 2**-53
    assert 0 < low < high < 1
    assert rng.below(ends, 6).tolist() == [0, 5]
    assert rng.below(ends, [1, 2**20]).tolist() == [0, 2**20 - 1]


def test_no_keys_no_words() -> None:
    assert rng.key_digests([]).shape == (0, 2)
    assert rng.words(rng.key_digests([]), rng.stream("x", 0), 5).shape == (0, 5)


@given(n=st.integers(0, 300), seed=st.integers(0, 99), epoch=st.integers(0, 999))
def test_permutation_is_one(n: int, seed: int, epoch: int) -> None:
    order = rng.permutation(n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))


def test_literal_permutation() -> None:
    """argsort of numpy's Philox words for key 'rows:10', stream 'order:3', epoch 2."""
    assert rng.permutation(10, 3, 2).tolist() == PERMUTATION
    assert rng.permutation(10, 3, 3).tolist() != PERMUTATION
    assert rng.permutation(10, 4, 2).tolist() != PERMUTATION


def test_race_has_the_exact_law_of_drawing_without_replacement() -> None:
    """Ordered pairs of the first two of four: P(i, j) = w_i w_j / (1 - w_i). Chi-square, 11 degrees
    of freedom: 31.26 is passed by chance once in a thousand; the draw is fixed, so this either
    holds or does not."""
    n, weights = 40_000, np.array([0.1, 0.2, 0.3, 0.4])
    raw = rng.words(rng.key_digests(f"{i}" for i in range(n)), rng.stream("race", 0), 4)
    order = rng.race(np.broadcast_to(weights, (n, 4)), raw)
    chi_square = 0.0
    for i, j in permutations(range(4), 2):
        expected = n * weights[i] * weights[j] / (1 - weights[i])
        seen = np.count_nonzero((order[:, 0] == i) & (order[:, 1] == j))
        chi_square += (seen - expected) ** 2 / expected
    assert chi_square < 31.26


def test_race_equals_its_formula_in_float64() -> None:
    raw = rng.words(rng.key_digests(["p", "q"]), rng.stream("race", 1), 9)
    weights = np.random.default_rng(0).random((2, 9)).astype(np.float32)
    for row in range(2):
        exponential = [-np.log((int(w >> 12) + 0.5) / 2**52) for w in raw[row].tolist()]
        score = [
            np.log(float(p)) - np.log(e) for p, e in zip(weights[row], exponential, strict=True)
        ]
        assert rng.race(weights, raw)[row].tolist() == sorted(range(9), key=lambda i: -score[i])


@given(seed=st.integers(0, 1000), zeros=st.sets(st.integers(0, 7), max_size=8))
def test_race_puts_zeros_last_in_index_order(seed: int, zeros: set[int]) -> None:
    weights = np.array([[0.0 if i in zeros else 0.5 + i for i in range(8)]])
    order = rng.race(weights, rng.words(rng.key_digests(["z"]), rng.stream("race", seed), 8))[
        0
    ].tolist()
    assert sorted(order) == list(range(8))
    assert order[8 - len(zeros) :] == sorted(zeros)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_race_does_not_depend_on_the_weights_scale(scale: float) -> None:
    raw = rng.words(rng.key_digests(["s"]), rng.stream("race", 4), 16)
    weights = np.arange(1.0, 17.0)[None]
    np.testing.assert_array_equal(rng.race(weights, raw), rng.race(weights * scale, raw))
