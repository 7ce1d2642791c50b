"""MR-MAE equals a second implementation of its text, with both backbones; its rows, sizes, cost and
refusals are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import UsageError
from student import config, recipes
from student.recipes import mrmae
from student.training import optim
from tests.student.models.test_conv_vit import reference_conv_encode, reference_stage_fusion
from tests.student.models.test_vit import (
    Weights,
    layer_norm,
    linear,
    reference_block,
    reference_encode,
)
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

CONV = [
    "family=conv_vit",
    "encoder=tiny,stage1=4,stage2=6,embed_dim=16,depth=3,num_heads=2,stage_mlp=2",
]
NARROW_HUGE = [
    "family=conv_vit",
    "encoder=huge,stage1=4,stage2=6,embed_dim=16,depth=3,num_heads=2",
]
ROWS = json.loads((Path(__file__).parents[2] / "golden/rows.json").read_text())


# --- a second implementation ----------------------------------------------------------------------


def reference_fused(
    w: Weights, batch: dict[str, Tensor], given: mrmae.Config, blocks: tuple[int, ...]
) -> Tensor:
    """Sum the layers after the norm, (B,N,D); of 3 blocks."""
    encoder = parts_of(w, "encoder")
    if given.family == "mae":
        outputs = reference_encode(encoder, batch["images"], batch["ids_keep"], heads=2, depth=3)
        total = sum(outputs[i - 1] for i in blocks)
    else:
        outputs, *maps = reference_conv_encode(
            encoder, batch["images"], batch["ids_keep"], heads=2, depth=3
        )
        total = sum(outputs[i - 1] for i in blocks)
        if given.fuse != "last":
            added = reference_stage_fusion(parts_of(w, "stages"), *maps, batch["ids_keep"])
            # CLS has no position in the maps
            nothing = torch.zeros_like(total[:, : given.conv_cls])
            total = total + torch.cat([nothing, added], 1)
    assert isinstance(total, Tensor)
    return layer_norm(total, encoder["norm.weight"], encoder["norm.bias"])


def reference_states(w: Weights, tokens: Tensor, ids_keep: Tensor, prefix: int) -> Tensor:
    """Compute MAE's decoder up to its last matrix, (B,P,W); with prefix 1 all tokens begin with
    CLS."""
    narrow, table = linear(tokens, w, "decoder_embed"), w["decoder_pos_embed"][0]
    rows = []
    for x, ids in zip(narrow, ids_keep.tolist(), strict=True):
        indices = range(len(table) - prefix)
        patches = [x[prefix + ids.index(i)] if i in ids else w["mask_token"][0, 0] for i in indices]
        rows.append(torch.stack([*x[:prefix], *patches]))
    x = torch.stack(rows) + table
    for i in range(2):
        x = reference_block(x, w, f"decoder_blocks.{i}", 2)
    return layer_norm(x, w["decoder_norm.weight"], w["decoder_norm.bias"])[:, prefix:]


def reference_pixel_loss(pred: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Compute the mean over channels, then over hidden patches: pred (B,P,48), normalised
    targets."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b, ids in enumerate(batch["ids_masked"].tolist()):
        for i in ids:
            top, left = 4 * (i // 4), 4 * (i % 4)
            target = (
                batch["images"][b, :, top : top + 4, left : left + 4].permute(1, 2, 0).reshape(48)
            )
            centred = target - target.sum() / 48
            target = centred / ((centred**2).sum() / 47 + 1e-6).sqrt()
            total, count = total + ((pred[b, i] - target) ** 2).sum() / 48, count + 1
    return total / count


def reference_mimic(pred: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    """Compare pred (B,V,E) of the patches ids (B,V) with target (B,1+P,E); picture by picture."""
    rows = []
    for own, table, indices in zip(pred, target, ids.tolist(), strict=True):
        rows.append(((own - torch.stack([table[1 + i] for i in indices])) ** 2).mean(-1))
    return torch.stack(rows).mean()


def reference_loss(
    w: Weights, batch: dict[str, Tensor], given: mrmae.Config, blocks: tuple[int, ...]
) -> Tensor:
    fused = reference_fused(w, batch, given, blocks)
    prefix = 0 if given.family == "conv_vit" and not given.conv_cls else 1
    decoder, loss = parts_of(w, "decoder"), torch.zeros((), dtype=torch.float64)
    tokens, ids = fused[:, prefix:], batch["ids_keep"]
    channels = (48, 10, 6) if given.reduction == "sum" else (1, 1, 1)
    if given.pixel_weight:
        states = reference_states(decoder, fused, ids, prefix)
        pixel = reference_pixel_loss(linear(states, decoder, "decoder_pred"), batch)
        loss = loss + given.pixel_weight * channels[0] * pixel
        if given.mimic_at == "decoder":
            ids = batch["ids_masked"]
            tokens = torch.stack(
                [torch.stack([x[i] for i in own]) for x, own in zip(states, ids, strict=True)]
            )
    if given.mimic_weight:
        mimic = channels[1] * reference_mimic(
            linear(tokens, w, "mimic_head"), batch["targets"], ids
        )
        if given.joint:
            second = channels[2] * reference_mimic(
                linear(tokens, w, "joint_head"), batch["second"], ids
            )
            mimic = (mimic + second) / 2
        loss = loss + given.mimic_weight * mimic
    return loss


JOINT = ["joint=dino-b16", "joint_width=6"]
CASES: list[tuple[list[str], tuple[int, ...]]] = [
    ([], (1, 2, 3)),  # a quarter of 3 blocks, rounded up: 1, 2, 3, 3
    (["fuse=last"], (3,)),
    (["fuse=1,3"], (1, 3)),
    (["mimic_weight=0", "fuse=last"], (3,)),
    (["pixel_weight=0"], (1, 2, 3)),
    (["mimic_weight=0.3", "pixel_weight=0.7"], (1, 2, 3)),
    (["reduction=sum"], (1, 2, 3)),
    (JOINT, (1, 2, 3)),
    ([*JOINT, "reduction=sum", "pixel_weight=0"], (1, 2, 3)),
    (CONV, (3,)),
    ([*CONV, "fuse=last"], (3,)),
    ([*CONV, "fuse=2,3"], (2, 3)),
    ([*CONV, "conv_cls=true", *JOINT], (3,)),
    ([*CONV, "pixel_weight=0"], (3,)),
    (["mimic_at=decoder"], (1, 2, 3)),
    (["mimic_at=decoder", *JOINT], (1, 2, 3)),
    (["mimic_at=decoder", *CONV, "conv_cls=true"], (3,)),
    (["mimic_at=decoder", *CONV], (3,)),
]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("settings", "blocks"), CASES)
def test_loss_and_gradients_equal_the_second_implementation(
    settings: list[str], blocks: tuple[int, ...]
) -> None:
    model, given = tiny_model("mrmae", *settings)
    batch = tiny_batch()
    check_against(model, model(batch)["loss"], lambda w: reference_loss(w, batch, given, blocks))


def test_at_the_decoder_both_targets_are_of_the_hidden_patches() -> None:
    """The conflict row: targets of visible patches and of CLS do not enter."""
    model, _ = tiny_model("mrmae", "mimic_at=decoder")
    batch = tiny_batch()
    other = {**batch, "targets": batch["targets"].clone()}
    other["targets"][:, 0] = float("nan")
    other["targets"].scatter_(
        1, (batch["ids_keep"] + 1).unsqueeze(-1).expand(-1, -1, 10), float("nan")
    )
    assert model(other)["loss"].item() == model(batch)["loss"].item()


def test_losses_by_hand() -> None:
    """Heads and decoder that give zeros: the mimic loss is the mean square of the visible patches'
    targets, the pixel loss that of normalised patches, 47/48."""
    model, _ = tiny_model("mrmae", *JOINT)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.startswith(("mimic_head", "joint_head", "decoder.decoder_pred")):
                x.zero_()
    batch = tiny_batch()
    first, second = (
        np.stack(
            [batch[key][b, 1 + i].numpy() for b in (0, 1) for i in batch["ids_keep"][b].tolist()]
        )
        for key in ("targets", "second")
    )
    out = model(batch)
    assert out["mimic"].item() == pytest.approx((first**2).mean(), rel=1e-12)
    assert out["joint"].item() == pytest.approx((second**2).mean(), rel=1e-12)
    assert out["pixel"].item() == pytest.approx(47 / 48, rel=1e-5)
    expected = 0.5 * ((first**2).mean() + (second**2).mean()) / 2 + 0.5 * out["pixel"].item()
    assert out["loss"].item() == pytest.approx(expected, rel=1e-12)


def test_each_token_is_asked_for_one_thing() -> None:
    """Hidden patches' targets and visible patches' pixels do not enter the loss; so the targets do
    not conflict."""
    model, _ = tiny_model("mrmae")
    batch = tiny_batch()
    hidden = {**batch, "targets": batch["targets"].clone()}
    hidden["targets"].scatter_(
        1, (batch["ids_masked"] + 1).unsqueeze(-1).expand(-1, -1, 10), float("nan")
    )
    hidden["targets"][:, 0] = float("nan")  # CLS is not mimicked
    assert model(hidden)["loss"].item() == model(batch)["loss"].item()


def test_target_h_is_the_stored_level() -> None:
    model, given = tiny_model("mrmae", "target=h")
    batch = tiny_batch(levels=1)
    level = batch.pop("targets")
    out = model({**batch, "features": level.unsqueeze(1)})["loss"]
    reference, _ = tiny_model("mrmae")
    torch.testing.assert_close(out, reference(tiny_batch())["loss"], rtol=0, atol=0)
    assert mrmae.needs(given).derive == ""


def test_first_losses() -> None:
    given = tiny_model("mrmae")[1]
    expected = reference_losses(
        "mrmae", lambda w: reference_loss(w, tiny_batch(), given, (1, 2, 3))
    )
    assert first_losses("mrmae") == pytest.approx(expected, rel=1e-8)


def test_first_losses_of_a_narrow_huge() -> None:
    """Huge with its stages' MLP ratio of 8, all else small; by tests/golden/make_rows.py."""
    found = first_losses("mrmae", more=NARROW_HUGE)
    assert found == pytest.approx(ROWS["mrmae narrow huge"], rel=1e-8)


