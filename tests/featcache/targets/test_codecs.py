"""Codecs: literal values and bytes, bounds, and the check for what leaves the range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.targets import codec_names, codecs, levels

# value -> the IEEE half nearest to it, as stored (little-endian); written by hand from the format.
LITERAL = [
    (0.0, "0000"),
    (1.0, "003c"),
    (-2.0, "00c0"),
    (0.1, "662e"),
    (27.7, "ed4e"),
    (65504.0, "ff7b"),
    (6e-8, "0100"),
    (1e-8, "0000"),
    (1 + 2**-11, "003c"),  # half way: to even
    (1 + 3 * 2**-11, "023c"),
]


@pytest.mark.parametrize(("value", "stored"), LITERAL)
def test_fp16_literal_bytes(value: float, stored: str) -> None:
    codec = codecs.CODECS["fp16"]
    encoded = codec.encode(torch.tensor([value]), {})["features"]
    assert encoded.numpy().astype("<f2").tobytes().hex() == stored
    decoded = codec.decode({"features": encoded}, {})
    assert decoded.dtype == torch.float32
    assert decoded.item() == np.frombuffer(bytes.fromhex(stored), "<f2")[0]


def test_fp16_stores_the_features_alone() -> None:
    assert codecs.CODECS["fp16"].arrays(768) == {"features": ("<f2", (768,), ("channel",))}


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_fp16_error_bound(values: list[float]) -> None:
    """Half an ulp: 2**-11 relative, 2**-25 absolute below the smallest normal number."""
    h = torch.tensor(values)
    codec = codecs.CODECS["fp16"]
    error = (codec.decode(codec.encode(h, {}), {}) - h).abs().double()
    assert (error <= torch.clamp(h.abs().double() * 2**-11, min=2**-25)).all()


@given(st.integers(2, 4096))
def test_a_normalised_token_never_leaves_the_range(width: int) -> None:
    """|h| <= sqrt(D - 1), reached by a single dominant channel: 64 at 4,096 wide, far below
    65,504."""
    y = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    y[..., 0] = 1e20
    h, stats = levels.normalise(y)
    assert h.abs().max() <= (width - 1) ** 0.5 * (1 + 1e-9)
    rounded = codecs.CODECS["fp16"].encode(h[0], {})["features"]
    assert bool(codecs.all_finite(rounded, stats[0].float()).all())


def test_what_is_not_finite_is_told_by_view() -> None:
    features, stats = torch.zeros(3, 4, 5), torch.zeros(3, 4, 2)
    assert codecs.all_finite(features, stats).tolist() == [True] * 3
    features[1, 3, 4] = float("inf")
    stats[2, 0, 1] = float("nan")
    assert codecs.all_finite(features, stats).tolist() == [True, False, False]
    too_large = codecs.CODECS["fp16"].encode(torch.full((1, 1, 1), 70000.0), {})["features"]
    assert codecs.all_finite(too_large, torch.zeros(1, 1, 2)).tolist() == [False]


def test_the_names_that_need_no_tensors_are_those_of_the_codecs() -> None:
    assert tuple(codecs.CODECS) == codec_names.NAMES
    assert [name for name, codec in codecs.CODECS.items() if not codec.tolerance] == [
        codec_names.LOSSLESS
    ]


@pytest.mark.parametrize("name", sorted(codecs.CODECS))
def test_every_codec_stores_what_it_declares(name: str) -> None:
    codec = codecs.CODECS[name]
    h = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    state = codec.prepare(h, 0)
    encoded = codec.encode(h, state)
    declared = codec.arrays(64)
    assert "features" in declared
    assert encoded.keys() == declared.keys()
    for array, (dtype, item, dimensions) in declared.items():
        assert encoded[array].numpy().dtype == np.dtype(dtype)
        assert encoded[array].shape == (2, 3, 5, *item)
        assert len(dimensions) == len(item)
    assert codec.decode(encoded, state).shape == (2, 3, 5, 64)
    assert codec.state_problem(state, 3, 64) == ""
    assert codec.encode(h[:0], state)["features"].shape[0] == 0
    assert codec.decode({"features": encoded["features"][:0]}, state).shape == (0, 3, 5, 64)


@pytest.mark.parametrize("name", ["q8", "t4", "t3"])
def test_a_width_that_cannot_be_rotated_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match="a width that 64 divides, the teacher has 100"):
        codecs.CODECS[name].arrays(100)
