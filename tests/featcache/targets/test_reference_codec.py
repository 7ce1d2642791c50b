"""The reference of the codecs held against literals written by hand, all streams of tiny cases, and
the error it predicts. No code of featcache takes part.

D width, k bits a value, T tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.featcache.targets import reference_codec as reference
from tests.golden import make_codecs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/codecs.json").read_text("utf-8"))

# A stream of eight values, its windows from the bits on paper:
#   4 bits: 1010 0101 0011 1100 0000 1111 1111 0000
#   3 bits: 101 100 010 100 111 001 111 101
STREAMS = {
    8: ("00017f80fea55aff", [0x00, 0x01, 0x7F, 0x80, 0xFE, 0xA5, 0x5A, 0xFF]),
    4: ("a53c0ff0", [0x0A, 0xA5, 0x53, 0x3C, 0xC0, 0x0F, 0xFF, 0xF0]),
    3: ("b14e7d", [0x05, 0x2C, 0x62, 0x14, 0xA7, 0x39, 0xCF, 0x7D]),
}
# What a unit Gaussian may lose of its squared length: 2 to 4 % above what it was seen to lose.
BOUNDS = {"q8": 4.3e-5, "t4": 5.9e-3, "t3": 2.15e-2}


def plain_state(width: int, numbers: np.ndarray) -> reference.State:
    """The state whose rotation is a multiple of the identity: H four times is b^2."""
    order = np.tile(np.arange(width, dtype="i4"), (4, 1))
    return {"signs": np.ones((4, width), "i1"), "order": order, "table": numbers}


@pytest.mark.parametrize("bits", STREAMS)
def test_a_stream_decoded_by_hand(bits: int) -> None:
    """Scale 0.5 is 0x3f000000, stored from its lowest byte; table[w] is w."""
    stream, expected = STREAMS[bits]
    coded = np.frombuffer(bytes.fromhex("0000003f" + stream), np.uint8)
    assert reference.windows(coded[4:], bits).tolist() == expected
    state, mean = plain_state(8, np.arange(256, dtype="f4")), np.arange(8) * 1000.0
    decoded = reference.decode(coded, mean, state, bits)
    assert decoded.tolist() == [1000 * i + w / 2 for i, w in enumerate(expected)]
    codes = np.array(expected) % 2**bits
    assert reference.pack(codes, bits).tobytes().hex() == stream


def test_a_rotation_by_hand() -> None:
    """(3, 1) -> (3, -1) -> (2, 4) -> (4, 2); -> (6, 2); -> (-6, 2) -> (-4, -8); -> (-12, 4) ->
    (4, -12), and back to b^4 = 16 times (3, 1)."""
    state = {
        "signs": np.array([[1, -1], [1, 1], [-1, 1], [1, 1]], "i1"),
        "order": np.array([[1, 0], [0, 1], [0, 1], [1, 0]], "i4"),
    }
    assert reference.rotate(np.array([3.0, 1.0]), state).tolist() == [4, -12]
    assert reference.rotate_back(np.array([4.0, -12.0]), state).tolist() == [48, 16]


def test_a_rotation_of_blocks_by_hand() -> None:
    """Six channels are three blocks of two. Sums and differences, turned around; and then
    H three times, which is 2 H."""
    state = plain_state(6, np.empty(0))
    state["order"][0] = [5, 4, 3, 2, 1, 0]
    rotated = reference.rotate(np.arange(1.0, 7), state)
    assert rotated.tolist() == [20, -24, 12, -16, 4, -8]


def test_the_matrix_of_four_channels_is_in_sylvesters_order() -> None:
    rows = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert reference.blocks_of_hadamard(4).tolist() == rows
    assert [reference.block(d) for d in (64, 192, 384, 768, 1024, 1408)] == [
        *(64, 64, 128, 256, 1024, 128)
    ]


@pytest.mark.parametrize("width", [64, 192, 768])
def test_the_rotation_is_orthogonal(width: int) -> None:
    """Integers stay exact in float64."""
    rng = np.random.default_rng(width)
    state = reference.random_state("t4", width, rng)
    x, y = rng.integers(-9, 10, (2, 3, width)).astype("f8")
    b = reference.block(width)
    rotated = reference.rotate(x, state)
    assert np.array_equal(reference.rotate_back(rotated, state), b**4 * x)
    assert np.array_equal(rotated @ reference.rotate(y, state).T, b**4 * (x @ y.T))


@pytest.mark.parametrize(("bits", "values"), [(4, 3), (3, 4), (8, 1)])
def test_the_search_finds_the_best_of_all_streams(bits: int, values: int) -> None:
    """Streams as whole numbers: value i ends k (values - 1 - i) bits before the end."""
    rng = np.random.default_rng(bits)
    numbers = rng.standard_normal(256)
    streams = np.arange(2 ** (bits * values))
    windows = [(streams >> (bits * (values - 1 - i))) % 256 for i in range(values)]
    for u in rng.standard_normal((20, values)):
        sums = sum((u[i] - numbers[windows[i]]) ** 2 for i in range(values))
        best = int(streams[np.argmin(sums)])
        codes = [(best >> (bits * (values - 1 - i))) % 2**bits for i in range(values)]
        assert reference.search(u[None], numbers, bits).tolist() == [codes]


@pytest.mark.parametrize("name", reference.BITS)
def test_no_change_of_one_code_or_two_makes_a_stream_better(name: str) -> None:
    """At a real width, where not all streams can be tried."""
    bits, rng = reference.BITS[name], np.random.default_rng(1)
    u, numbers = rng.standard_normal((1, 64)), reference.table(name).astype("f8")
    codes = reference.search(u, numbers, bits)
    tried = np.repeat(codes, 4000, axis=0)
    rows, at = np.arange(4000), rng.integers(0, 63, 4000)
    for near in (at, at + rng.integers(0, 2, 4000)):
        tried[rows, near] = rng.integers(0, 2**bits, 4000)
    values = numbers[reference.windows(reference.pack(np.vstack([codes, tried]), bits), bits)]
    sums = ((values - u) ** 2).sum(1)
    assert (sums[1:] >= sums[0]).all()
    assert (sums[1:] > sums[0]).any()


def test_eight_bits_are_the_nearest_numbers() -> None:
    u, numbers = np.random.default_rng(2).standard_normal((5, 64)) * 2, reference.table("q8")
    nearest = np.abs(u[..., None] - numbers.astype("f8")).argmin(-1)
    assert np.array_equal(reference.search(u, numbers, 8), nearest)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", reference.BITS)
def test_gaussians_lose_as_little_as_promised_and_as_predicted(name: str) -> None:
    bits, rng = reference.BITS[name], np.random.default_rng(3)
    state, mean = reference.random_state(name, 768, rng), rng.standard_normal(768).astype("f4")
    h = (rng.standard_normal((200, 768)) + mean).astype("f2").astype("f8")
    coded = reference.encode(h, mean, state, bits)
    assert coded.shape == (200, 4 + 96 * bits)
    error = reference.decode(coded, mean, state, bits) - h
    lost = (error**2).sum(1) / ((h - mean) ** 2).sum(1)
    assert 0.5 * BOUNDS[name] < lost.mean() <= BOUNDS[name]
    predicted = reference.predicted_error(h, mean, coded, state, bits)
    np.testing.assert_allclose(lost, predicted, rtol=1e-6)
    # Orthogonal to the token, to what is kept of the scale: 12 of its bits say something else.
    across = (error * (h - mean)).sum(1) / ((h - mean) ** 2).sum(1)
    assert np.abs(across).max() <= 2.0**-12 * 1.01


@pytest.mark.parametrize("name", reference.BITS)
def test_tokens_without_a_residual_and_constant_ones(name: str) -> None:
    bits, rng = reference.BITS[name], np.random.default_rng(4)
    state, mean = reference.random_state(name, 192, rng), np.zeros(192, "f4")
    h = np.stack([np.zeros(192), np.full(192, -3.0)])
    coded = reference.encode(h, mean, state, bits)
    assert not coded[0].any()
    decoded = reference.decode(coded, mean, state, bits)
    assert not decoded[0].any()
    assert ((decoded[1] + 3) ** 2).mean() < 9 * 4 * BOUNDS[name]
    own = rng.standard_normal(192).astype("f2").astype("f4")
    assert np.array_equal(
        reference.decode(reference.encode(own, own, state, bits), own, state, bits), own
    )


@pytest.mark.parametrize("name", reference.BITS)
def test_h_is_what_fp16_stores_and_tokens_are_on_their_own(name: str) -> None:
    bits, rng = reference.BITS[name], np.random.default_rng(5)
    state, mean = (
        reference.random_state(name, 64, rng),
        rng.standard_normal((2, 1, 64)).astype("f4"),
    )
    h = rng.standard_normal((3, 2, 5, 64))
    whole = reference.encode(h, mean, state, bits)
    assert np.array_equal(reference.encode(h.astype("f2"), mean, state, bits), whole)
    assert np.array_equal(reference.encode(h[2, 1, 4], mean[1, 0], state, bits), whole[2, 1, 4])


@pytest.mark.parametrize("name", reference.BITS)
@pytest.mark.parametrize("width", sorted(GOLDEN, key=int))
def test_golden_bytes_are_the_references(width: str, name: str) -> None:
    case = GOLDEN[width]
    h, mean, signs, order = (make_codecs.read(case[k]) for k in ("h", "mean", "signs", "order"))
    state: dict[str, Any] = {"signs": signs, "order": order, "table": reference.table(name)}
    bits, coded = reference.BITS[name], make_codecs.read(case[name]["coded"])
    assert np.array_equal(reference.encode(h, mean, state, bits), coded)
    decoded = reference.decode(coded, mean, state, bits)
    np.testing.assert_allclose(make_codecs.read(case[name]["decoded"]), decoded, rtol=2**-24)
    assert [not row.any() for row in coded] == [kind == "mean" for kind in case["tokens"]]