def test_hidden_pixels_are_targets_only() -> None:
    """With the convolutions before it too: what the mimic loss sees does not change with a hidden
    pixel, to the bit."""
    for settings in ([], CONV, [*CONV, "conv_cls=true"]):
        model, _ = tiny_model("mrmae", *settings)
        batch = tiny_batch()
        hidden = (
            torch.ones(2, 16, dtype=torch.bool)
            .scatter(1, batch["ids_keep"], False)
            .view(2, 1, 4, 4)
        )
        at = hidden.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
        changed = {**batch, "images": torch.where(at, batch["images"].flip(3) * 3, batch["images"])}
        before, after = model(batch), model(changed)
        assert before["mimic"].item() == after["mimic"].item()
        assert before["pixel"].item() != after["pixel"].item()


# --- what test_recipes.py asks of every recipe, of the other backbone -----------------------------


@pytest.mark.parametrize("cls_token", ["false", "true"])
def test_masked_convolutions_keep_the_contract(cls_token: str) -> None:
    """Any order of the visible patches, half precision, drop path in convolutions and blocks."""
    settings = [*CONV, f"conv_cls={cls_token}"]
    model, _ = tiny_model("mrmae", *settings)
    batch = tiny_batch()
    exact = model(batch)["loss"]
    torch.testing.assert_close(
        model({**batch, "ids_keep": batch["ids_keep"].flip(1)})["loss"], exact
    )

    model.float()
    single = {key: x.float() if x.is_floating_point() else x for key, x in batch.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model({**single, "targets": single["targets"].half()})["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=0.03, atol=0.0)
    loss.backward()
    assert all(
        x.grad is not None and torch.isfinite(x.grad).all()
        for x in model.parameters()
        if x.requires_grad
    )

    dropping, _ = tiny_model("mrmae", *settings, "drop_path=0.5")
    found = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        found.append(dropping(batch)["loss"].item())
    assert found[0] == found[1]
    assert len(set(found)) > 2


def test_weight_decay_of_masked_convolutions() -> None:
    """Kernels and matrices decay; biases, norms, CLS and mask token do not."""
    model, given = tiny_model("mrmae", *CONV, "conv_cls=true")
    decay, free = optim.param_groups(model, given.weight_decay)
    names = {id(x): name for name, x in model.named_parameters()}
    assert all(x.ndim > 1 and names[id(x)].endswith(".weight") for x in decay["params"])
    left = [names[id(x)] for x in free["params"] if x.ndim > 1]
    assert left == ["encoder.cls_token", "decoder.mask_token"]


# --- size, cost, settings -------------------------------------------------------------------------


@pytest.mark.slow
def test_sizes() -> None:
    """Worked out by hand: MAE's model, 111,907,840 (its test), and the head, 768 * 768 + 768 =
    590,592.

    tiny:   5,524,416 + 192 * 512 + 512 + 512 + 100,864 + 25,219,072 + 1,024 + 393,984 (decoder)
            + 192 * 768 + 768
    small: 21,665,664 + 384 * 512 + 512 + 512 + 100,864 + 25,219,072 + 1,024 + 393,984
            + 384 * 768 + 768
    large: 303,301,632 + 1024 * 512 + 512 + 512 + 100,864 + 25,219,072 + 1,024 + 393,984
            + 1024 * 768 + 768

    conv_vit, base: the encoder 84,605,824 (its test), of which 150,528 fixed positions
           stages              16 * 256 * 768 + 768 + 4 * 384 * 768 + 768     4,326,912
           mimic head                                                           590,592
           decoder_embed       768 * 512 + 512                                  393,728
           mask_token                                                               512
           decoder_pos_embed   196 * 512                                        100,352   fixed
           8 blocks            8 * (12 * 512^2 + 13 * 512)                   25,219,072
           decoder_norm                                                           1,024
           decoder_pred        512 * 768 + 768                                  393,984
                                                                     total  115,632,000
    conv_vit, huge: 679,457,792 + 16 * 768 * 1280 + 1280 + 4 * 1024 * 1280 + 1280 (stages)
           + 1280 * 768 + 768 (head) + 1280 * 512 + 512 (decoder_embed)
           + 512 + 100,352 + 25,219,072 + 1,024 + 393,984 = 727,786,496
    with CLS: 768 for the token, and a row of 512 fixed positions
    """
    fixed = 151_296 + 100_864
    assert parameters("mrmae") == (112_498_432, 112_498_432 - fixed)
    assert parameters("mrmae", "encoder=tiny")[0] == 31_486_912
    assert parameters("mrmae", "encoder=small")[0] == 47_873_920
    assert parameters("mrmae", "encoder=large")[0] == 330_329_088
    assert parameters("mrmae", "family=conv_vit") == (115_632_000, 115_632_000 - 150_528 - 100_352)
    huge = parameters("mrmae", "family=conv_vit", "encoder=huge")
    assert huge == (727_786_496, 727_786_496 - 250_880 - 100_352)
    assert parameters("mrmae", "family=conv_vit", "conv_cls=true")[0] == 115_632_000 + 768 + 512
    assert parameters("mrmae", "joint=dino-b16")[0] == 112_498_432 + 590_592
    assert parameters("mrmae", "pixel_weight=0")[0] == 85_798_656 + 590_592
    assert parameters("mrmae", "mimic_weight=0", "mask=uniform")[0] == 111_907_840
    assert parameters("mrmae", "mimic_at=decoder")[0] == 111_907_840 + 512 * 768 + 768


@pytest.mark.slow
def test_cost() -> None:
    """Plain: 29.1 GMAC forward and backward within 2 %. With convolutions, by hand and in millions
    of one forward pass:

    3136 cells: embedding 48 * 256, 2 blocks of 10 * 256^2 + 25 * 256          38.5 + 4,150.6
     784 cells: embedding 4 * 256 * 384, 2 blocks of 10 * 384^2 + 25 * 384    308.3 + 2,327.2
      49 cells: embedding 4 * 384 * 768, patch_embed4 768^2                    57.8 + 28.9
      49 cells: stages 16 * 256 * 768 + 4 * 384 * 768                         212.0
     49 tokens: 11 blocks of 49 * 12 * 768^2 + 2 * 49^2 * 768               3,855.5
     49 tokens: head 768^2, decoder_embed 768 * 512                            28.9 + 19.3
    196 tokens: 8 blocks of 196 * 12 * 512^2 + 2 * 196^2 * 512               5,247.2
    147 tokens: pred 512 * 768                                                  57.8
                                             total 16,332.0, three times that 49.0 GMAC
    """
    assert 3 * gmac("mrmae") == pytest.approx(29.1, rel=0.02)
    assert 3 * gmac("mrmae", "family=conv_vit") == pytest.approx(49.0, rel=0.005)


def test_settings_and_needs() -> None:
    given = mrmae.Config()
    assert given.visible == 49
    assert optim.peak_lr(given, 1024) == pytest.approx(6e-4)
    spec: dict[str, Any] = {"teacher": "clip-b16", "levels": (12,), "patches": 196, "derive": "fd"}
    fields = ("features", "attention")
    assert mrmae.needs(given) == recipes.TargetSpec(**spec, fields=fields, visible_only=True)
    conflict = config.replace(given, mimic_at="decoder", mask="topk")
    assert mrmae.needs(conflict) == recipes.TargetSpec(**spec, fields=fields)
    joint = config.replace(given, joint="dino-b16", mask="uniform")
    assert mrmae.needs(joint) == recipes.TargetSpec(
        **spec,
        fields=("features", "dino-b16/features"),
        visible_only=True,
        second="dino-b16",
        second_level=12,
    )
    projected = config.replace(given, target="z")
    assert (mrmae.needs(projected).derive, projected.target_width) == ("z", 512)
    alone = config.replace(given, mimic_weight=0.0, mask="uniform")
    assert mrmae.needs(alone) == recipes.TargetSpec(
        teacher="", levels=(), fields=(), patches=196, visible_only=True
    )


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("encoder", "family", "fuse", "blocks"),
    [
        ("base", "mae", "auto", (3, 6, 9, 12)),
        ("large", "mae", "auto", (6, 12, 18, 24)),
        ("base", "mae", "last", (12,)),
        ("base", "mae", "12,4", (4, 12)),
        ("base", "conv_vit", "auto", (11,)),
        ("large", "conv_vit", "last", (23,)),
    ],
)
def test_fused_blocks(encoder: str, family: str, fuse: str, blocks: tuple[int, ...]) -> None:
    settings = config.from_overrides(
        mrmae.Config, [f"encoder={encoder}", f"family={family}", f"fuse={fuse}"]
    )
    with torch.device("meta"):
        model = mrmae.Model(settings)
    assert model.blocks == blocks
    assert (model.stages is not None) == (family == "conv_vit" and fuse != "last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["family=conv"], "unknown family 'conv': .*conv_vit"),
        (["mimic_at=decode"], "unknown mimic_at 'decode': did you mean decoder"),
        (["reduction=max"], "unknown reduction 'max'"),
        (["target=clip"], "unknown target 'clip': known: f, fd, h, z"),
        (["fuse=some"], "cannot read fuse='some'; allowed: auto, last, or block numbers"),
        (["fuse=0,3"], "cannot read fuse='0,3'"),
        (["mask_ratio=0"], "leaves all 196 patches visible"),
        (["family=conv_vit", "patch_size=14"], "patch_size=14; allowed: one that 4 divides"),
        (["conv_cls=true"], "conv_cls=true does nothing with family=mae"),
        (["mimic_weight=0", "pixel_weight=0"], "leave nothing to learn"),
        (
            ["mimic_weight=0", "mimic_at=decoder"],
            "mimic_at=decoder does nothing with mimic_weight=0",
        ),
        (["pixel_weight=0", "mimic_at=decoder"], "pixel_weight=0 has one"),
        (["pixel_weight=0", "norm_pix=false"], "norm_pix=false does nothing"),
        (["mimic_weight=0", "joint=dino-b16"], "joint=dino-b16 does nothing"),
        (["joint=clip-b16"], "joint=clip-b16 is the first teacher"),
        (["joint=dino-b16", "target=z"], "joint and target=z"),
        (["decoder_heads=7"], "decoder_width=512, decoder_heads=7"),
    ],
)
def test_what_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.from_overrides(mrmae.Config, settings)


@pytest.mark.parametrize("fuse", ["3,6", "6,13"])
def test_fused_blocks_that_leave_others_untrained(fuse: str) -> None:
    with pytest.raises(UsageError, match=f"cannot fuse blocks {fuse}: the encoder has 12"):
        mrmae.Model(config.from_overrides(mrmae.Config, ["encoder=tiny", f"fuse={fuse}"]))
