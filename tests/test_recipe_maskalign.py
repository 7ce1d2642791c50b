"""MaskAlign against a second implementation of its text, with its size and first losses as literals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import maskalign
from tests.test_recipes import first_losses, tiny_batch, tiny_model, trained
from tests.test_vit import Weights, reference_encode


def reference_loss(w: Weights, batch: dict[str, Tensor], levels: dict[int, float]) -> Tensor:
    """q_t = A_t(sum_s W[t,s] x_s); sum_t weight_t * mean(e^2 within 1, 2|e| - 1 beyond), on CLS and visible tokens."""
    encoder = {name.removeprefix("encoder."): x for name, x in w.items() if name.startswith("encoder.")}
    blocks = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)
    total = torch.zeros((), dtype=torch.float64)
    for row, (level, weight) in enumerate(levels.items()):
        mixed = sum(w["align.mix"][row, s] * blocks[s] for s in range(3))
        q = mixed @ w[f"align.adaptors.{level}.weight"].T + w[f"align.adaptors.{level}.bias"]
        h = torch.stack([
            torch.stack([picture[row, 0], *(picture[row, 1 + i] for i in ids)])
            for picture, ids in zip(batch["features"], batch["ids_keep"].tolist(), strict=True)
        ])  # fmt: skip
        e = (q - h).abs()
        total = total + weight * torch.where(e <= 1, e**2, 2 * e - 1).mean()
    return total


@pytest.mark.parametrize(
    ("setting", "levels"),
    [
        ("level_weights=top:2", {2: 0.5, 3: 0.5}),
        ("level_weights=linear-decay", {2: 1 / 3, 3: 2 / 3}),
    ],
)
def test_loss_and_gradients_equal_the_second_implementation(setting: str, levels: dict[int, float]) -> None:
    model, _ = tiny_model("maskalign", setting)
    batch = tiny_batch()
    loss = model(batch)["loss"]
    parameters = trained(model)
    got = torch.autograd.grad(loss, list(parameters.values()))
    copies = {name: x.clone().requires_grad_(name in parameters) for name, x in model.state_dict().items()}
    expected_loss = reference_loss(copies, batch, levels)
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in parameters])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, a, b in zip(parameters, got, expected, strict=True):
        # An absolute floor: the gradient of a key bias is zero by symmetry.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_first_losses() -> None:
    """Three steps of AdamW at 1e-2; the second implementation, with AdamW written out, gives the same numbers."""
    assert first_losses("maskalign") == pytest.approx([0.8954064138125, 0.8776950031821, 0.8486016044217], rel=1e-8)


def test_level_losses_make_up_the_loss() -> None:
    model, _ = tiny_model("maskalign", "level_weights=linear-decay")
    out = model(tiny_batch())
    assert list(out) == ["loss", "level_2", "level_3"]
    torch.testing.assert_close(out["loss"].detach(), out["level_2"] / 3 + out["level_3"] * 2 / 3)


def test_hidden_targets_do_not_count() -> None:
    model, _ = tiny_model("maskalign")
    batch = tiny_batch()
    loss = model(batch)["loss"]
    hidden = batch["ids_masked"][0, 0]
    batch["features"][0, :, 1 + hidden] += 5
    assert torch.equal(model(batch)["loss"], loss)
    batch["features"][0, :, 0] += 5  # CLS counts
    assert not torch.equal(model(batch)["loss"], loss)


def test_size_of_the_base_model() -> None:
    """Worked out by hand.

    patch conv    768 * 768 + 768                         590,592
    cls_token     768                                         768
    pos_embed     197 * 768                               151,296   fixed
    block         norms 2 * 1,536; qkv 768 * 2,304 + 2,304 = 1,771,776; proj 590,592;
                  fc1 768 * 3,072 + 3,072 = 2,362,368; fc2 3,072 * 768 + 768 = 2,360,064: 7,087,872
    12 blocks                                          85,054,464
    norm          2 * 768                                   1,536   frozen: it never gets a gradient
                                              encoder  85,798,656
    adaptors      5 * (768 * 768 + 768)                 2,952,960
    W             5 * 12                                       60
                                                total  88,751,676
    """
    model = maskalign.Model(maskalign.Config())
    assert sum(x.numel() for x in model.encoder.parameters()) == 85_798_656
    assert sum(x.numel() for x in model.parameters()) == 88_751_676
    assert sum(x.numel() for x in trained(model).values()) == 88_751_676 - 151_296 - 1_536


def test_final_norm_is_frozen() -> None:
    model, _ = tiny_model("maskalign")
    assert {name for name, x in model.named_parameters() if not x.requires_grad} == {
        "encoder.pos_embed",
        "encoder.norm.weight",
        "encoder.norm.bias",
    }


def test_needs() -> None:
    spec = maskalign.needs(maskalign.Config())
    assert spec == recipes.TargetSpec(
        teacher="clip-b16",
        levels=(8, 9, 10, 11, 12),
        fields=("features", "attention"),
        scale=(0.2, 1.0),
        patches=196,
        visible_only=True,
    )
    deep = config.replace(maskalign.Config(), teacher="clip-l14", teacher_depth=24)
    assert maskalign.needs(deep).levels == (20, 21, 22, 23, 24)


@pytest.mark.parametrize(
    ("setting", "deeper"),
    [("level_weights=top:13", tuple(range(12, 25))), ("align_levels=last:13", tuple(range(20, 25)))],
)
def test_more_levels_than_the_teacher_has(setting: str, deeper: tuple[int, ...]) -> None:
    """Refused where the teacher's depth is used: the depth of a deeper teacher may still be filled in."""
    given = config.from_overrides(maskalign.Config, [setting])
    for use in (maskalign.needs, maskalign.Model):
        with pytest.raises(UsageError, match="needs 13 levels; allowed: the teacher's 12"):
            use(given)
    assert maskalign.needs(config.replace(given, teacher_depth=24)).levels == deeper


@pytest.mark.parametrize("setting", ["level_weights=top5", "align_levels=last"])
def test_level_names_are_checked_at_once(setting: str) -> None:
    with pytest.raises(UsageError, match=r"unknown level_weights 'top5'|cannot read align_levels='last'"):
        config.from_overrides(maskalign.Config, [setting])
