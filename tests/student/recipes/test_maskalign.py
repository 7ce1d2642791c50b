"""MaskAlign equals a second implementation of its text; its size and first losses are literals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.models import alignment as align
from student.recipes import maskalign
from tests import student_fixtures as fx
from tests.student.models.test_vit import Weights, reference_encode
from tests.student.recipes.test_recipes import (
    check_against,
    first_losses,
    parameters,
    tiny_batch,
    tiny_model,
    trained,
)

ROWS = json.loads((Path(__file__).parents[2] / "golden/rows.json").read_text())


def reference_loss(w: Weights, batch: dict[str, Tensor], levels: dict[int, float]) -> Tensor:
    """Compute q_t = A_t(sum_s W[t,s] x_s); sum_t weight_t * mean(e^2 within 1, 2|e| - 1 beyond), on
    CLS and visible tokens."""
    encoder = {
        name.removeprefix("encoder."): x for name, x in w.items() if name.startswith("encoder.")
    }
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
def test_loss_and_gradients_equal_the_second_implementation(
    setting: str, levels: dict[int, float]
) -> None:
    model, _ = tiny_model("maskalign", setting)
    batch = tiny_batch()
    loss = model(batch)["loss"]
    parameters = trained(model)
    got = torch.autograd.grad(loss, list(parameters.values()))
    copies = {
        name: x.clone().requires_grad_(name in parameters) for name, x in model.state_dict().items()
    }
    expected_loss = reference_loss(copies, batch, levels)
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in parameters])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for name, a, b in zip(parameters, got, expected, strict=True):
        # An absolute floor: the gradient of a key bias is zero by symmetry.
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def affine_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def reference_adaptor(w: Weights, name: str, kind: str, x: Tensor) -> Tensor:
    if kind == "linear":
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    first, last = f"{name}.0", f"{name}.{1 if kind == 'norm_linear' else 2}"
    if kind == "norm_linear":
        x = affine_norm(x, w[f"{first}.weight"], w[f"{first}.bias"])
    else:
        x = x @ w[f"{first}.weight"].T + w[f"{first}.bias"]
        x = (
            erf_gelu(x)
            if kind == "mlp"
            else affine_norm(x, w[f"{name}.1.weight"], w[f"{name}.1.bias"])
        )
    return x @ w[f"{last}.weight"].T + w[f"{last}.bias"]


def reference_norm(kind: str, y: Tensor) -> Tensor:
    """Normalise y (B,1+P,Dt), all tokens of the batch, as the released code does before any is left
    out."""
    if kind == "l2":
        return y / y.square().sum(-1, keepdim=True).sqrt()
    if kind == "bn":
        mean = y.sum() / y.numel()
        return (y - mean) / ((y - mean).square().sum() / (y.numel() - 1) + 1e-6).sqrt()
    if kind == "ln":
        mean = y.mean(-1, keepdim=True)
        return (y - mean) / ((y - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y


def switched_loss(
    w: Weights, batch: dict[str, Tensor], ys: list[Tensor], settings: maskalign.Config
) -> Tensor:
    """Compute every switch once more, from the teacher's own streams `ys`, levels 2 and 3 of 3 with
    1/2 each."""
    encoder = {
        name.removeprefix("encoder."): x for name, x in w.items() if name.startswith("encoder.")
    }
    blocks = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)
    total = torch.zeros((), dtype=torch.float64)
    for row, level in enumerate((2, 3)):
        kind = settings.adaptor
        if settings.alignment == "layer_wise":
            q = reference_adaptor(w, f"align.adaptors.{level}", kind, blocks[level - 1])
        elif settings.alignment == "adapt_then_mix":
            adapted = [
                reference_adaptor(w, f"align.adaptors.{s + 1}", kind, blocks[s]) for s in range(3)
            ]
            q = torch.stack([w["align.mix"][row, s] * adapted[s] for s in range(3)]).sum(0)
        else:
            mixed = torch.stack([w["align.mix"][row, s] * blocks[s] for s in range(3)]).sum(0)
            q = reference_adaptor(w, f"align.adaptors.{level}", kind, mixed)
        y = reference_norm(settings.target_norm, ys[row])
        rows = [
            torch.stack([p[0], *(p[1 + i] for i in ids)])
            for p, ids in zip(y, batch["ids_keep"], strict=True)
        ]
        e = (q - torch.stack(rows)).abs()[:, 0 if settings.cls_loss else 1 :]
        each = {"l1": e, "l2": e**2, "smooth_l1": torch.where(e <= 1, e**2, 2 * e - 1)}[
            settings.loss
        ]
        total = total + each.mean() / 2
    return total


def switched_batch() -> tuple[dict[str, Tensor], list[Tensor]]:
    """Make a batch of two levels and the streams that give it, one with a channel far out, in
    numpy's arithmetic."""
    batch = tiny_batch()
    ys = [3 * batch["features"][:, i] + 0.7 - 2 * i for i in range(2)]
    ys[1][..., 5] += 30
    y = np.stack([each.numpy() for each in ys], 1)
    mean, std = y.mean(-1, keepdims=True), np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    moments = [[y[:, i].mean(), y[:, i].var(ddof=1)] for i in range(2)]
    batch["features"] = torch.from_numpy((y - mean) / std)
    batch["feature_stats"] = torch.from_numpy(np.concatenate([mean, std], -1))
    batch["moments"] = torch.tensor(moments, dtype=torch.float64)
    return batch, ys


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "settings",
    [
        ("target_norm=l2",),
        ("target_norm=none",),
        ("target_norm=bn",),
        ("loss=l1",),
        ("loss=l2",),
        ("cls_loss=false",),
        ("adaptor=norm_linear",),
        ("adaptor=mlp",),
        ("adaptor=mlp2",),
        ("alignment=layer_wise",),
        ("alignment=adapt_then_mix",),
        ("alignment=adapt_then_mix", "adaptor=mlp", "target_norm=bn", "loss=l2", "cls_loss=false"),
        ("alignment=layer_wise", "adaptor=mlp2", "target_norm=l2", "loss=l1"),
    ],
)
def test_every_switch_equals_the_second_implementation(settings: tuple[str, ...]) -> None:
    model, config_ = tiny_model("maskalign", *settings)
    batch, ys = switched_batch()
    check_against(model, model(batch)["loss"], lambda w: switched_loss(w, batch, ys, config_))


