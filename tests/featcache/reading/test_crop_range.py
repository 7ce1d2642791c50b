"""Crops are rejected: the law against the exact one, view schedules against plain Python, and
what is read from a cache."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache import rng
from featcache.reading import crop_range
from featcache.reading.cache import Cache
from featcache.views import draw
from featcache.views.policy import Policy
from tests import student_fixtures as fx

WIDE, NARROW = (0.08, 1.0), (0.2, 1.0)
N, V = 6000, 4


def drawn(
    scale: tuple[float, float], size: tuple[int, int], ratio: tuple[float, float], name: str
) -> draw.DrawnViews:
    """Views of N pictures of one size."""
    policy = Policy(scale=scale, ratio=ratio)
    return draw.draw_views(
        policy, rng.key_digests(f"{name}{i}" for i in range(N)), np.tile(size, (N, 1)), range(V)
    )


# --- the law --------------------------------------------------------------------------------------


def test_accepted_areas_are_uniform_in_the_narrow_range() -> None:
    """Square crops of a square picture all fit, so the law is exact: areas uniform in (0.2, 1),
    each of the V views accepted with 0.8 / 0.92. Kolmogorov's distance, and the number accepted
    against the binomial law by chi-square."""
    area = drawn(WIDE, (500, 500), (1.0, 1.0), "a").area
    accepted = crop_range.in_range(area, NARROW)
    x = np.sort(area[accepted].astype(np.float64))
    cdf, steps = (x - 0.2) / 0.8, np.arange(len(x) + 1) / len(x)
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance * math.sqrt(len(x)) < 1.95  # of exactly uniform areas 1 in 1,000 has more

    p = 0.8 / 0.92
    expected = np.array([N * math.comb(V, k) * p**k * (1 - p) ** (V - k) for k in range(V + 1)])
    counts = np.bincount(accepted.sum(1), minlength=V + 1)
    expected[1], counts[1] = (
        expected[:2].sum(),
        counts[:2].sum(),
    )  # 2 and 46 pictures expected: one bin
    chi2 = ((counts[1:] - expected[1:]) ** 2 / expected[1:]).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, 1 in 1,000


def test_a_share_of_pictures_without_a_view_is_that_of_the_design() -> None:
    """(0.12 / 0.92)^4 and (0.32 / 0.92)^4 of 1,281,167 pictures: 371 and 18,752 where every try
    fits."""
    expected = [1_281_167 * (cut / 0.92) ** 4 for cut in (0.12, 0.32)]
    assert expected == pytest.approx([371, 18_752], abs=0.5)
    area = drawn(WIDE, (500, 500), (1.0, 1.0), "a").area
    none = (~crop_range.in_range(area, (0.4, 1.0)).any(1)).sum()
    assert abs(none - N * (0.32 / 0.92) ** 4) < 4 * math.sqrt(N * (0.32 / 0.92) ** 4)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("size", [(375, 500), (500, 500), (300, 600), (300, 900)])
def test_accepted_crops_have_the_law_of_direct_ones(size: tuple[int, int]) -> None:
    """Area, ratio, centre and flip of accepted crops, beside those of other pictures drawn at (0.2,
    1) with the usual ratios: two-sample Kolmogorov-Smirnov. Pictures of 1:3 refuse most tries; of
    those what is no centre is compared."""
    ratio = (3 / 4, 4 / 3)
    wide, direct = drawn(WIDE, size, ratio, "w"), drawn(NARROW, size, ratio, "d")
    accepted, every = crop_range.in_range(wide.area, NARROW), np.ones((N, V), bool)
    if size == (300, 900):
        # Ten failures are no longer rare. A try fits where the area is below ratio / 3, whose mean
        # is 0.338, as the ratio has mean (4/3 - 3/4) / ln(16/9): (1 - 0.258 / 0.92)^10 = 0.037 and
        # (1 - 0.138 / 0.8)^10 = 0.151.
        centre = draw.central_box(Policy(), np.array([size]))
        shares = [(each.crop == centre).all(-1).mean() for each in (wide, direct)]
        assert shares == pytest.approx([0.037, 0.151], abs=0.01)
        accepted, every = (
            ~(each.crop == centre).all(-1) & at for each, at in ((wide, accepted), (direct, every))
        )

    def features(views: draw.DrawnViews, at: np.ndarray) -> list[np.ndarray]:
        top, left, height, width = views.crop[at].astype(np.float64).T
        return [
            views.area[at],
            np.log(width / height),
            top + height / 2,
            left + width / 2,
            views.flip[at],
        ]

    ours, theirs = features(wide, accepted), features(direct, every)
    for one, other in zip(ours, theirs, strict=True):
        both = np.sort(np.concatenate([one, other]))
        distance = abs(
            np.searchsorted(np.sort(one), both, side="right") / len(one)
            - np.searchsorted(np.sort(other), both, side="right") / len(other)
        ).max()
        assert distance < 1.95 * math.sqrt((len(one) + len(other)) / (len(one) * len(other)))
    everything = features(wide, np.ones((N, V), bool))[
        0
    ]  # without rejection the law is another one
    assert (everything < 0.2).mean() > 0.1


def test_both_ends_are_included() -> None:
    area = np.array([[0.08, 0.19999, 0.2, 0.5, 0.50001, 1.0]], np.float32)
    assert crop_range.in_range(area, (0.2, 0.5)).tolist() == [
        [False, False, True, True, False, False]
    ]


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        (NARROW, WIDE, True),
        (WIDE, WIDE, True),
        (WIDE, NARROW, False),
        ((0.2, 1.0), (0.08, 0.9), False),
        ((0.9, 0.2), (0.08, 1.0), False),
    ],
)
def test_within(inner: crop_range.Scale, outer: crop_range.Scale, expected: bool) -> None:
    assert crop_range.is_within(inner, outer) is expected


# --- view schedule --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    count=st.integers(1, 6),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 10**6),
)
def test_the_schedule_is_that_of_plain_python(n: int, count: int, epoch: int, seed: int) -> None:
    """accepted[(epoch + first word of the key's digest) mod A]; in any order of the pictures and
    any batch of them."""
    random = np.random.default_rng(seed)
    accepted = random.random((n, count)) < 0.6
    accepted[np.arange(n), random.integers(0, count, n)] = True
    keys = [f"{seed}/{i}" for i in range(n)]
    digests = rng.key_digests(keys)
    schedule = crop_range.ViewSchedule.of(digests, accepted)
    batch = random.permutation(n)[: random.integers(1, n + 1)]
    expected = []
    for i in batch.tolist():
        word = int.from_bytes(
            hashlib.blake2b(keys[i].encode(), digest_size=16).digest()[:8], "little"
        )
        mine = [view for view in range(count) if accepted[i, view]]
        expected.append(mine[(epoch + word) % len(mine)])
    assert schedule.view(digests[batch], epoch).tolist() == expected
    shuffled = random.permutation(n)
    again = crop_range.ViewSchedule.of(digests[shuffled], accepted[shuffled])
    assert again.view(digests[batch], epoch).tolist() == expected


def test_every_accepted_view_equally_often() -> None:
    """12 epochs: a picture of 1, 2, 3 or 4 accepted views shows each of them 12, 6, 4 or 3 times,
    and no other."""
    accepted = np.array([[0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]], bool)
    digests = rng.key_digests("abcd")
    schedule = crop_range.ViewSchedule.of(digests, accepted)
    views_shown = np.stack([schedule.view(digests, 7 + epoch) for epoch in range(12)])
    times = [np.bincount(column, minlength=4).tolist() for column in views_shown.T]
    assert times == [[0, 12, 0, 0], [6, 0, 0, 6], [4, 4, 0, 4], [3, 3, 3, 3]]


def test_all_accepted_is_the_usual_turn() -> None:
    digests = rng.key_digests(f"k{i}" for i in range(200))
    schedule = crop_range.ViewSchedule.of(digests, np.ones((200, 3), bool))
    for epoch in (0, 1, 2**33):
        assert (
            schedule.view(digests, epoch).tolist() == draw.stored_view(digests, epoch, 3).tolist()
        )


def test_digests_that_begin_alike() -> None:
    """Three keys of one first word are told apart by the second."""
    digests = np.array([[5, 3], [5, 1], [9, 0], [5, 2]], np.uint64)
    accepted = np.eye(4, dtype=bool)
    assert crop_range.ViewSchedule.of(digests, accepted).view(digests, 11).tolist() == [0, 1, 2, 3]


# --- from a cache ---------------------------------------------------------------------------------


def test_accepted_views_of_a_cache(tmp_path: Path) -> None:
    """The sampled area decides; and the centre of a picture so long that no try fits is taken, as
    (0.2, 1) would."""
    folder = fx.save_pictures(tmp_path / "pictures", 12)
    Image.new("RGB", (400, 20), (9, 99, 200)).save(
        folder / "long.png"
    )  # its largest 4:3 box is 6.7 % of it
    fx.extract(folder, tmp_path / "cache", "--scale", "0.08,1")
    with Cache(tmp_path / "cache") as cache:
        rows = np.arange(len(cache))[::-1].copy()
        got = crop_range.accepted_views(cache, rows, (0.5, 1.0))
        area = np.stack([cache.read(rows, view, ("area",))["area"] for view in range(3)], 1)
        long = [cache.keys[row] for row in rows].index("long")
        assert area[long] == pytest.approx([20 * 27 / 8000] * 3)
        expected = area >= 0.5
        assert 0 < expected.mean() < 1
        expected[long] = True
        np.testing.assert_array_equal(got, expected)
        keys = [cache.keys[row] for row in rows]
        assert crop_range.keys_without_view(got, cache.keys, rows) == [
            key for key, row in zip(keys, got, strict=True) if not row.any()
        ]


@pytest.mark.parametrize(
    ("inner", "outer", "rejected"),
    [
        (NARROW, WIDE, 0.18),  # 82 % are accepted, and 53 % at 0.4
        ((0.4, 1.0), WIDE, 0.47),
        (WIDE, WIDE, 0.0),
    ],
)
def test_the_share_that_is_rejected_is_known_beforehand(
    inner: tuple[float, float], outer: tuple[float, float], rejected: float
) -> None:
    """Against views of other keys, of pictures of 375 x 500."""
    found = crop_range.rejected_share(inner, outer)
    assert found == pytest.approx(rejected, abs=0.005)
    views = drawn(outer, (375, 500), (3 / 4, 4 / 3), "b")
    whole = (views.crop == [0, 0, 375, 500]).all(-1)
    accepted = (views.area >= np.float32(inner[0])) | whole
    assert found == pytest.approx(1 - accepted.mean(), abs=0.012)
