"""CAE v2 equals a second implementation of its text; its sizes, cost and refusals are checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import caev2
from student.training import optim
from tests.student.models.test_beit import reference_encode
from tests.student.models.test_latent_regressor import reference_regress
from tests.student.models.test_vit import Weights, layer_norm, linear
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


def chosen(rows: Tensor, ids: Tensor) -> Tensor:
    """Pick patches `ids` of tokens (B,1+P,D), picture by picture."""
    return torch.stack(
        [torch.stack([x[1 + i] for i in row]) for x, row in zip(rows, ids.tolist(), strict=True)]
    )


def reference_latents(w: Weights, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute cls, visible (of the encoder) and masked (of the regressor), before the head."""
    x = reference_encode(parts_of(w, "encoder"), batch["images"], batch["ids_keep"])
    if "encoder_to_regresser.weight" in w:
        x = linear(x, w, "encoder_to_regresser")
        x = layer_norm(
            x, w["encoder_to_regresser_norm.weight"], w["encoder_to_regresser_norm.bias"]
        )
    latents = {"cls": x[:, :1], "visible": x[:, 1:]}
    if "mask_token" in w:
        table = w["rd_pos_embed"].expand(2, -1, -1)
        pos_x, pos_visible = (chosen(table, batch[name]) for name in ("ids_masked", "ids_keep"))
        start = w["mask_token"].expand_as(pos_x)
        latents["masked"] = reference_regress(
            parts_of(w, "regresser"), start, x[:, 1:], pos_x, pos_visible
        )
    return latents


def reference_errors(
    w: Weights, batch: dict[str, Tensor], loss: str = "cosine", head: str = "norm_linear"
) -> dict[str, Tensor]:
    """Compute each token's distance from its target: (B,1), (B,V), (B,M)."""
    latents, targets = reference_latents(w, batch), batch["targets"]
    wanted = {"cls": targets[:, :1], "visible": chosen(targets, batch["ids_keep"])}
    wanted["masked"] = chosen(targets, batch["ids_masked"])
    errors = {}
    for name, x in latents.items():
        gamma, beta = w["decoder.norm.weight"], w["decoder.norm.bias"]
        if head == "norm_linear":
            p = linear(layer_norm(x, gamma, beta), w, "decoder.head")
        else:
            p = layer_norm(linear(x, w, "decoder.head"), gamma, beta)
        t = wanted[name]
        if loss == "cosine":
            errors[name] = 1 - (p * t).sum(-1) / ((p**2).sum(-1) * (t**2).sum(-1)).sqrt()
        else:
            centred = t - t.mean(-1, keepdim=True)
            e = p - centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
            errors[name] = (
                e**2 if loss == "mse" else torch.where(e.abs() < 1, e**2 / 2, e.abs() - 0.5)
            ).mean(-1)
    return errors


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1", "mse"])
def test_loss_and_gradients_equal_the_second_implementation(loss: str) -> None:
    model, _ = tiny_model("caev2", f"loss={loss}")
    batch = tiny_batch()
    out = model(batch)

    def reference(w: dict[str, Tensor]) -> Tensor:
        # all 17 tokens of each picture
        return torch.cat(list(reference_errors(w, batch, loss).values()), 1).mean()

    check_against(model, out["loss"], reference)
    for name, error in reference_errors(model.state_dict(), batch, loss).items():
        torch.testing.assert_close(out[name], error.mean())


def test_paper_reduction_is_two_means_without_cls() -> None:
    """Eq. 2; 4 visible and 12 masked patches weigh the same as groups."""
    model, _ = tiny_model("caev2", "reduction=paper")
    batch = tiny_batch()

    def reference(w: dict[str, Tensor]) -> Tensor:
        errors = reference_errors(w, batch, "cosine")
        return errors["visible"].sum() / 8 + errors["masked"].sum() / 24

    check_against(model, model(batch)["loss"], reference)


