"""Normalised pixels equal arithmetic by hand; outputs of blocks are read once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featcache.models.hooks import BlockOutputs, normalise_pixels, tail_arrays


@pytest.mark.parametrize("kind", [tuple, torch.tensor])
def test_pixels_less_the_mean_over_the_std(kind: type) -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 1, 2)
    got = normalise_pixels(pixels, kind((0.5, 0.2, 0.4)), kind((0.25, 0.5, 0.3)))
    expected = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(2, 3, 1, 2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_outputs_of_blocks_are_given_once() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    blocks = nn.Sequential(Double(), Double(), Double())
    outputs = BlockOutputs(list(blocks))
    blocks(torch.ones(1, 2, 3))
    first, last = outputs.take((1, 3))
    assert (first.unique().item(), last.unique().item()) == (2, 8)
    with pytest.raises(KeyError):
        outputs.take((1,))


def test_arrays_of_the_tail_are_float32() -> None:
    norm = nn.LayerNorm(2, eps=1e-5).half()
    tail = tail_arrays(norm, proj=torch.ones(2, 4, dtype=torch.float16))
    assert list(tail) == ["gamma", "beta", "proj", "eps"]
    assert [value.dtype.str for value in tail.values()] == ["<f4"] * 4
    assert tail["proj"].shape == (2, 4)
