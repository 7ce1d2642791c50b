"""The recipes that are written with PyTorch and timm alone are of the sizes that are asked for."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plain_steps
from featcache.errors import UsageError


def plain_batch(width: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    keep, masked = torch.arange(58).repeat(2, 1), torch.arange(58, 196).repeat(2, 1)
    images, features = (
        torch.randn(shape, generator=draw) for shape in ((2, 3, 224, 224), (2, 2, 197, width))
    )
    return {"images": images, "ids_keep": keep, "ids_masked": masked, "features": features}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", plain_steps.MODELS)
def test_a_plain_step_is_a_step(name: str) -> None:
    """Losses of the recipes that are written with PyTorch and timm alone, of the sizes that they
    take; a step runs to its end."""
    loss = plain_steps.MODELS[name]("tiny", 2, 32)(plain_batch(32))
    assert loss.ndim == 0
    assert bool(loss.isfinite())
    plain_steps.make_step(name, plain_batch(32), torch.device("cpu"), "bf16", "tiny")()
    with pytest.raises(UsageError, match=r"unknown encoder .*'huge': .*large"):
        plain_steps.make_step(name, plain_batch(32), torch.device("cpu"), "no", "huge")


# timm's vit_base has 85,798,656 parameters without its classifier and vit_large 303,301,632
@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("name", "size", "own"),
    [
        ("maskalign", "base", 85_798_656 + 2 * 12 + 2 * (768 * 1024 + 1024)),
        ("maskalign", "large", 303_301_632 + 2 * 24 + 2 * (1024 * 1024 + 1024)),
        ("mae", "base", 85_798_656 + 26_110_720),
        ("mae", "large", 303_301_632 + 26_242_304),
        ("mralign", "base", 85_798_656 + 26_110_720 + 2 * 12 + 2 * (768 * 1024 + 1024)),
    ],
)
def test_plain_models_have_the_weights_of_their_sizes(name: str, size: str, own: int) -> None:
    """MAE's decoder is 8 blocks of 3,152,384 weights, norms of the student's width and 512, Linears
    to 512 and to 768, a mask token and 197 positions."""
    with torch.device("meta"):
        model = plain_steps.MODELS[name](size, 2, 1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == own
