"""Targets against numpy in float64: normalised levels, the [CLS] attention, mask orders, derived
targets."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache import rng
from featcache.errors import UsageError, UserError
from featcache.targets import derived, levels
from featcache.targets.attention import ORDERS, cls_attention, mask_order


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalise_is_the_whole_formula(dtype: torch.dtype) -> None:
    y = torch.from_numpy(draw(2, 5, 24, scale=3) + 2).to(dtype)
    h, stats = levels.normalise(y)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert h.dtype == stats.dtype == kept
    assert h.shape == (2, 5, 24)
    assert stats.shape == (2, 5, 2)
    exact = y.double().numpy()
    mean = exact.mean(-1)
    std = np.sqrt(exact.var(-1, ddof=0) + 1e-5)
    tolerance = 1e-12 if kept == torch.float64 else 2e-6
    np.testing.assert_allclose(stats[..., 0].double(), mean, atol=10 * tolerance)
    np.testing.assert_allclose(stats[..., 1].double(), std, rtol=tolerance)
    np.testing.assert_allclose(
        h.double(), (exact - mean[..., None]) / std[..., None], atol=10 * tolerance
    )


def test_normalise_by_hand() -> None:
    """(1, 3): mean 2, biased variance 1, divisor sqrt(1.00001)."""
    h, stats = levels.normalise(torch.tensor([[[1.0, 3.0]]], dtype=torch.float64))
    divisor = 1.00001**0.5
    np.testing.assert_allclose(stats.numpy(), [[[2.0, divisor]]], rtol=1e-15)
    np.testing.assert_allclose(h.numpy(), [[[-1 / divisor, 1 / divisor]]], rtol=1e-15)


def test_the_stored_pair_gives_y_back() -> None:
    y = torch.from_numpy(draw(3, 4, 64, scale=5)).float()
    y[..., 7] *= 60  # an outlier channel, as CLIP has
    h, stats = levels.normalise(y)
    torch.testing.assert_close(h * stats[..., 1:] + stats[..., :1], y, rtol=1e-5, atol=1e-4)


def test_a_constant_token_is_all_zeros_with_divisor_sqrt_eps() -> None:
    h, stats = levels.normalise(torch.full((1, 1, 8), 4.0))
    assert h.abs().max() == 0
    np.testing.assert_allclose(stats[0, 0], [4.0, 1e-5**0.5], rtol=1e-6)


def test_moments_are_those_of_all_numbers_of_a_level() -> None:
    """From the stored pairs alone, in two parts that are added: numpy's mean and unbiased variance
    of y itself."""
    y = draw(6, 3, 5, 24, scale=3) + np.array([0.0, 2.0, -40.0])[:, None, None]  # (n, L, T, D)
    y[..., 7] *= 60
    _, stats = levels.normalise(torch.from_numpy(y))
    pieces = [levels.moment_sums(part.numpy(), 24) for part in (stats[:2], stats[2:])]
    found = levels.moments(pieces[0] + pieces[1])
    expected = [[y[:, level].mean(), y[:, level].var(ddof=1)] for level in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_moments_by_hand() -> None:
    """Tokens (1, 3) and (5, 5): mean 3.5, squares of deviations 6.25 + 0.25 + 2.25 + 2.25 = 11,
    over 3."""
    _, stats = levels.normalise(torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], dtype=torch.float64))
    np.testing.assert_allclose(
        levels.moments(levels.moment_sums(stats.numpy()[:, None], 2)), [[3.5, 11 / 3]], rtol=1e-7
    )


def test_cls_attention_is_an_explicit_softmax_in_float64() -> None:
    batch, tokens, heads, width = 2, 7, 3, 12
    q, k = draw(batch, width, seed=1), draw(batch, tokens, width, seed=2)
    expected = np.zeros((batch, tokens))
    for b in range(batch):
        for head in range(heads):
            part = slice(head * 4, head * 4 + 4)
            logits = k[b, :, part] @ q[b, part] / 2.0  # sqrt(4)
            weights = np.exp(logits - logits.max())
            expected[b] += weights / weights.sum() / heads
    for prefix in (1, 3):
        got = cls_attention(torch.tensor(q), torch.tensor(k), heads, prefix)
        assert got.dtype == torch.float32
        assert got.shape == (batch, tokens - prefix)
        np.testing.assert_allclose(got, expected[:, prefix:], rtol=1e-6)


def test_attention_of_a_wide_range_does_not_underflow_early() -> None:
    """METHODS 0.3: weights stay in fp32 even where the teacher runs in half precision."""
    q = torch.tensor([[1.0]], dtype=torch.float16)
    k = torch.tensor([[[0.0], [0.0], [-25.0]]], dtype=torch.float16)
    got = cls_attention(q, k, 1)
    assert got[0, 1] == pytest.approx(np.exp(-25.0) / (2 + np.exp(-25.0)), rel=1e-5)


DIGESTS = rng.key_digests(["n01/x.y", "other"])
ATTENTION = np.float32([[0.05, 0.2, 0.1, 0.2, 0.0, 0.15], [0.1, 0.1, 0.1, 0.3, 0.2, 0.1]])

LITERAL_ATTENTIVE = [[1, 3, 5, 2, 0, 4], [4, 1, 5, 3, 0, 2]]  # by numpy's Philox
LITERAL_UNIFORM = [[1, 3, 4, 0, 2, 5], [1, 2, 0, 4, 3, 5]]


def numpy_words(key: str, purpose: str, seed: int, view: int, count: int) -> list[int]:
    pair = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u8")
    stream = int.from_bytes(
        hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest(), "little"
    )
    start = (view << 64) + (stream << 192) - 1
    return [int(w) for w in np.random.Philox(key=pair, counter=start % 2**256).random_raw(count)]


def test_orders_by_the_documented_words() -> None:
    """numpy's Philox, then each order's own rule."""
    for row, (key, view) in enumerate([("n01/x.y", 2), ("other", 0)]):
        raw = numpy_words(key, "order:attentive", 5, view, 6)
        exponential = [-np.log(((w >> 12) + 0.5) / 2**52) for w in raw]
        with np.errstate(divide="ignore"):
            score = [
                np.log(np.float64(p)) - np.log(e)
                for p, e in zip(ATTENTION[row], exponential, strict=True)
            ]
        expected = sorted(range(6), key=lambda i: -score[i])
        got = mask_order("attentive", ATTENTION, DIGESTS, [2, 0], 5)
        assert got[row].tolist() == expected
        raw = numpy_words(key, "order:uniform", 5, view, 6)
        got = mask_order("uniform", ATTENTION, DIGESTS, [2, 0], 5)
        assert got[row].tolist() == sorted(range(6), key=lambda i: raw[i])


def test_literal_orders() -> None:
    assert mask_order("attentive", ATTENTION, DIGESTS, [2, 0], 5).tolist() == LITERAL_ATTENTIVE
    assert mask_order("uniform", ATTENTION, DIGESTS, [2, 0], 5).tolist() == LITERAL_UNIFORM
    assert mask_order("topk", ATTENTION, DIGESTS, [2, 0], 5).tolist() == [
        [1, 3, 5, 2, 0, 4],
        [3, 4, 0, 1, 2, 5],
    ]


@given(patches=st.integers(1, 300), kind=st.sampled_from(ORDERS), seed=st.integers(0, 9))
def test_every_order_is_a_permutation_of_the_smallest_type(
    patches: int, kind: str, seed: int
) -> None:
    attention = np.random.default_rng(seed).random((3, patches)).astype(np.float32)
    order = mask_order(kind, attention, rng.key_digests("abc"), [0, 1, 2], seed)
    assert order.dtype == (np.uint8 if patches <= 256 else np.uint16)
    np.testing.assert_array_equal(np.sort(order, -1), np.tile(np.arange(patches), (3, 1)))


def test_views_and_keys_have_orders_of_their_own() -> None:
    attention = np.full((4, 100), 0.01, np.float32)
    orders = mask_order(
        "attentive", attention, rng.key_digests(["a", "a", "b", "a"]), [0, 1, 0, 0], 0
    )
    assert (orders[0] == orders[3]).all()
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[0] != orders[2]).mean() > 0.9


def test_first_entries_are_the_attentive_mask_at_any_ratio() -> None:
    """P(patch among the first m) rises with its weight; by chance alone all would be m / P =
    1/2."""
    n, weights = 8000, np.float32([0.4, 0.3, 0.2, 0.1])
    order = mask_order(
        "attentive", np.tile(weights, (n, 1)), rng.key_digests(f"{i}" for i in range(n)), 0, 0
    )
    first = np.bincount(order[:, 0], minlength=4) / n
    np.testing.assert_allclose(first, weights, atol=4 * 0.5 / n**0.5)


def test_unknown_order() -> None:
    with pytest.raises(UsageError, match="did you mean attentive"):
        mask_order("atentive", ATTENTION, DIGESTS, 0, 0)


def tail_of(width: int, eps: float, projection: int | None = 5) -> dict[str, torch.Tensor]:
    tail = {
        "gamma": torch.from_numpy(1 + draw(width, seed=3) / 4),
        "beta": torch.from_numpy(draw(width, seed=4)),
        "eps": torch.tensor(eps, dtype=torch.float32),
    }
    if projection:
        tail["proj"] = torch.from_numpy(draw(width, projection, seed=5))
    return tail


@pytest.mark.parametrize(("eps", "scale"), [(1e-5, 1.0), (1e-6, 1.0), (1e-6, 0.01), (1e-12, 0.02)])
def test_derived_targets_are_the_teachers_own(eps: float, scale: float) -> None:
    """f is the final LayerNorm with its own eps on y itself, whatever eps h was stored with."""
    y = draw(2, 4, 16, seed=6, scale=scale)
    h, stats = levels.normalise(torch.from_numpy(y))
    tail = tail_of(16, eps)
    gamma, beta, proj = (tail[name].numpy() for name in ("gamma", "beta", "proj"))
    f = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps) * gamma + beta
    fd = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5)
    for name, expected in (("f", f), ("z", f @ proj), ("fd", fd)):
        got = derived.derive(name, h, tail, stats)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_clips_eps_needs_no_statistics() -> None:
    h, _ = levels.normalise(torch.from_numpy(draw(1, 2, 16)))
    assert derived.derive("f", h, tail_of(16, 1e-5)).shape == (1, 2, 16)
    with pytest.raises(UsageError, match=r"eps is 1e-06.*stats"):
        derived.derive("f", h, tail_of(16, 1e-6))


def test_what_cannot_be_derived_is_one_line() -> None:
    h = torch.zeros(1, 2, 16)
    with pytest.raises(UsageError, match="unknown derived target"):
        derived.derive("q", h, tail_of(16, 1e-5))
    with pytest.raises(UserError, match="has no proj"):
        derived.derive("z", h, tail_of(16, 1e-5, None))
    with pytest.raises(UserError):  # a teacher that tells nothing of its norm
        derived.derive("f", h, {})
