"""MVP style equals a second implementation of its text; its size and cost are checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import mvp
from tests.student.models.test_beit import embedded, reference_encode_all
from tests.student.models.test_vit import Weights, linear
from tests.student.recipes.test_mae import parts_of
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
    """Compute 1 - cos at the hidden patches, whose embedding the token has replaced."""
    encoder = parts_of(w, "encoder")
    rows = [
        torch.stack([w["mask_token"][0, 0] if i in hidden else x[i] for i in range(16)])
        for x, hidden in zip(
            embedded(encoder, batch["images"]), batch["ids_masked"].tolist(), strict=True
        )
    ]
    pred = linear(reference_encode_all(encoder, torch.stack(rows)), w, "head")
    terms = []
    for b, hidden in enumerate(batch["ids_masked"].tolist()):
        for i in hidden:
            p, t = pred[b, 1 + i], batch["targets"][b, 1 + i]
            terms.append(1 - (p * t).sum() / ((p * p).sum() * (t * t).sum()).sqrt())
    return torch.stack(terms).sum() / len(terms)


def test_loss_and_gradients_equal_the_second_implementation() -> None:
    model, _ = tiny_model("mvp")
    batch = tiny_batch()
    check_against(model, model(batch)["loss"], lambda w: reference_loss(w, batch))


def test_hidden_pixels_and_visible_targets_do_not_count() -> None:
    model, _ = tiny_model("mvp")
    batch = tiny_batch()
    loss = model(batch)["loss"]
    row, col = divmod(int(batch["ids_masked"][0, 0]), 4)
    batch["images"][0, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] += 1
    batch["targets"][0, 1 + batch["ids_keep"][0, 0]] += 3
    batch["targets"][0, 0] += 3
    assert torch.equal(model(batch)["loss"], loss)
    batch["targets"][0, 1 + batch["ids_masked"][0, 0]] += 3
    assert not torch.equal(model(batch)["loss"], loss)


def test_first_losses() -> None:
    expected = reference_losses("mvp", lambda w: reference_loss(w, tiny_batch()))
    assert first_losses("mvp") == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_size_and_cost() -> None:
    """Encoder as in FD's test, 85,665,360; mask token 768; head 768 * 512 + 512 = 393,728. Three
    times the forward pass of a whole ViT-B (17.56) and of the head at 79 patches (0.03). Large:
    787,456 + 1,024 + 24 * 12,597,248 + 2,048 + 732 * 16 = 303,136,192; mask token 1,024; head 1,024
    * 512 + 512 = 524,800."""
    assert parameters("mvp", "encoder=small")[0] == 21_603_408 + 384 + 197_120
    assert parameters("mvp", "encoder=tiny")[0] == 5_497_680 + 192 + 98_816
    assert parameters("mvp", "encoder=large")[0] == 303_136_192 + 1_024 + 524_800
    assert parameters("mvp") == (86_059_856, 86_059_856)
    assert 3 * gmac("mvp") == pytest.approx(3 * (17.56 + 0.03), rel=0.02)


def test_settings_and_needs() -> None:
    given = mvp.Config()
    assert given.patches - given.visible == 79
    expected = recipes.TargetSpec(
        teacher="clip-b16", levels=(12,), fields=("features",), patches=196, derive="z"
    )
    assert mvp.needs(given) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [("mask_ratio=0", "leaves all 196 patches visible"), ("family=cae", "unknown family 'cae'")],
)
def test_what_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(mvp.Config, [setting])