def test_the_papers_head_norms_last() -> None:
    model, _ = tiny_model("caev2", "head=linear_norm")
    batch = tiny_batch()
    assert model.get_parameter("decoder.norm.weight").shape == (10,)

    def reference(w: dict[str, Tensor]) -> Tensor:
        return torch.cat(list(reference_errors(w, batch, head="linear_norm").values()), 1).mean()

    check_against(model, model(batch)["loss"], reference)


@pytest.mark.parametrize("reduction", ["code", "paper"])
def test_visible_only_and_masked_only(reduction: str) -> None:
    batch = tiny_batch()
    visible, _ = tiny_model("caev2", "align=visible", "regressor_depth=0", f"reduction={reduction}")
    masked, _ = tiny_model("caev2", "align=masked", f"reduction={reduction}")
    assert not any(
        "regresser." in name or "mask_token" in name for name, _ in visible.named_parameters()
    )

    def of_visible(w: dict[str, Tensor]) -> Tensor:
        errors = reference_errors(w, batch, "cosine")
        both = torch.cat([errors["cls"], errors["visible"]], 1)
        return both.mean() if reduction == "code" else errors["visible"].mean()

    check_against(visible, visible(batch)["loss"], of_visible)
    check_against(
        masked,
        masked(batch)["loss"],
        lambda w: reference_errors(w, batch, "cosine")["masked"].mean(),
    )


def test_bridge_to_another_width() -> None:
    model, _ = tiny_model("caev2", "regressor_width=8")
    batch = tiny_batch()

    def reference(w: dict[str, Tensor]) -> Tensor:
        return torch.cat(list(reference_errors(w, batch, "cosine").values()), 1).mean()

    check_against(model, model(batch)["loss"], reference)


def test_errors_by_hand() -> None:
    """Prediction (1, 3), target (2, 4): normed to (-1, 1) the errors are 2 and 2: mse 4, smooth-L1
    1.5; cos = 14 / sqrt(200)."""
    pred, target = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 4.0]]])
    got = {
        loss: caev2._token_errors(pred, target, loss).item()
        for loss in ("cosine", "smooth_l1", "mse")
    }
    assert got == pytest.approx(
        {"cosine": 1 - 14 / 200**0.5, "smooth_l1": 1.5, "mse": 4.0}, abs=2e-4
    )
    x = wave(1, 2, 4, phase=0.2).requires_grad_()
    for loss in got:
        assert torch.autograd.gradcheck(
            lambda p, loss=loss: caev2._token_errors(p, wave(1, 2, 4, phase=1.0), loss), (x,)
        )


def test_head_is_shared() -> None:
    """One LN and one Linear: their gradients come from CLS, visible and masked latents."""
    model, _ = tiny_model("caev2")
    assert [name for name, _ in model.named_parameters() if name.startswith("decoder.")] == [
        "decoder.norm.weight", "decoder.norm.bias", "decoder.head.weight", "decoder.head.bias",
    ]  # fmt: skip
    seen = []
    model.get_submodule("decoder").register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[1])
    )
    model(tiny_batch())
    assert seen == [5, 12]


def test_first_losses() -> None:
    def reference(w: dict[str, Tensor]) -> Tensor:
        return torch.cat(list(reference_errors(w, tiny_batch(), "cosine").values()), 1).mean()

    assert first_losses("caev2") == pytest.approx(reference_losses("caev2", reference), rel=1e-8)