def test_first_losses() -> None:
    """Three steps of AdamW at 1e-2; the second implementation, with AdamW written out, gives the
    same numbers."""
    assert first_losses("maskalign") == pytest.approx(
        [0.8954064138125, 0.8776950031821, 0.8486016044217], rel=1e-8
    )


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


@pytest.mark.slow
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


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("settings", "total"),
    [
        # The encoder has 85,798,656; a Linear of 768 x 768 with bias 590,592; a LayerNorm 1,536.
        (("alignment=layer_wise",), 85_798_656 + 5 * 590_592),
        (("alignment=adapt_then_mix",), 85_798_656 + 12 * 590_592 + 5 * 12),
        (("adaptor=norm_linear",), 85_798_656 + 5 * (590_592 + 1_536) + 5 * 12),
        (("adaptor=mlp",), 85_798_656 + 5 * 2 * 590_592 + 5 * 12),
        (("adaptor=mlp2",), 85_798_656 + 5 * (2 * 590_592 + 1_536) + 5 * 12),
    ],
)
def test_sizes_of_the_switches(settings: tuple[str, ...], total: int) -> None:
    assert parameters("maskalign", *settings) == (total, total - 151_296 - 1_536)


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


def test_other_norms_need_the_tokens_statistics() -> None:
    for norm, moments in {"l2": False, "none": False, "bn": True}.items():
        spec = maskalign.needs(config.from_overrides(maskalign.Config, [f"target_norm={norm}"]))
        assert spec.fields == ("features", "feature_stats", "attention")
        assert spec.moments is moments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("alignment=layerwise",), "unknown alignment 'layerwise': did you mean layer_wise?"),
        (("adaptor=mlp3",), "unknown adaptor 'mlp3'"),
        (("target_norm=batch",), "unknown target_norm 'batch'"),
        (("loss=mse",), "unknown loss 'mse'"),
        (("mix_start=eye",), "unknown mix_start 'eye'"),
        (
            ("mix_start=even", "alignment=layer_wise"),
            "mix_start=even does nothing with alignment=layer_wise",
        ),
    ],
)
def test_switches_are_checked_at_once(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        config.from_overrides(maskalign.Config, settings)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["alignment=layer_wise", "mix_start=identity"])
def test_what_pairs_blocks_wants_equal_depths(setting: str) -> None:
    given = config.from_overrides(
        maskalign.Config, [setting, "teacher=clip-l14", "teacher_depth=24"]
    )
    with pytest.raises(
        UsageError,
        match=f"{setting} pairs student block t .* has 12 blocks, the teacher 24; allowed",
    ):
        maskalign.Model(given)


# --- layer_wise up to a middle level: the released midN -------------------------------------------

MID1 = ("alignment=layer_wise", "level_weights=last", "align_levels=2")


def middle_loss(w: Weights, batch: dict[str, Tensor]) -> Tensor:
    """Compute block 2 of 3 through its adaptor against the only level."""
    w = {name.replace("align.adaptors.2", "adaptor"): x for name, x in w.items()}
    encoder = {
        name.removeprefix("encoder."): x for name, x in w.items() if name.startswith("encoder.")
    }
    x = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)[1]
    q = x @ w["adaptor.weight"].T + w["adaptor.bias"]
    rows = zip(batch["features"][:, 0], batch["ids_keep"].tolist(), strict=True)
    h = torch.stack([torch.stack([p[0], *(p[1 + i] for i in ids)]) for p, ids in rows])
    e = (q - h).abs()
    return torch.where(e <= 1, e**2, 2 * e - 1).mean()


