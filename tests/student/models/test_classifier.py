"""An encoder becomes a classifier: pools, norms, head, positions and tables at other sizes, against
plain computation, timm and numbers by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from featcache.errors import UserError
from student.models import beit, classifier, conv_vit, vit
from student.training import finetune
from student.training.finetune import Config
from tests.student.models.test_conv_vit import TINY as CONV
from tests.student.models.test_conv_vit import reference_conv_encode
from tests.student.models.test_vit import linear
from tests.student.recipes.test_recipes import fill, wave

VIT = "vit_tiny_patch16_224,embed_dim=24,depth=3,num_heads=2"
BEIT = "tiny,embed_dim=24,depth=3,num_heads=2"
KINDS = {"mae": VIT, "cae": BEIT, "beit": BEIT, "conv_vit": CONV}
HEADS, DEPTH, CLASSES = 2, 3, 5


def encoder(family: str, img_size: int = 32, conv_cls: bool = False) -> Any:
    """A trained encoder: no weight is at its start value."""
    sizes: dict[str, Any] = {"img_size": img_size, "patch_size": 8}
    if family == "mae":
        net: nn.Module = vit.build(VIT, **sizes)
    elif family == "conv_vit":
        net = conv_vit.build(CONV, cls_token=conv_cls, **sizes)
    else:
        net = beit.build(BEIT, family, **sizes)
    fill(net)
    return net.eval()


def model(family: str, given: Any = None, **changes: Any) -> finetune.Model:
    """The model that is fine-tuned, with the weights of an encoder where one is given."""
    settings = {"img_size": 32, "patch_size": 8, "classes": CLASSES, "drop_path": 0.0, **changes}
    torch.manual_seed(0)
    made = finetune.Model(Config(encoder=KINDS[family], family=family, **settings))
    if given is not None:
        made.load_encoder(given)
    return made.eval()


def logits(made: finetune.Model, images: Tensor) -> Tensor:
    return made({"images": images})["logits"]


def norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def residuals(net: Any, images: Tensor) -> Tensor:
    """Tokens (B,T,D) after the last block, before any norm."""
    seen: list[Tensor] = []
    stack = net.blocks3 if isinstance(net, conv_vit.ConvViT) else net.blocks
    hook = stack[-1].register_forward_hook(lambda *given: seen.append(given[-1]))
    net.forward_features(images)
    hook.remove()
    return seen[0]


# --- pool, norm, head -----------------------------------------------------------------------------


@pytest.mark.parametrize("conv_cls", [False, True])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_conv_classifier_is_the_plain_computation(pool: str, conv_cls: bool) -> None:
    """The independent encoder, then mean of the patches -> norm -> head, or norm -> [CLS] ->
    head; in float64."""
    if pool == "cls" and not conv_cls:
        return
    made = model("conv_vit", conv_cls=conv_cls, pool=pool).double()
    fill(made)
    w, images = made.encoder.state_dict(), wave(2, 3, 32, 32, phase=0.3)
    every = torch.arange(16).expand(2, -1)
    x = reference_conv_encode(w, images, every, heads=HEADS, depth=DEPTH)[0][-1]
    if pool == "mean":
        expected = linear(norm(x[:, int(conv_cls) :].mean(1), w, "fc_norm"), w, "head")
    else:
        expected = linear(norm(x, w, "norm")[:, 0], w, "head")
    torch.testing.assert_close(logits(made, images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("family", ["mae", "cae", "beit"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_pool_norm_and_head_by_hand(family: str, pool: str) -> None:
    made = model(family, encoder(family), pool=pool, rel_pos=family != "mae")
    fill(made)
    net, images = made.encoder, wave(2, 3, 32, 32, phase=0.3).float()
    w, x = net.state_dict(), residuals(net, images)
    if pool == "mean":
        expected = linear(norm(x[:, 1:].mean(1), w, "fc_norm"), w, "head")
    else:
        expected = linear(norm(x[:, 0], w, "norm"), w, "head")
    torch.testing.assert_close(logits(made, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mae", "cae", "beit", "conv_vit"])
@pytest.mark.parametrize("start", ["fresh", "norm"])
def test_fc_norm_is_fresh_or_the_last_norm(family: str, start: str) -> None:
    given = encoder(family)
    last = {name: value.clone() for name, value in given.norm.state_dict().items()}
    net = model(family, given, fc_norm=start).encoder
    assert isinstance(net.norm, nn.Identity)
    assert net.fc_norm.eps == 1e-6
    if start == "fresh":
        last = {"weight": torch.ones_like(last["weight"]), "bias": torch.zeros_like(last["bias"])}
    assert all(torch.equal(net.fc_norm.state_dict()[name], value) for name, value in last.items())


@pytest.mark.parametrize("start", ["fresh", "norm"])
def test_the_norm_before_cls_is_the_encoders_own(start: str) -> None:
    given = encoder("mae")
    net = model("mae", given, fc_norm=start, pool="cls").encoder
    assert torch.equal(net.norm.weight, given.norm.weight)
    assert torch.equal(net.norm.bias, given.norm.bias)
    assert isinstance(net.fc_norm, nn.Identity)


@pytest.mark.parametrize("family", KINDS)
def test_every_other_weight_is_the_encoders(family: str) -> None:
    given = encoder(family)
    expected = {name: value.clone() for name, value in given.state_dict().items()}
    own = model(family, given).encoder.state_dict()
    assert own.keys() - expected.keys() <= {"head.weight", "head.bias", "fc_norm.weight",
                                            "fc_norm.bias"}  # fmt: skip
    shared = own.keys() & expected.keys()
    assert expected.keys() - shared == {"norm.weight", "norm.bias"}
    assert all(torch.equal(own[name], expected[name]) for name in shared)


@pytest.mark.parametrize(("std", "scale"), [(2e-5, 1.0), (0.02, 1.0), (0.02, 0.001)])
def test_start_of_the_head(std: float, scale: float) -> None:
    """24,000 draws: their standard deviation is known to half a per cent; the bias is 0."""
    net = model("mae", classes=1000, head_std=std, head_scale=scale).encoder
    weight = net.head.weight.double()
    assert weight.std().item() == pytest.approx(std * scale, rel=0.02)
    assert abs(weight.mean().item()) < 4 * std * scale / math.sqrt(weight.numel())
    assert torch.equal(net.head.bias, torch.zeros(1000))


def test_the_head_is_cut_at_two_before_it_is_scaled() -> None:
    weight = model("mae", classes=1000, head_std=4.0, head_scale=0.5).encoder.head.weight
    assert weight.abs().max().item() == pytest.approx(1.0, rel=1e-2)
    assert weight.abs().max().item() <= 1.0


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(("family", "prefix"), [("mae", 1), ("cae", 1), ("conv_vit", 0)])
@pytest.mark.parametrize(("size", "grid"), [(32, 4), (48, 6), (24, 3)])
def test_absolute_positions_are_resized_as_timm_does(
    family: str, prefix: int, size: int, grid: int
) -> None:
    given = encoder(family)
    before = given.pos_embed.detach().clone()
    made = model(family, given, img_size=size)
    net = made.encoder
    expected = resample_abs_pos_embed(before, [grid, grid], [4, 4], num_prefix_tokens=prefix)
    assert net.pos_embed.shape == (1, prefix + grid * grid, before.shape[-1])
    assert torch.equal(net.pos_embed, expected)
    assert torch.equal(net.pos_embed[:, :prefix], before[:, :prefix])
    assert torch.equal(net.pos_embed, before) == (size == 32)
    assert logits(model(family, given, img_size=size), torch.zeros(1, 3, size, size)).shape == (
        1,
        5,
    )


@pytest.mark.parametrize(("size", "grid"), [(32, 4), (48, 6)])
def test_a_shared_table_is_resized_as_timm_does_and_copied_to_each_block(
    size: int, grid: int
) -> None:
    given = encoder("beit")
    before = given.rel_pos_bias.relative_position_bias_table.detach().clone()
    assert before.shape == (7 * 7 + 3, HEADS)
    net = model("beit", given, img_size=size, rel_pos=True).encoder
    rows = (2 * grid - 1) ** 2 + 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, once in a process
        expected = resize_rel_pos_bias_table(before, (grid, grid), (rows, HEADS))
    assert net.rel_pos_bias is None
    tables = [block.attn.relative_position_bias_table for block in net.blocks]
    assert len({table.data_ptr() for table in tables}) == DEPTH  # each learns its own
    for table in tables:
        assert torch.equal(table, expected)
        assert table.requires_grad
    assert torch.equal(expected[-3:], before[-3:])
    if size == 32:
        assert torch.equal(expected, before)


def test_a_table_is_resized_between_positions_that_grow_geometrically() -> None:
    """4 -> 6 patches a side, 7 -> 11 distances: timm's positions are 0, +-1, +-(1 + q),
    +-(1 + q + q^2) with q at most 1.5; linear between them, the outermost value beyond 4.75."""
    given = encoder("beit")
    before = given.rel_pos_bias.relative_position_bias_table.detach().double().numpy()
    net = model("beit", given, img_size=48, rel_pos=True).encoder
    got = net.blocks[0].attn.relative_position_bias_table.detach().numpy()
    known = np.array([-4.75, -2.5, -1, 0, 1, 2.5, 4.75])
    wanted = np.arange(-5.0, 6.0)
    for head in range(HEADS):
        rows = before[:-3, head].reshape(7, 7)
        across = np.stack([np.interp(wanted, known, row) for row in rows])
        both = np.stack([np.interp(wanted, known, column) for column in across.T]).T
        np.testing.assert_allclose(got[:-3, head].reshape(11, 11), both, atol=1e-5)


def test_a_table_of_each_block_gives_the_logits_of_the_shared_one() -> None:
    """At the same picture size, before any step."""
    given, images = encoder("beit"), wave(2, 3, 32, 32, phase=0.1).float()
    one, two = (model("beit", given, rel_pos=each, head_std=0.5) for each in (False, True))
    two.encoder.head.load_state_dict(one.encoder.head.state_dict())
    assert one.encoder.rel_pos_bias is not None
    torch.testing.assert_close(logits(one, images), logits(two, images))


@pytest.mark.parametrize("size", [32, 48])
def test_tables_that_were_not_pretrained_begin_at_zero(size: int) -> None:
    net = model("cae", encoder("cae"), img_size=size, rel_pos=True).encoder
    rows = (2 * size // 8 - 1) ** 2 + 3
    for block in net.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, torch.zeros(rows, HEADS))


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("family", ["mae", "cae", "conv_vit"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("size", [32, 48])
def test_positions_are_frozen_or_trained(family: str, trained: bool, size: int) -> None:
    made = model(family, encoder(family), train_positions=trained, img_size=size)
    assert made.encoder.pos_embed.requires_grad == trained
    grouped = {id(each) for group in made.param_groups() for each in group["params"]}
    frozen = [name for name, each in made.named_parameters() if id(each) not in grouped]
    assert frozen == ([] if trained else ["encoder.pos_embed"])


# --- what cannot be -------------------------------------------------------------------------------

SETTINGS = {
    "encoder": VIT, "img_size": 32, "patch_size": 8, "classes": 5, "pool": "mean",
    "rel_pos": False, "drop_path": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("mae", {"classes": 10**9}, "classes is 1000000000"),
        ("mae", {"classes": 1}, "classes is 1"),
        ("mae", {"classes": True}, "classes is True"),
        ("mae", {"classes": "5"}, "classes is '5'"),
        ("mae", {"pool": "max"}, "pool is 'max'"),
        ("mae", {"drop_path": 1.0}, "drop_path is 1.0"),
        ("mae", {"drop_path": math.nan}, "drop_path is nan"),
        ("mae", {"rel_pos": True}, "have no relative positions"),
        ("mae", {"img_size": 33}, "no multiple"),
        ("conv_vit", {"encoder": CONV, "pool": "cls"}, r"has no \[CLS\] token"),
        ("conv_vit", {"encoder": CONV, "rel_pos": True}, "have no relative positions"),
        ("conv_vit", {}, "unknown encoder"),
        ("mvp", {}, "family 'mvp'; known"),
    ],
)
def test_settings_that_cannot_be_meant(family: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        classifier.build({**SETTINGS, **changes}, family)
