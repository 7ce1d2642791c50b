"""Checksums of rows against crc32c worked out byte by byte, and where each number stands.

n items, L levels, T tokens, D channels, P patches.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.storage import checksums
from featcache.storage.store import Array

L, T, D, P = 2, 3, 4, 5
ROW_VIEW = ("row", "view")
SPECS = [
    Array("features", "<f2", (L, T, D), (*ROW_VIEW, "level", "token", "channel"), split=True),
    Array("feature_stats", "<f4", (L, T, 2), (*ROW_VIEW, "level", "token", "mean_std"), split=True),
    Array("attention", "<f4", (P,), (*ROW_VIEW, "patch")),
    Array("flip", "|u1", (), ROW_VIEW),
    Array("thumbnail", "|u1", (2, 2, 3), (*ROW_VIEW, "y", "x", "rgb")),
    Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
]


def castagnoli(data: bytes) -> int:
    """crc32c by its definition: the reflected polynomial 0x82F63B78, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def items(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {spec.name: random.integers(0, 99, (n, *spec.item)).astype(spec.dtype) for spec in SPECS}


def test_the_scalar_crc_is_that_of_the_standard() -> None:
    # RFC 3720, B.4 gives others; this is the catalogue's check value
    assert castagnoli(b"123456789") == 0xE3069283
    assert castagnoli(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_columns_are_by_name() -> None:
    """Two levels of feature_stats, one number for each of the others; `features` has its own array.
    A manifest is sorted, so the order in which the arrays come must not matter."""
    assert checksums.side_columns(SPECS) == {
        "attention": 0,
        "feature_stats": 1,
        "flip": 3,
        "source_size": 4,
        "thumbnail": 5,
        "": 6,
    }
    assert checksums.side_columns(SPECS[::-1]) == checksums.side_columns(SPECS)
    declared = checksums.checksum_arrays(SPECS, L, T, ranked=True)
    assert checksums.side_columns([*SPECS, *declared]) == checksums.side_columns(SPECS)
    assert checksums.side_columns([]) == {"": 0}


@pytest.mark.parametrize("ranked", [False, True])
def test_declared_arrays(ranked: bool) -> None:
    expected = [
        Array("row_crc", "<u4", (2,), ("row", "view", "level")),
        Array("side_crc", "<u4", (6,), ("row", "view", "array")),
        Array("prefix_crc", "<u4", (3, 2), ("row", "view", "prefix", "level"), split=True),
    ]
    assert checksums.checksum_arrays(SPECS, L, T, ranked=ranked) == expected[: 2 + ranked]
    assert {spec.name for spec in expected} == set(checksums.NAMES)


def test_levels_are_told_by_their_dimensions() -> None:
    assert [spec.name for spec in SPECS if checksums.has_levels(spec)] == [
        "features",
        "feature_stats",
    ]


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_every_number_is_the_crc_of_its_bytes(ranked: bool, n: int) -> None:
    given = items(n)
    specs = [*SPECS, *checksums.checksum_arrays(SPECS, L, T, ranked=ranked)]
    got = checksums.compute_checksums(specs, given)
    assert got.keys() == {"row_crc", "side_crc", *(["prefix_crc"] if ranked else [])}
    assert {values.dtype for values in got.values()} == {np.dtype(np.uint32)}
    assert got["row_crc"].shape == (n, L)
    assert got["side_crc"].shape == (n, 6)
    for i in range(n):
        for level in range(L):
            assert got["row_crc"][i, level] == castagnoli(given["features"][i, level].tobytes())
            assert got["side_crc"][i, 1 + level] == castagnoli(
                given["feature_stats"][i, level].tobytes()
            )
            for token in range(T if ranked else 0):
                prefix = given["features"][i, level, : token + 1].tobytes()
                assert got["prefix_crc"][i, token, level] == castagnoli(prefix)
        for column, name in {0: "attention", 3: "flip", 4: "source_size", 5: "thumbnail"}.items():
            assert got["side_crc"][i, column] == castagnoli(given[name][i].tobytes())
    if ranked:
        assert got["prefix_crc"].shape == (n, T, L)
        np.testing.assert_array_equal(got["prefix_crc"][:, -1], got["row_crc"])


def test_side_arrays_count_in_their_stored_dtype_and_in_c_order() -> None:
    given = items(4)
    specs = [*SPECS, *checksums.checksum_arrays(SPECS, L, T, ranked=True)]
    expected = checksums.compute_checksums(specs, given)
    other = {
        name: np.asfortranarray(np.repeat(values, 2, 0)[::2]) for name, values in given.items()
    }
    other["attention"] = other["attention"].astype(np.float64)
    other["source_size"] = other["source_size"].astype(np.int64)
    for name, values in checksums.compute_checksums(specs, other).items():
        np.testing.assert_array_equal(values, expected[name])


@given(
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from(["|u1", "<f2", "<f4", "<u8"]),
)
def test_levels_of_any_shape(n: int, levels: int, width: int, dtype: str) -> None:
    values = np.random.default_rng(n).integers(0, 99, (n, levels, width)).astype(dtype)
    expected = [
        [castagnoli(values[i, level].tobytes()) for level in range(levels)] for i in range(n)
    ]
    got = checksums.level_crcs(values)
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, np.array(expected, np.uint32).reshape(n, levels))
