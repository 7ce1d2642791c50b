"""Masks equal literal lists from numpy's own Philox, keep the law of attentive sampling, and refuse
what they must."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest

from featcache import rng
from featcache.errors import UsageError, UserError
from student import masking
from student.config import RecipeConfig, from_overrides

KEYS = ("n01440764/a", "n01440764/b")
RAMP = (np.arange(1, 17, dtype=np.float32) / 200)[None].repeat(2, axis=0)


def numpy_words(key: str, purpose: str, seed: int, epoch: int, n: int) -> list[int]:
    """Return the words of one key from numpy's Philox, which steps its 256-bit counter before each
    block of four."""
    digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    stream = int.from_bytes(
        hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest(), "little"
    )
    counter = ((epoch << 128) + (stream << 192) - 1) % 2**256
    return [int(word) for word in np.random.Philox(counter=counter, key=digest).random_raw(n)]


def draw(name: str, **changes: Any) -> tuple[list[list[int]], list[list[int]]]:
    given = {
        "digests": rng.key_digests(KEYS),
        "seed": 7,
        "epoch": 3,
        "n_visible": 4,
        "n_patches": 16,
        **changes,
    }
    keep, masked = masking.draw(name, **given)
    assert keep.dtype == masked.dtype == np.int64
    return keep.tolist(), masked.tolist()


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.75, 49), (0.7, 58), (0.6, 78), (0.4, 117), (0.2, 156), (0.8, 39), (0.9, 19), (0.0, 196)],
)
def test_kept_counts(ratio: float, kept: int) -> None:
    assert masking.kept_count(196, ratio) == kept


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.15, 167), (0.25, 147), (0.5, 98), (0.6, 79), (0.7, 59), (0.75, 49), (0.9, 20), (0.0, 196)],
)
def test_kept_counts_where_the_hidden_are_truncated(ratio: float, kept: int) -> None:
    """CAE's RandomMaskingGenerator hides 29, 49, 98, 117, 137, 147, 176 and 0 of 196."""
    assert masking.kept_count(196, ratio, "hidden") == kept
    given = ["mask=uniform", "mask_count=hidden", f"mask_ratio={ratio}"]
    assert from_overrides(RecipeConfig, given).visible == kept


def test_golden_masks() -> None:
    """Computed once by a script that knows numpy's Philox and nothing of ours."""
    assert draw("uniform")[0] == [[0, 3, 7, 14], [6, 8, 13, 15]]
    assert draw("attentive", attention=RAMP)[0] == [[5, 8, 13, 15], [3, 13, 14, 15]]
    assert (
        draw("stored", mask_order=np.arange(15, -1, -1, dtype=np.uint8)[None].repeat(2, 0))[0]
        == [[12, 13, 14, 15]] * 2
    )


@pytest.mark.parametrize("epoch", [0, 1, 299])
def test_masks_equal_numpys_philox(epoch: int) -> None:
    uniform, attentive = (
        draw("uniform", epoch=epoch),
        draw("attentive", epoch=epoch, attention=RAMP),
    )
    for row, key in enumerate(KEYS):
        raw = numpy_words(key, "mask:uniform", 7, epoch, 16)
        assert uniform[0][row] == sorted(sorted(range(16), key=raw.__getitem__)[:4])
        raw = numpy_words(key, "mask:attentive", 7, epoch, 16)
        finish = [
            -math.log(((word >> 12) + 0.5) / 2**52) / ((i + 1) / 200) for i, word in enumerate(raw)
        ]
        assert attentive[0][row] == sorted(sorted(range(16), key=finish.__getitem__)[:4])


