"""Codecs: literal values and bytes, bounds, and the check for what leaves the range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache import codecs

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
    assert codec.dtype == "<f2"
    encoded = codec.encode(torch.tensor([value]))
    assert encoded.numpy().astype(codec.dtype).tobytes().hex() == stored
    decoded = codec.decode(encoded)
    assert decoded.dtype == torch.float32
    assert decoded.item() == np.frombuffer(bytes.fromhex(stored), "<f2")[0]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50))
def test_fp16_error_bound(values: list[float]) -> None:
    """Half an ulp: 2**-11 relative, 2**-25 absolute below the smallest normal number."""
    h = torch.tensor(values)
    codec = codecs.CODECS["fp16"]
    error = (codec.decode(codec.encode(h)) - h).abs().double()
    assert (error <= torch.clamp(h.abs().double() * 2**-11, min=2**-25)).all()


@given(st.integers(2, 4096))
def test_a_normalised_token_never_leaves_the_range(width: int) -> None:
    """|h| <= sqrt(D - 1), reached by a single dominant channel: 64 at 4,096 wide, far below 65,504."""
    y = torch.zeros(1, 1, width)
    y[..., 0] = 1e20
    from featcache import targets

    h, stats = targets.normalise(y.double())
    assert h.abs().max() <= (width - 1) ** 0.5 * (1 + 1e-9)
    assert not codecs.out_of_range(codecs.CODECS["fp16"].encode(h)[:, None], stats.float()[:, None])


def test_out_of_range_names_batch_and_level() -> None:
    features, stats = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 2)
    assert codecs.out_of_range(features, stats) == []
    features[1, 0, 3, 4] = float("inf")
    stats[2, 1, 0, 1] = float("nan")
    assert codecs.out_of_range(features, stats) == [(1, 0), (2, 1)]
    assert codecs.out_of_range(codecs.encode_fp16(torch.full((1, 1, 1, 1), 70000.0)), torch.zeros(1, 1, 1, 2)) == [
        (0, 0)
    ]


def test_every_codec_keeps_its_shape_and_declared_type() -> None:
    for name, codec in codecs.CODECS.items():
        encoded = codec.encode(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)))
        assert encoded.numpy().dtype == np.dtype(codec.dtype), name
        assert codec.decode(encoded).shape == (2, 3, 8), name
