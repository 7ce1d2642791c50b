"""KD equals a second implementation of its text; its size and cost are checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student import config, recipes
from student.recipes import kd
from student.training import optim
from tests.student.models.test_vit import Weights, layer_norm, linear, reference_encode
from tests.student.recipes.test_mae import parts_of
from tests.student.recipes.test_milan import squared_distance
from tests.student.recipes.test_recipes import (
    check_against,
    first_losses,
    gmac,
    parameters,
    reference_losses,
    tiny_batch,
    tiny_model,
)


def reference_loss(w: Weights, batch: dict[str, Tensor]) -> Tensor:
    """Compute the squared distance of the two directions, at CLS and the visible patches:
    (B,1+V)."""
    encoder = parts_of(w, "encoder")
    last = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)[-1]
    pred = linear(layer_norm(last, encoder["norm.weight"], encoder["norm.bias"]), w, "head")
    rows = [
        torch.stack([picture[0], *(picture[1 + i] for i in ids)])
        for picture, ids in zip(batch["targets"], batch["ids_keep"].tolist(), strict=True)
    ]
    return squared_distance(pred, torch.stack(rows))


def test_loss_and_gradients_equal_the_second_implementation() -> None:
    model, _ = tiny_model("kd")
    batch = tiny_batch()
    out = model(batch)
    check_against(model, out["loss"], lambda w: reference_loss(w, batch).mean())
    distance = reference_loss(model.state_dict(), batch)
    torch.testing.assert_close(out["cls"], distance[:, 0].mean())
    torch.testing.assert_close(out["visible"], distance[:, 1:].mean())


def test_hidden_targets_do_not_count() -> None:
    model, _ = tiny_model("kd")
    batch = tiny_batch()
    loss = model(batch)["loss"]
    # as where a ranked cache was read in part
    batch["targets"][0, 1 + batch["ids_masked"][0, 0]] = float("nan")
    assert torch.equal(model(batch)["loss"], loss)
    batch["targets"][0, 0] = -batch["targets"][0, 0]  # CLS counts
    assert not torch.equal(model(batch)["loss"], loss)


def test_first_losses() -> None:
    expected = reference_losses("kd", lambda w: reference_loss(w, tiny_batch()).mean())
    assert first_losses("kd") == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_size_and_cost() -> None:
    """Encoder 85,798,656 (MaskAlign's test) + head 768 * 512 + 512 = 393,728; 13.0 GMAC forward and
    backward. Other encoders as in MILAN's test; heads 192 * 512 + 512, 384 * 512 + 512, and 1024 *
    768 + 768 for CLIP-L/14."""
    assert parameters("kd", "encoder=tiny")[0] == 5_524_416 + 98_816
    assert parameters("kd", "encoder=small")[0] == 21_665_664 + 197_120
    assert parameters("kd", "encoder=large", "teacher_out=768")[0] == 303_301_632 + 787_200
    assert parameters("kd") == (86_192_384, 86_192_384 - 151_296)
    assert 3 * gmac("kd") == pytest.approx(13.0, rel=0.02)


def test_settings_and_needs() -> None:
    given = kd.Config()
    assert given.visible == 49
    assert optim.peak_lr(given, 4096) == pytest.approx(2.4e-3)
    expected = {"levels": (12,), "fields": ("features", "attention"), "patches": 196}
    spec = recipes.TargetSpec(teacher="clip-b16", visible_only=True, derive="z", **expected)  # type: ignore[arg-type]
    assert kd.needs(given) == spec
    assert kd.needs(config.replace(given, mask_ratio=0.0)).visible_only
