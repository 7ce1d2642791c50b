"""The codecs q8, t4 and t3 on tokens and states of any kind: round trips by hypothesis, and what is
said of a state that does not belong to the codec.

L levels, T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from featcache.targets.codecs import CODECS
from tests.conftest import python
from tests.featcache.targets import reference_codec as reference

NAMES = sorted(reference.BITS)
HALVES = st.floats(-65504, 65504, width=16)


def state_of(name: str, mean: npt.NDArray[np.float32]) -> dict[str, Tensor]:
    rotation = reference.random_state(name, mean.shape[-1], np.random.default_rng(0))
    arrays = {"mean": mean, **rotation}
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}


@st.composite
def halves(draw: st.DrawFn, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """A drawn number everywhere, Gaussians of a drawn size, or all halves alike; and some numbers
    drawn one by one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = rng.integers(0, 0x7C00, shape).astype("u2") | rng.choice([0, 0x8000], shape).astype("u2")
    fill = draw(HALVES)
    kinds = [np.full(shape, fill), rng.standard_normal(shape) * fill / 8, bits.view("f2")]
    h = kinds[draw(st.integers(0, 2))].astype("f2").ravel()
    for at, value in draw(st.lists(st.tuples(st.integers(0, h.size - 1), HALVES), max_size=8)):
        h[at] = value
    return h.reshape(shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Tokens (..., L, T, D), and the means (L, D) of other ones."""
    width = draw(st.sampled_from([64, 128, 192, 320]))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=3))
    h, views = draw(halves((*shape, width))), draw(halves((3, shape[-2], width)))
    return h, views.astype("f8").mean(0).astype("f4")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_halves_come_back_as_near_as_they_can(
    name: str, case: tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]
) -> None:
    """The error of a token is the least there is, by the reference, and what float32 rounds off."""
    h, mean = case
    bits, state = reference.BITS[name], state_of(name, mean)
    coded = CODECS[name].encode(torch.from_numpy(h), state)["features"]
    found = CODECS[name].decode({"features": coded}, state)
    assert found.shape == h.shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    best = reference.encode(h, mean[:, None], arrays, bits)
    theirs = reference.decode(best, mean[:, None], arrays, bits)
    h64 = h.astype("f8")
    error, least = (np.sqrt(((x - h64) ** 2).sum(-1)) for x in (found.numpy().astype("f8"), theirs))
    rounded = 1e-6 * np.sqrt((h64**2).sum(-1) + (mean[:, None].astype("f8") ** 2).sum(-1))
    assert (error <= 1.005 * least + rounded).all()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(case=cases(), data=st.data())
def test_a_token_is_the_same_however_the_batch_is_cut(
    name: str, case: tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]], data: st.DataObject
) -> None:
    h, mean = torch.from_numpy(case[0]), torch.from_numpy(case[1])
    codec, state = CODECS[name], state_of(name, case[1])
    whole = codec.encode(h, state)["features"]
    at = data.draw(st.integers(0, h.shape[-2] - 1))
    part = codec.encode(h[..., at : at + 1, :], state)["features"]
    assert torch.equal(part, whole[..., at : at + 1, :])
    values = codec.decode({"features": whole}, state)
    one = codec.decode({"features": whole[..., at : at + 1, :]}, state)
    assert torch.equal(one, values[..., at : at + 1, :])
    level = data.draw(st.integers(0, len(mean) - 1))
    alone = state | {"mean": mean[level : level + 1]}
    cut = h[..., level : level + 1, :, :]
    assert torch.equal(codec.encode(cut, alone)["features"], whole[..., level : level + 1, :, :])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-6, 1.0, 3e4]))
def test_numbers_are_first_made_halves(name: str, seed: int, size: float) -> None:
    """Of any floating type and layout of memory."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.rand(2, 3, 64, generator=generator) * size
    state = state_of(name, np.full((2, 64), size / 2, "f4"))
    expected = CODECS[name].encode(h.half(), state)["features"]
    turned = h.transpose(0, 2).contiguous().transpose(0, 2)
    for given_h in (h, turned, h.half().double()):
        assert torch.equal(CODECS[name].encode(given_h, state)["features"], expected)


LEVELS = 2


def good(name: str) -> dict[str, Tensor]:
    view = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    return CODECS[name].prepare([view], 0)


def changed(array: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    array = array.clone()
    array[at] = value
    return array


WRONG = {
    "a mean is NaN": lambda s: {"mean": changed(s["mean"], (1, 63), float("nan"))},
    "a mean is infinite": lambda s: {"mean": changed(s["mean"], (0, 0), float("inf"))},
    "a level is missing": lambda s: {"mean": s["mean"][:1]},
    "the mean is of another width": lambda s: {"mean": s["mean"][:, :32]},
    "the mean is of doubles": lambda s: {"mean": s["mean"].double()},
    "a sign is 0": lambda s: {"signs": changed(s["signs"], (3, 5), 0)},
    "a sign is 2": lambda s: {"signs": changed(s["signs"], (0, 0), 2)},
    "signs of three rounds": lambda s: {"signs": s["signs"][:3]},
    "signs are wide": lambda s: {"signs": s["signs"].int()},
    "a channel comes twice": lambda s: {
        "order": changed(s["order"], (2, 0), int(s["order"][2, 1]))
    },
    "a channel is past the end": lambda s: {"order": changed(s["order"], (0, 7), 64)},
    "a channel is negative": lambda s: {"order": changed(s["order"], (3, 7), -1)},
    "the order is of another type": lambda s: {"order": s["order"].long()},
    "the order is flat": lambda s: {"order": s["order"].flatten()},
    "a number of the table is another": lambda s: {
        "table": changed(s["table"], (17,), float(s["table"][17]) + 1e-6)
    },
    "the table is short": lambda s: {"table": s["table"][:255]},
    "the table is of doubles": lambda s: {"table": s["table"].double()},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_good_state_has_no_problem(name: str) -> None:
    assert CODECS[name].state_problem(good(name), LEVELS, 64) == ""


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_state_has_one(name: str, wrong: str) -> None:
    state = good(name)
    part = WRONG[wrong](state)
    problem = CODECS[name].state_problem(state | part, LEVELS, 64)
    assert next(iter(part)) in problem


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_things_has_a_problem(name: str) -> None:
    codec, state = CODECS[name], good(name)
    for missing in ("mean", "signs", "order", "table"):
        left = {key: array for key, array in state.items() if key != missing}
        assert missing in codec.state_problem(left, LEVELS, 64)
    assert codec.state_problem({}, LEVELS, 64)
    assert codec.state_problem(state, LEVELS, 128)
    assert codec.state_problem(state, LEVELS + 1, 64)


@pytest.mark.parametrize(("name", "other"), [("q8", "t4"), ("t4", "t3"), ("t3", "q8")])
def test_the_state_of_another_codec_has_a_problem(name: str, other: str) -> None:
    assert "table" in CODECS[name].state_problem(good(other), LEVELS, 64)


ONCE = """
import torch
from featcache.targets.codecs import CODECS
h = torch.randn(2, 1, 65, 64)
for name in ("q8", "t4", "t3"):
    state = CODECS[name].prepare(h, 0)
    CODECS[name].decode(CODECS[name].encode(h, state), state)
"""


@pytest.mark.slow
def test_loops_are_compiled_once_for_all_processes(tmp_path: Path) -> None:
    """What the first has compiled, the others find: nothing more is kept by them."""
    kept = []
    for _ in range(3):
        ran = python(ONCE, NUMBA_CACHE_DIR=str(tmp_path))
        assert ran.returncode == 0, ran.stderr
        kept.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert kept[0]
    assert kept[1] == kept[2] == kept[0]