@pytest.mark.parametrize("name", sorted(masking.MASKS))
def test_both_parts_are_ascending_and_make_up_all_patches(name: str) -> None:
    order = (
        np.random.default_rng(0).permuted(np.arange(16)[None].repeat(2, 0), axis=1).astype(np.uint8)
    )
    keep, masked = draw(name, attention=RAMP, mask_order=order, n_visible=5)
    for seen, hidden in zip(keep, masked, strict=True):
        assert len(seen) == 5
        assert seen == sorted(seen)
        assert hidden == sorted(hidden)
        assert sorted(seen + hidden) == list(range(16))


@pytest.mark.parametrize("name", ["uniform", "attentive", "blockwise"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    whole = draw(name, attention=RAMP)[0]
    alone = draw(name, attention=RAMP[1:], digests=rng.key_digests(KEYS[1:]))[0]
    assert alone == whole[1:]
    assert draw(name, attention=RAMP, epoch=4)[0] != whole
    assert draw(name, attention=RAMP, seed=8)[0] != whole


@pytest.mark.parametrize("n_visible", [0, 16])
def test_all_or_none_visible(n_visible: int) -> None:
    keep, masked = draw("uniform", n_visible=n_visible)
    assert [len(row) for row in keep + masked] == [n_visible] * 2 + [16 - n_visible] * 2


def test_attentive_draws_without_replacement_in_proportion() -> None:
    """Ordered pairs of N = 4: P(i then j) = p_i p_j / (1 - p_i); chi-square, 11 degrees of
    freedom."""
    p, n = np.array([0.5, 0.25, 0.15, 0.1]), 24_000
    raw = rng.words(rng.key_digests(f"{i}" for i in range(n)), rng.stream("test", 0), 4)
    weights = np.tile(3 * p, (n, 1))  # not normalised, on purpose
    order = masking.attentive(rng.exponentials(raw), weights)
    chi_square = 0.0
    for i in range(4):
        for j in set(range(4)) - {i}:
            expected = n * p[i] * p[j] / (1 - p[i])
            seen = ((order[:, 0] == i) & (order[:, 1] == j)).sum()
            chi_square += (seen - expected) ** 2 / expected
    assert 3.05 < chi_square < 31.26  # its 1 % and 99.9 % points


def test_zero_weights_come_last_in_index_order() -> None:
    attention = np.zeros((50, 6), np.float32)
    attention[:, [1, 4]] = 1e-30
    raw = rng.words(rng.key_digests(f"{i}" for i in range(50)), rng.stream("test", 0), 6)
    order = masking.attentive(rng.exponentials(raw), attention)
    assert {tuple(row[:2]) for row in order.tolist()} == {(1, 4), (4, 1)}
    assert {tuple(row[2:]) for row in order.tolist()} == {(0, 2, 3, 5)}


@pytest.mark.parametrize(
    "row", [[0.0] * 16, [math.nan] + [1.0] * 15, [math.inf] + [1.0] * 15, [-1e-9] + [1.0] * 15]
)
def test_attention_that_cannot_be_sampled_names_its_row(row: list[float]) -> None:
    attention = np.stack([RAMP[0], np.array(row, np.float32)])
    with pytest.raises(UserError, match=r"attention of row 1 .*not all zero; run featcache verify"):
        draw("attentive", attention=attention)


def test_missing_or_misshapen_rows() -> None:
    with pytest.raises(
        UserError, match="mask 'attentive': its attention is nothing, needed: one row of 16 patches"
    ):
        draw("attentive")
    with pytest.raises(UserError, match=r"mask 'stored': its mask_order is shape \(2, 9\)"):
        draw("stored", mask_order=np.zeros((2, 9), np.uint8))


def test_an_order_that_is_no_permutation() -> None:
    order = np.stack([np.arange(16), np.array([3, 3, *range(14)])])
    with pytest.raises(
        UserError, match="order of row 1 holds 3 different patches among its first 4"
    ):
        draw("stored", mask_order=order)
    with pytest.raises(UserError, match="names patches 1 to 16, allowed: 0 to 15"):
        draw("stored", mask_order=np.arange(1, 17)[None].repeat(2, 0))


# --- blocks ---------------------------------------------------------------------------------------


def blocks(key: str, seed: int, epoch: int, side: int, wanted: int) -> list[int]:
    """Run the published generator in plain Python, one patch at a time, on the words of numpy's own
    Philox."""
    least = min(16, -(-16 * side * side // 196))
    hidden: set[int] = set()
    k = 0
    while True:
        words = numpy_words(key, f"mask:blockwise:{k}", seed, epoch, side * side)
        k += 1
        for t in range(side * side // 4):
            if len(hidden) == wanted:
                return sorted(hidden)
            u = [(word >> 11) / 2**53 for word in words[4 * t : 4 * t + 4]]
            left = wanted - len(hidden)
            area = least + (left - least) * u[0]
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * u[1])
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < side and w < side:
                top, first = int(u[2] * (side - h + 1)), int(u[3] * (side - w + 1))
                new = {
                    side * y + x for y in range(top, top + h) for x in range(first, first + w)
                } - hidden
                if 0 < len(new) <= left:
                    hidden |= new


@pytest.mark.parametrize(
    ("side", "visible"), [(14, 166), (14, 98), (14, 78), (16, 128), (7, 24), (4, 8), (4, 1)]
)
def test_blocks_equal_the_generator_in_plain_python(side: int, visible: int) -> None:
    patches = side * side
    keep, masked = draw("blockwise", n_visible=visible, n_patches=patches)
    for row, key in enumerate(KEYS):
        assert masked[row] == blocks(key, 7, 3, side, patches - visible)
        assert sorted(keep[row] + masked[row]) == list(range(patches))


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("wanted", "centre", "corner"),
    [(30, 0.29, 0.02), (49, 0.495, 0.03), (98, 0.86, 0.06), (118, 0.94, 0.09)],
)
def test_blocks_have_exact_counts_and_the_published_bias_to_the_centre(
    wanted: int, centre: float, corner: float
) -> None:
    """Of 3,000 masks; the expected probabilities were measured on the released generator."""
    digests = rng.key_digests(f"{i}" for i in range(3000))
    _, masked = masking.draw(
        "blockwise", digests=digests, seed=0, epoch=0, n_visible=196 - wanted, n_patches=196
    )
    assert masked.shape == (3000, wanted)
    assert (np.diff(masked, axis=1) > 0).all()  # so every picture hides exactly this many
    p = (np.bincount(masked.ravel(), minlength=196) / 3000).reshape(14, 14)
    assert p[6:8, 6:8].mean() == pytest.approx(centre, abs=0.03)
    assert np.mean([p[0, 0], p[0, 13], p[13, 0], p[13, 13]]) == pytest.approx(corner, abs=0.015)


def test_kept_counts_of_block_wise_recipes() -> None:
    """CAE v2's 15, 25, 50 and 60 % hide 30, 49, 98 and 118 patches."""
    assert [196 - masking.kept_count(196, ratio) for ratio in (0.15, 0.25, 0.5, 0.6)] == [
        30,
        49,
        98,
        118,
    ]


def test_blocks_that_cannot_be() -> None:
    with pytest.raises(UserError, match="'blockwise' on 15 patches: a square grid is needed"):
        draw("blockwise", n_patches=15)
    with pytest.raises(
        UserError, match=r"cannot hide 2 of 1 x 1 patch|cannot hide 1 of 1 x 1 patch"
    ):
        draw("blockwise", n_patches=1, n_visible=0)


def test_unknown_mask() -> None:
    with pytest.raises(
        UsageError, match=r"unknown mask 'atentive': did you mean attentive\? known: .*uniform"
    ):
        draw("atentive")


def test_fields() -> None:
    assert {name: masking.fields(name) for name in masking.MASKS} == {
        "attentive": ("attention",),
        "topk": ("attention",),
        "uniform": (),
        "stored": ("mask_order",),
        "blockwise": (),
    }
