"""FD equals a second implementation of its text; its sizes, cost and refusals are checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.models import losses
from student.recipes import fd
from student.training import optim
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
    wave,
)


def reference_loss(w: Weights, batch: dict[str, Tensor], beta: float) -> Tensor:
    """Compute e^2 / (2 beta) within beta, |e| - beta / 2 beyond: (B,1+P,Dt)."""
    encoder = parts_of(w, "encoder")
    pred = linear(reference_encode_all(encoder, embedded(encoder, batch["images"])), w, "decoder")
    e = (pred - batch["targets"]).abs()
    return torch.where(e < beta, e**2 / (2 * beta), e - beta / 2)


@pytest.mark.parametrize("beta", [2.0, 0.5])
def test_loss_and_gradients_equal_the_second_implementation(beta: float) -> None:
    model, _ = tiny_model("fd", f"beta={beta}")
    batch = tiny_batch()
    out = model(batch)
    check_against(model, out["loss"], lambda w: reference_loss(w, batch, beta).mean())
    torch.testing.assert_close(
        out["cls"], reference_loss(model.state_dict(), batch, beta)[:, 0].mean()
    )


def test_loss_by_hand() -> None:
    """Beta 2: e = 1, -2, 4, 0: 1/4, 1, 3, 0."""
    pred, target = torch.tensor([1.0, 0.0, 4.0, 5.0]), torch.tensor([0.0, 2.0, 0.0, 5.0])
    assert losses.fd_smooth_l1(pred, target, 2.0).item() == 4.25 / 4
    x = wave(2, 3, phase=0.2, size=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: losses.fd_smooth_l1(p, wave(2, 3, phase=1.0), 2.0), (x,)
    )


def test_masks_do_not_count() -> None:
    model, _ = tiny_model("fd")
    batch = tiny_batch()
    loss = model(batch)["loss"]
    assert torch.equal(
        model({"images": batch["images"], "targets": batch["targets"]})["loss"], loss
    )


def test_first_losses() -> None:
    expected = reference_losses("fd", lambda w: reference_loss(w, tiny_batch(), 2.0).mean())
    assert first_losses("fd") == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_sizes() -> None:
    """Worked out by hand; blocks and stem as in CAE v2's test, no absolute positions, one table of
    27^2 + 3 offsets.

    base    590,592 + 768 + 12 * 7,088,640 + 1,536 + 732 * 12 = 85,665,360;
            head 768 * 768 + 768 = 590,592
    small   295,296 + 384 + 12 * 1,774,848 + 768 + 8,784 = 21,603,408;
            head 384 * 768 + 768 = 295,680
    tiny    147,648 + 192 + 12 * 445,056 + 384 + 8,784 = 5,497,680; head 192 * 768 + 768 = 148,224
    large   patches of 14: 1,024 * 588 + 1,024 = 603,136; + 1,024 + 24 * 12,597,248 + 2,048
            + (31^2 + 3) * 16 = 302,955,584; head 1,024 * 1,024 + 1,024 = 1,049,600
    """
    assert parameters("fd") == (86_255_952, 86_255_952)
    assert parameters("fd", "encoder=small")[0] == 21_603_408 + 295_680
    assert parameters("fd", "encoder=tiny")[0] == 5_497_680 + 148_224
    assert parameters("fd", "encoder=large")[0] == 302_955_584 + 1_049_600


def test_cost() -> None:
    """53.0 GMAC forward and backward, within 2 %."""
    assert 3 * gmac("fd") == pytest.approx(53.0, rel=0.02)


def test_settings_and_needs() -> None:
    given = fd.Config()
    assert given.visible == 196
    assert optim.peak_lr(given, 2048) == pytest.approx(1.2e-3)
    assert fd.needs(given) == recipes.TargetSpec(
        teacher="clip-b16",
        levels=(12,),
        fields=("features",),
        patches=196,
        scale=(0.08, 1.0),
        derive="fd",
    )


def test_the_table_of_positions_is_decayed_and_starts_at_zero() -> None:
    model, _ = tiny_model("fd")
    table = model.get_parameter("encoder.rel_pos_bias.relative_position_bias_table")
    decayed = {id(x) for x in optim.param_groups(model, 0.05)[0]["params"]}
    assert id(table) in decayed
    assert id(model.get_parameter("encoder.cls_token")) not in decayed
    fresh = fd.Model(config.from_overrides(fd.Config, ["encoder=tiny,depth=1", "img_size=32"]))
    assert not fresh.get_parameter("encoder.rel_pos_bias.relative_position_bias_table").any()
    weight = fresh.get_parameter("decoder.weight")
    # the framework's own start of a 1 x 1 convolution
    assert 0.98 < weight.abs().max() * 192**0.5 <= 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mask_ratio=0.5", "nothing is hidden in fd: mask=uniform mask_ratio=0.5"),
        ("mask=attentive", "nothing is hidden in fd: mask=attentive"),
        ("beta=0", "beta: given 0"),
        ("family=cae", "unknown family 'cae': .*known: beit"),
    ],
)
def test_what_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(fd.Config, [setting])