@pytest.mark.slow
def test_sizes() -> None:
    """Worked out by hand. A block of the encoder: norms 4 D, q and v bias 2 D, qkv 3 D^2, proj D^2
    + D, MLP 8 D^2 + 5 D, LayerScale 2 D: 12 D^2 + 14 D. Stem: kernel 768 D + D, CLS D, positions
    197 D fixed; norm 2 D. Regressor block: norms 8 W, q, k, v 3 W^2 + 2 W, proj W^2 + W, MLP 8 W^2
    + 5 W, LayerScale 2 W: 12 W^2 + 18 W. Mask token W, positions 197 W fixed, head 2 W + 512 W +
    512.

    base    encoder 590,592 + 768 + 151,296 + 12 * 7,088,640 + 1,536 = 85,807,872
            4 * 7,091,712 + 768 + 151,296 + 1,536 + 393,728 = 28,914,176
    small   encoder 295,296 + 384 + 75,648 + 12 * 1,774,848 + 768 = 21,670,272
            1 * 1,776,384 + 384 + 75,648 + 768 + 197,120 = 2,050,304
    tiny    encoder 147,648 + 192 + 37,824 + 12 * 445,056 + 384 = 5,526,720
            bridge 192 * 96 + 96 + 192 = 18,720; 1 * 112,320 + 96 + 18,912 + 192 + 49,664 = 181,184
    large   encoder 787,456 + 1,024 + 201,728 + 24 * 12,597,248 + 2,048 = 303,326,208
            4 * 12,601,344 + 1,024 + 201,728 + 2,048 + 768 * 1,024 + 768 = 51,397,376
    """
    assert parameters("caev2") == (114_722_048, 114_722_048 - 2 * 151_296)
    assert parameters("caev2", "encoder=small") == (23_720_576, 23_720_576 - 2 * 75_648)
    assert parameters("caev2", "encoder=tiny") == (5_726_624, 5_726_624 - 37_824 - 18_912)
    assert parameters("caev2", "encoder=large")[0] == 354_723_584


def test_cost() -> None:
    """36.2 GMAC forward and backward, within 2 %."""
    assert 3 * gmac("caev2") == pytest.approx(36.2, rel=0.02)


@pytest.mark.parametrize(
    ("size", "hidden"), [("tiny", 30), ("small", 49), ("base", 98), ("large", 118)]
)
def test_hidden_patches_of_each_size(size: str, hidden: int) -> None:
    given = config.from_overrides(caev2.Config, [f"encoder={size}"])
    assert given.patches - given.visible == hidden


def test_the_command_that_makes_its_views() -> None:
    from student.setup.remedy import extract_remedy

    given = config.from_overrides(caev2.Config, ["encoder=large"])
    expected = (
        "featcache extract --teacher clip-l14 --levels last:1 --scale 0.4,1 --jitter 0.4 "
        "--images SRC"
    )
    assert extract_remedy(caev2.needs(given), given, None) == f"make it with: {expected}"


def test_settings_and_needs() -> None:
    given = caev2.Config()
    assert optim.peak_lr(given, 64) == optim.peak_lr(given, 2048) == 1.5e-3
    expected = recipes.TargetSpec(
        teacher="clip-b16",
        levels=(12,),
        fields=("features",),
        patches=196,
        scale=(0.4, 1.0),
        jitter=0.4,
        derive="z",
    )
    assert caev2.needs(given) == expected
    assert caev2.needs(config.replace(given, jitter=0.0)).jitter == 0
    assert caev2.needs(config.replace(given, align="visible", regressor_depth=0)).visible_only


def test_decay_groups() -> None:
    """Gammas, biases, norms and tokens are not decayed; every matrix is."""
    model, _ = tiny_model("caev2")
    decay, none = (
        {id(x) for x in group["params"]} for group in optim.param_groups(model, 0.05, False)
    )
    for name, x in model.named_parameters():
        if x.requires_grad:
            assert (id(x) in decay) == (x.ndim > 1 and "token" not in name), name
            assert (id(x) in none) != (id(x) in decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align=all"], "unknown align 'all': .*known: both, masked, visible"),
        (["loss=l1"], "unknown loss 'l1'"),
        (["reduction=mean"], "unknown reduction 'mean'"),
        (["head=linear"], "unknown head 'linear': did you mean"),
        (["family=mae"], "unknown family 'mae'"),
        (
            ["align=visible"],
            "cannot align visible latents with a regressor of 4 blocks; allowed: align=visible "
            "with",
        ),
        (["regressor_depth=0"], "cannot align both latents with a regressor of 0 blocks"),
        (["regressor_heads=7"], "cannot build the regressor: width 768, 7 heads"),
        (["mask_ratio=0"], "leaves all 196 patches visible"),
        (["blr=1e-4"], "this recipe's learning rate is lr=0.0015"),
    ],
)
def test_what_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(caev2.Config, settings)
