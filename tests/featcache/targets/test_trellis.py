"""The codecs q8, t4 and t3 held against the reference in numpy float64 and its golden bytes.

L levels, T tokens, D width, k bits a value.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from featcache.targets import trellis
from featcache.targets.codecs import CODECS
from tests.featcache.targets import reference_codec as reference
from tests.golden import make_codecs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/codecs.json").read_text("utf-8"))
NAMES = sorted(reference.BITS)
WIDTHS = (64, 192, 384, 768, 1024, 1408)
# Relative mean squared error of a residual: the most it may be, over many tokens.
BOUNDS = {"q8": 6e-5, "t4": 7e-3, "t3": 2.4e-2}


def state_of(name: str, mean: npt.NDArray[np.float32], seed: int) -> reference.State:
    """Means (L, D) with a rotation by numpy, not by the codec."""
    return {
        "mean": mean,
        **reference.random_state(name, mean.shape[-1], np.random.default_rng(seed)),
    }


def tensors(state: reference.State) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array.copy()) for key, array in state.items()}


def encoded(name: str, h: npt.NDArray[np.float16], state: dict[str, Tensor]) -> Tensor:
    return CODECS[name].encode(torch.from_numpy(h), state)["features"]


def decoded(name: str, coded: Tensor, state: dict[str, Tensor]) -> npt.NDArray[np.float32]:
    h = CODECS[name].decode({"features": coded}, state)
    assert h.dtype == torch.float32
    return h.numpy()


def lost(found: npt.NDArray, h: npt.NDArray, mean: npt.NDArray) -> npt.NDArray[np.float64]:
    """The squared error of every token over the square of its residual; means (L, 1, D)."""
    residual = h.astype("f8") - mean
    return ((found - h.astype("f8")) ** 2).sum(-1) / (residual**2).sum(-1)


def gaussian(width: int, levels: int = 2, tokens: int = 24) -> tuple[npt.NDArray, npt.NDArray]:
    """Two pictures' tokens (2, L, T, D) in fp16, and the means (L, D) that they scatter about."""
    rng = np.random.default_rng(width)
    mean = rng.standard_normal((levels, width)).astype("f4")
    return (rng.standard_normal((2, levels, tokens, width)) + mean[:, None]).astype("f2"), mean


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_decodes_our_bytes_to_what_we_decode(name: str, width: int) -> None:
    bits, (h, mean) = reference.BITS[name], gaussian(width)
    state = state_of(name, mean, seed=1)
    coded = encoded(name, h, tensors(state))
    assert coded.dtype == torch.uint8
    assert coded.shape == (2, 2, 24, 4 + bits * width // 8)
    ours = decoded(name, coded, tensors(state))
    theirs = reference.decode(coded.numpy(), mean[:, None], state, bits)
    rms = np.sqrt((h.astype("f8") ** 2).mean(-1, keepdims=True))
    assert (np.abs(ours - theirs) / rms).max() < 1e-5


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_we_decode_the_references_bytes_with_the_error_it_predicts(name: str, width: int) -> None:
    bits, (h, mean) = reference.BITS[name], gaussian(width)
    state = state_of(name, mean, seed=2)
    coded = reference.encode(h, mean[:, None], state, bits)
    predicted = reference.predicted_error(h, mean[:, None], coded, state, bits)
    ours = decoded(name, torch.from_numpy(coded), tensors(state))
    np.testing.assert_allclose(lost(ours, h, mean[:, None]), predicted, rtol=1e-4)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_our_streams_are_as_good_as_the_best(name: str, width: int) -> None:
    """The reference's search is the best there is; two streams may be as good as float32 tells. An
    equal distance leaves an error that differs a little, by the scale."""
    bits, (h, mean) = reference.BITS[name], gaussian(width)
    state = state_of(name, mean, seed=3)
    u, rms, _ = reference.divided(h, mean[:, None], state)
    coded = encoded(name, h, tensors(state)).numpy()
    best = reference.encode(h, mean[:, None], state, bits)
    v, v_best = (state["table"][reference.windows(c[..., 4:], bits)] for c in (coded, best))
    assert (((u - v) ** 2).sum(-1) < ((u - v_best) ** 2).sum(-1) * (1 + 1e-5)).all()
    scale = np.ascontiguousarray(coded[..., :4]).view("<f4")[..., 0]
    np.testing.assert_allclose(scale, rms * (u**2).sum(-1) / (u * v).sum(-1), rtol=2.5e-4)
    ours = lost(decoded(name, torch.from_numpy(coded), tensors(state)), h, mean[:, None])
    theirs = lost(reference.decode(best, mean[:, None], state, bits), h, mean[:, None])
    np.testing.assert_allclose(ours, theirs, rtol=0.01)
    if name == "q8":
        assert (coded[..., 4:] == best[..., 4:]).mean() >= 0.999


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", sorted(GOLDEN, key=int))
def test_golden_bytes_decode_to_golden_values(width: str, name: str) -> None:
    h, state, coded, expected = golden(width, name)
    found = decoded(name, torch.from_numpy(coded), tensors(state))
    # Of float32: a token of zeros is its mean and a residual that cancel.
    rms = np.sqrt(np.maximum(expected.astype("f8") ** 2, state["mean"] ** 2).mean(-1))
    assert (np.abs(found - expected).max(-1) <= 1e-5 * rms).all()
    ours = encoded(name, h, tensors(state))
    if name == "q8":
        assert (ours.numpy()[..., 4:] == coded[..., 4:]).mean() >= 0.999
    again = decoded(name, ours, tensors(state)).astype("f8")
    error, golden_error = (np.linalg.norm(d - h.astype("f8"), axis=-1) for d in (again, expected))
    assert (error <= golden_error * 1.005 + 1e-6 * rms * h.shape[-1] ** 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_the_golden_one(name: str) -> None:
    h, _ = gaussian(64)
    state = CODECS[name].prepare([torch.from_numpy(view) for view in h], 0)
    assert np.array_equal(state["table"].numpy(), reference.table(name))


def golden(width: str, name: str) -> tuple[npt.NDArray, reference.State, npt.NDArray, npt.NDArray]:
    """Tokens, state, bytes and decoded values; one level."""
    case = GOLDEN[width]
    parts = {key: make_codecs.read(case[key]) for key in ("h", "mean", "signs", "order")}
    state = {key: parts[key] for key in ("signs", "order")}
    state |= {"mean": parts["mean"][None], "table": reference.table(name)}
    coded, values = (make_codecs.read(case[name][key])[None] for key in ("coded", "decoded"))
    return parts["h"][None], state, coded, values


def spiked(h: npt.NDArray, rng: np.random.Generator, *, per_token: bool) -> npt.NDArray[np.float64]:
    """Four channels of 60 times the rest, the same for all tokens of a level or others for each."""
    spikes = np.zeros(h.shape if per_token else (*h.shape[1:-2], 1, h.shape[-1]))
    at = rng.random(spikes.shape).argsort(-1)[..., :4]
    np.put_along_axis(spikes, at, rng.choice([-60.0, 60.0], at.shape), -1)
    return h + spikes


KINDS = ("gaussian", "channels", "tokens", "zero", "constant")


def tokens(kind: str, width: int) -> tuple[npt.NDArray, npt.NDArray]:
    """Views (2, L, T, D) to prepare by, and tokens of a kind; many levels, so that many means."""
    rng = np.random.default_rng(width)
    views = rng.standard_normal((2, 16, 4, width)) + rng.standard_normal((16, 1, width))
    if kind in ("channels", "tokens"):
        views = spiked(views, rng, per_token=kind == "tokens")
    h = {
        "zero": np.zeros(views.shape),
        "constant": np.broadcast_to(rng.standard_normal((*views.shape[:-1], 1)) * 3, views.shape),
    }.get(kind, views)
    return views.astype("f2"), h.astype("f2")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_has_a_bound_whatever_the_tokens_are(name: str, width: int, kind: str) -> None:
    views, h = tokens(kind, width)
    state = CODECS[name].prepare([torch.from_numpy(view) for view in views], 5)
    found = decoded(name, encoded(name, h, state), state)
    assert lost(found, h, state["mean"].numpy()[:, None]).mean() <= BOUNDS[name]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_residual_of_zero_decodes_to_exactly_the_mean(name: str, width: int) -> None:
    _, mean = gaussian(width)
    mean = mean.astype("f2").astype("f4")
    state = tensors(state_of(name, mean, seed=6))
    h = np.repeat(mean[:, None], 3, axis=1).astype("f2")
    h[:, 1] += 1  # a token between them that is not the mean
    coded = encoded(name, h, state)
    assert coded.any(-1).tolist() == [[False, True, False]] * 2
    assert np.array_equal(decoded(name, coded, state)[:, ::2], h[:, ::2].astype("f4"))


@pytest.mark.parametrize("name", NAMES)
def test_no_channel_is_biased(name: str) -> None:
    """Within five standard errors, of 64 channels and 4,000 tokens."""
    h = np.random.default_rng(7).standard_normal((1, 4000, 64)).astype("f2")
    state = tensors(state_of(name, np.zeros((1, 64), "f4"), seed=7))
    error = (decoded(name, encoded(name, h, state), state) - h.astype("f8"))[0]
    assert (np.abs(error.mean(0)) < 5 * error.std(0) / len(error) ** 0.5).all()
    # A token is not shorter on average: the error is orthogonal to it.
    across = (error * h[0]).sum(1) / (h[0].astype("f8") ** 2).sum(1)
    assert np.abs(across).max() < 2.5e-4  # 12 bits of the scale say something else


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_is_of_all_tokens_of_all_views(name: str) -> None:
    """In float64, so that it is the same whatever the order; sums of halves are exact there."""
    rng = np.random.default_rng(8)
    sizes = 10.0 ** rng.integers(-4, 5, (5, 3, 7, 64))  # more than float32 sums
    views = (rng.standard_normal(sizes.shape) * sizes).astype("f2")
    sample = [torch.from_numpy(view) for view in views]
    expected = views.astype("f8").mean((0, 2)).astype("f4")
    for given in (sample, iter(sample), sample[::-1], [view.float() for view in sample]):
        state = CODECS[name].prepare(given, 1)
        assert state["mean"].dtype == torch.float32
        assert np.array_equal(state["mean"].numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_rotation_is_of_width_and_seed_alone(name: str) -> None:
    def rotation(seed: int, width: int = 192, levels: int = 1, codec: str = name) -> bytes:
        view = torch.randn(levels, 2, width, generator=torch.Generator().manual_seed(levels))
        torch.rand(levels)  # the global generator has no part in it
        state = CODECS[codec].prepare([view], seed)
        signs, order = state["signs"].numpy(), state["order"].numpy()
        assert (signs.dtype, order.dtype) == (np.int8, np.int32)
        assert np.array_equal(np.abs(signs), np.ones((4, width)))
        assert np.array_equal(np.sort(order), np.tile(np.arange(width), (4, 1)))
        # All four rounds differ, and nearly half of the signs are negative.
        assert len({row.tobytes() for row in [*signs, *order]}) == 8
        assert 0.4 < (signs < 0).mean() < 0.6
        return signs.tobytes() + order.tobytes()

    assert rotation(3) == rotation(3, levels=4)
    assert {rotation(3, codec=other) for other in NAMES} == {rotation(3)}
    assert len({rotation(seed) for seed in (0, 1, 2, 2**40)}) == 4


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("width", [16, 64, 192, 768])  # no place may lie beyond the narrowest
@pytest.mark.parametrize("name", NAMES)
def test_without_a_compiler_the_bytes_and_values_are_the_same(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, mean = gaussian(width)
    state = tensors(state_of(name, mean, seed=9))
    compiled = encoded(name, h, state)
    values = decoded(name, compiled, state)
    asked = []
    monkeypatch.setattr(trellis, "_compiles", lambda *a, **k: bool(asked.append(1)))
    plain = encoded(name, h, state)
    assert np.array_equal(plain.numpy(), compiled.numpy())
    assert np.array_equal(decoded(name, plain, state), values)
    assert asked


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads begin in the middle of a level's tokens; each token is given its own mean."""
    h, mean = gaussian(64, levels=3, tokens=67)
    state = tensors(state_of(name, mean, seed=10))
    results = []
    for threads in (1, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        coded = encoded(name, h, state)
        results.append((coded.numpy().tobytes(), decoded(name, coded, state).tobytes()))
    assert results[1:] == results[:1] * 2
    assert lost(decoded(name, coded, state), h, mean[:, None]).mean() <= BOUNDS[name]
