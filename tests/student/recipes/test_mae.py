"""MAE equals a second implementation of its text; its size and first losses are literals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import mae
from tests.student.models.test_vit import Weights, layer_norm, reference_decode, reference_encode
from tests.student.recipes.test_recipes import first_losses, tiny_batch, tiny_model, trained


def parts_of(w: Weights, part: str) -> Weights:
    return {
        name.removeprefix(part + "."): x for name, x in w.items() if name.startswith(part + ".")
    }


def reference_pixels(w: Weights, batch: dict[str, Tensor], normalise: bool = True) -> Tensor:
    """Compute per hidden patch the mean squared error, then sum(loss * mask) / sum(mask); also
    MR-Align's second half."""
    encoder, decoder = parts_of(w, "encoder"), parts_of(w, "decoder")
    last = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)[-1]
    tokens = layer_norm(last, encoder["norm.weight"], encoder["norm.bias"])
    pred = reference_decode(decoder, tokens, batch["ids_keep"], heads=2, depth=2)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, ids in enumerate(batch["ids_masked"].tolist()):
        for i in ids:
            top, left = 4 * (i // 4), 4 * (i % 4)
            target = (
                batch["images"][b, :, top : top + 4, left : left + 4].permute(1, 2, 0).reshape(48)
            )
            if normalise:
                centred = target - target.sum() / 48
                target = centred / ((centred**2).sum() / 47 + 1e-6).sqrt()
            total, count = total + ((pred[b, i] - target) ** 2).sum() / 48, count + 1
    return total / count


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_and_gradients_equal_the_second_implementation(normalise: bool) -> None:
    model, _ = tiny_model("mae", f"norm_pix={str(normalise).lower()}")
    batch = tiny_batch()
    loss = model(batch)["loss"]
    parameters = trained(model)
    got = torch.autograd.grad(loss, list(parameters.values()))
    copies = {
        name: x.clone().requires_grad_(name in parameters) for name, x in model.state_dict().items()
    }
    expected_loss = reference_pixels(copies, batch, normalise)
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in parameters])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, a, b in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_first_losses() -> None:
    """Three steps of AdamW at 1e-2; the second implementation, with AdamW written out, gives the
    same numbers."""
    assert first_losses("mae") == pytest.approx(
        [1.1565718529909, 1.0246068075918, 0.9849834219925], rel=1e-8
    )


@pytest.mark.slow
def test_size_of_the_base_model() -> None:
    """Worked out by hand; the encoder as in MaskAlign's test.

    encoder                                            85,798,656   151,296 of them fixed positions
    decoder_embed       768 * 512 + 512                   393,728
    mask_token                                                512
    decoder_pos_embed   197 * 512                         100,864   fixed
    8 blocks            8 * (12 * 512^2 + 13 * 512)    25,219,072
    decoder_norm        2 * 512                             1,024
    decoder_pred        512 * 768 + 768                   393,984
                                                total  111,907,840
    """
    model = mae.Model(mae.Config())
    assert sum(x.numel() for x in model.parameters()) == 111_907_840
    assert sum(x.numel() for x in trained(model).values()) == 111_907_840 - 151_296 - 100_864


def test_needs_no_cache() -> None:
    assert mae.needs(mae.Config()) == recipes.TargetSpec(
        teacher="", levels=(), fields=(), patches=196
    )
    attentive = mae.needs(mae.Config(mask="attentive"))
    assert (attentive.teacher, attentive.levels, attentive.fields) == (
        "clip-b16",
        (),
        ("attention",),
    )


def test_visible_pixels_are_not_targets() -> None:
    """Scaling the decoder's output to nothing leaves the mean of the squared targets: 47/48,
    whatever is visible."""
    model, _ = tiny_model("mae")
    with torch.no_grad():
        model.get_parameter("decoder.decoder_pred.weight").zero_()
        model.get_parameter("decoder.decoder_pred.bias").zero_()
    assert model(tiny_batch())["loss"].item() == pytest.approx(47 / 48, rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mask_ratio=0", "leaves all 196 patches visible"),
        ("decoder_heads=7", "decoder_width=512, decoder_heads=7"),
    ],
)
def test_what_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(mae.Config, [setting])