def test_a_middle_level_equals_the_second_implementation() -> None:
    """And the golden first losses of tests/golden/make_rows.py."""
    model, settings = tiny_model("maskalign", *MID1)
    assert maskalign.needs(settings).levels == (2,)
    batch = tiny_batch(1)
    check_against(model, model(batch)["loss"], lambda w: middle_loss(w, batch))
    found = first_losses("maskalign", more=MID1, levels=1)
    assert found == pytest.approx(ROWS["maskalign mid1"], rel=1e-8)


def test_blocks_after_the_middle_level_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are frozen and never run, whatever their weights; with W every block is trained."""
    model, _ = tiny_model("maskalign", *MID1)
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    after = {name for name, _ in model.named_parameters() if name.startswith("encoder.blocks.2.")}
    assert frozen == {"encoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias", *after}
    assert len(after) == 12
    with torch.no_grad():
        model.get_parameter("encoder.blocks.2.mlp.fc1.weight").fill_(float("nan"))
    assert torch.isfinite(model(tiny_batch(1))["loss"])
    mixed, _ = tiny_model("maskalign", *MID1[1:])
    assert all(x.requires_grad for x in mixed.encoder.blocks.parameters())


def test_a_middle_level_by_hand() -> None:
    """mid1 of three blocks of width 1: block 2 has 2 at CLS and 5 at the one visible patch, its
    adaptor is 3 x + 1: 7 and 16. The level has 6.5 and 19: errors of 1/2 and -3 are 1/4 and 5 in
    twice smooth-L1, 2.625 their mean. Blocks 1 and 3 do not count."""
    blocks = [torch.tensor(x).view(1, 2, 1) for x in ([100.0, 100.0], [2.0, 5.0])]
    head = align.AlignmentHead(3, 1, 3, 1, {2: 1.0}, align.AlignmentOptions("layer_wise"))
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), (3.0, 1.0), strict=True):
            parameter.fill_(value)
    features = torch.tensor([6.5, 19.0]).view(1, 1, 2, 1)
    loss, parts = head(blocks, features, torch.tensor([[0]]))
    assert (loss.item(), list(parts)) == (2.625, ["level_2"])


def test_size_with_a_middle_level() -> None:
    """mid5: one adaptor; blocks 7 to 12 are frozen, 7,087,872 each."""
    total = 85_798_656 + 590_592
    given = ("alignment=layer_wise", "level_weights=last", "align_levels=6")
    trained = total - 151_296 - 1_536 - 6 * 7_087_872
    assert parameters("maskalign", *given) == (total, trained)


def test_a_middle_level_trains_from_a_cache(tmp_path: Path) -> None:
    """Blocks 3 and 4 of 4 end as they started, block 2 does not."""
    options = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--batch-size", "8")
    sets = (*MID1, "weight_decay=0.5")
    for steps in ("0", "4"):
        fx.good(fx.train("maskalign", tmp_path / steps, *options, "--steps", steps, sets=sets))
    before, after = (fx.weights(tmp_path / steps) for steps in ("0", "4"))
    moved = {name.split(".")[2] for name in after if not torch.equal(before[name], after[name])
             and name.startswith("encoder.blocks.")}  # fmt: skip
    assert moved == {"0", "1"}


def test_an_even_start_of_equal_depths() -> None:
    model = maskalign.Model(
        config.from_overrides(maskalign.Config, ["mix_start=even", "encoder=tiny"])
    )
    torch.testing.assert_close(model.align.mix.detach(), torch.full((5, 12), 1 / 12))


@pytest.mark.parametrize(
    ("setting", "deeper"),
    [
        ("level_weights=top:13", tuple(range(12, 25))),
        ("align_levels=last:13", tuple(range(20, 25))),
    ],
)
def test_more_levels_than_the_teacher_has(setting: str, deeper: tuple[int, ...]) -> None:
    """Refused where the teacher's depth is used: the depth of a deeper teacher may still be filled
    in."""
    given = config.from_overrides(maskalign.Config, [setting])
    for use in (maskalign.needs, maskalign.Model):
        with pytest.raises(UsageError, match="needs 13 levels; allowed: the teacher's 12"):
            use(given)
    assert maskalign.needs(config.replace(given, teacher_depth=24)).levels == deeper


@pytest.mark.parametrize("setting", ["level_weights=top5", "align_levels=last"])
def test_level_names_are_checked_at_once(setting: str) -> None:
    with pytest.raises(
        UsageError, match=r"unknown level_weights 'top5'|cannot read align_levels='last'"
    ):
        config.from_overrides(maskalign.Config, [setting])
