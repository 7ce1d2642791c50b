"""MR-Align is MaskAlign's half plus MAE's half: checked against the second implementations of
both."""

from __future__ import annotations

import pytest
import torch

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import mralign
from student.training import optim
from tests.student.recipes.test_mae import reference_pixels
from tests.student.recipes.test_maskalign import reference_loss
from tests.student.recipes.test_recipes import first_losses, tiny_batch, tiny_model, trained


@pytest.mark.parametrize(("align", "pixel"), [(0.5, 0.5), (0.9, 0.2)])
def test_loss_and_gradients_equal_the_second_implementation(align: float, pixel: float) -> None:
    model, _ = tiny_model("mralign", f"align_weight={align}", f"pixel_weight={pixel}")
    batch = tiny_batch()
    out = model(batch)
    parameters = trained(model)
    got = torch.autograd.grad(out["loss"], list(parameters.values()))
    copies = {
        name: x.clone().requires_grad_(name in parameters) for name, x in model.state_dict().items()
    }
    aligned, pixels = (
        reference_loss(copies, batch, {2: 0.5, 3: 0.5}),
        reference_pixels(copies, batch),
    )
    expected_loss = align * aligned + pixel * pixels
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in parameters])
    torch.testing.assert_close(out["loss"], expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(out["align"], aligned.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out["pixel"], pixels.detach(), rtol=1e-12, atol=0)
    for name, a, b in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_first_losses() -> None:
    """Three steps of AdamW at 1e-2; the second implementation, with AdamW written out, gives the
    same numbers."""
    assert first_losses("mralign") == pytest.approx(
        [1.0939209516646, 0.9753431962184, 0.9262030797436], rel=1e-8
    )


@pytest.mark.slow
def test_size_of_the_base_model() -> None:
    """Encoder 85,798,656 + head 2,953,020 (MaskAlign's test) + decoder 26,109,184 (MAE's test); all
    but positions."""
    model = mralign.Model(mralign.Config())
    assert sum(x.numel() for x in model.parameters()) == 114_860_860
    assert sum(x.numel() for x in trained(model).values()) == 114_860_860 - 151_296 - 100_864


def test_settings() -> None:
    given = mralign.Config()
    assert given.visible == 49
    assert optim.peak_lr(given, 1024) == pytest.approx(6e-4)
    assert mralign.needs(given) == recipes.TargetSpec(
        teacher="clip-b16",
        levels=(8, 9, 10, 11, 12),
        fields=("features", "attention"),
        patches=196,
        visible_only=True,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align_weight=0", "pixel_weight=0"], "nothing to learn"),
        (["align_weight=-1"], "align_weight: given -1"),
        (["mask_ratio=0"], "leaves all 196 patches visible"),
        (["decoder_width=510"], "decoder_width=510"),
        (["level_weights=five"], "unknown level_weights"),
    ],
)
def test_what_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(mralign.Config, settings)
