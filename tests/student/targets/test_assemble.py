"""A mask that reads what only the device knows is drawn there, to the host's bits."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from featcache import rng
from featcache.errors import UserError
from featcache.targets import attention as orders
from student import config, masking, recipes
from student.targets import assemble

READING = [name for name in masking.MASKS if masking.fields(name)]
KEYS = ("n01440764/a", "n01440764/b")


def settings_of(mask: str, ratio: float = 0.75) -> Any:
    sets = ["img_size=32", "patch_size=8", f"mask={mask}", f"mask_ratio={ratio}"]
    return config.from_overrides(recipes.load("kd").Config, sets)


def inputs(n: int) -> dict[str, np.ndarray]:
    """Attention with equal weights, zeros of both signs and all sizes of float32; orders."""
    draw = np.random.default_rng(0)
    attention = draw.random((n, 16), np.float32) ** 8
    attention[:, 3] = attention[:, 7]
    attention[::2, 5], attention[::3, 6], attention[::5, 8] = 0.0, -0.0, 1e-45
    attention[1::7, 2:14] = 0.125
    order = draw.permuted(np.arange(16, dtype=np.uint8)[None].repeat(n, 0), axis=1)
    return {"attention": attention, "mask_order": order}


@pytest.mark.parametrize("ratio", [0.75, 0.3, 0.0])
@pytest.mark.parametrize("mask", READING)
def test_masks_equal_the_hosts(mask: str, ratio: float) -> None:
    given, rows = settings_of(mask, ratio), inputs(210)
    host = {
        "digests": rng.key_digests(f"{i}" for i in range(210)),
        "round": np.arange(210) % 5,
    }
    expected = assemble.draw_masks(given, host, rows, 3)
    drawn = assemble.draw_for_masks(given, host, 3)
    tensors = {name: torch.from_numpy(values) for name, values in rows.items()}
    found = assemble.masks_on_device(given, drawn, tensors, 210)
    assert found.keys() == expected.keys()
    for name, ids in expected.items():
        assert found[name].dtype == torch.int64
        assert torch.equal(found[name], ids), name


def test_literal_masks() -> None:
    """Those of test_masking, which a script computed that knows numpy's Philox alone."""
    given = settings_of("attentive")
    host = {"digests": rng.key_digests(KEYS), "round": 3}
    ramp = (torch.arange(1, 17) / 200)[None].repeat(2, 1)
    drawn = assemble.draw_for_masks(given, host, 7)
    found = assemble.masks_on_device(given, drawn, {"attention": ramp}, 2)
    assert found["ids_keep"].tolist() == [[5, 8, 13, 15], [3, 13, 14, 15]]
    assert found["ids_masked"][0].tolist() == [0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 14]


@pytest.mark.parametrize("mask", READING)
def test_a_mask_that_reads_the_teacher_draws_exponentials_alone(mask: str) -> None:
    """What else it drew could not be copied to a device."""
    asked = set(inspect.signature(masking.MASKS[mask]).parameters)
    assert asked - set(masking.fields(mask)) <= {"exponentials"}


@pytest.mark.parametrize("shape", [(2, 9), (3, 16), None])
def test_rows_of_another_grid_are_refused_without_a_look_at_them(
    shape: tuple[int, int] | None,
) -> None:
    given = settings_of("topk")
    rows = {} if shape is None else {"attention": torch.ones(shape)}
    got = "nothing" if shape is None else f"shape {shape}"
    with pytest.raises(UserError) as told:
        assemble.masks_on_device(given, {}, rows, 2)
    assert f"its attention is {got}, needed: one row of 16 patches for each of 2" in str(told.value)


@pytest.mark.parametrize(
    ("row", "is_unfit"),
    [
        ([0.0, 0.0], True),
        ([float("nan"), 1.0], True),
        ([float("inf"), 1.0], True),
        ([-1e-9, 1.0], True),
        ([0.0, 1e-45], False),
        ([-0.0, 1.0], False),
    ],
)
def test_attention_is_told_apart_alike(row: list[float], is_unfit: bool) -> None:
    rows = np.array([[1.0, 2.0], row], np.float32)
    assert masking.unfit(rows).tolist() == [False, is_unfit]
    assert masking.unfit(torch.from_numpy(rows)).tolist() == [False, is_unfit]


@pytest.mark.parametrize("kind", orders.ORDERS)
def test_stored_orders_equal_the_hosts(kind: str) -> None:
    rows = inputs(60)["attention"]
    digests, view = rng.key_digests(f"{i}" for i in range(60)), np.arange(60) % 3
    drawn = orders.draw_for_order(kind, 16, digests, view, 4)
    found = orders.order_by(kind, torch.from_numpy(drawn), torch.from_numpy(rows))
    assert found.tolist() == orders.mask_order(kind, rows, digests, view, 4).tolist()
