"""The groups of layer-wise decay are the released codes' own, name by name: numbers by hand.

Layer i of a model of n blocks learns at decay^(n + 1 - i): the stem is layer 0, block k layer
k + 1, what follows the blocks layer n + 1. Sources: facebookresearch/mae util/lr_decay.py:15-73,
Alpha-VL/ConvMAE util/lr_decay.py:15-80, lxtGH/CAE furnace/optim_factory.py:24-87,
SwinTransformer/Feature-Distillation optimizer.py:113-200.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import timm
import torch
from torch import nn

from student.models import conv_vit
from student.models.layer_decay import param_groups

Layers = list[tuple[str, int, float]]
Decays = list[tuple[str, bool]]

# name of a parameter -> its layer -> 0.65^(13 - layer), written out
VIT_LAYERS: Layers = [
    ("cls_token", 0, 0.00369720589101871337890625),
    ("pos_embed", 0, 0.00369720589101871337890625),
    ("patch_embed.proj.*", 0, 0.00369720589101871337890625),
    ("blocks.0.*", 1, 0.005688009063105712890625),
    ("blocks.1.*", 2, 0.0087507831740087890625),
    ("blocks.2.*", 3, 0.01346274334462890625),
    ("blocks.3.*", 4, 0.020711912837890625),
    ("blocks.4.*", 5, 0.0318644812890625),
    ("blocks.5.*", 6, 0.04902227890625),
    ("blocks.6.*", 7, 0.075418890625),
    ("blocks.7.*", 8, 0.1160290625),
    ("blocks.8.*", 9, 0.17850625),
    ("blocks.9.*", 10, 0.274625),
    ("blocks.10.*", 11, 0.4225),
    ("blocks.11.*", 12, 0.65),
    ("fc_norm.*", 13, 1.0),
    ("head.*", 13, 1.0),
]
# the two convolutional stages learn at the stem's rate; eleven blocks: 0.65^(12 - layer)
CONV_VIT_LAYERS: Layers = [
    ("pos_embed", 0, 0.005688009063105712890625),
    ("patch_embed1.*", 0, 0.005688009063105712890625),
    ("blocks1.0.*", 0, 0.005688009063105712890625),
    ("blocks1.1.*", 0, 0.005688009063105712890625),
    ("patch_embed2.*", 0, 0.005688009063105712890625),
    ("blocks2.0.*", 0, 0.005688009063105712890625),
    ("blocks2.1.*", 0, 0.005688009063105712890625),
    ("patch_embed3.*", 0, 0.005688009063105712890625),
    ("patch_embed4.*", 0, 0.005688009063105712890625),
    ("blocks3.0.*", 1, 0.0087507831740087890625),
    ("blocks3.1.*", 2, 0.01346274334462890625),
    ("blocks3.2.*", 3, 0.020711912837890625),
    ("blocks3.3.*", 4, 0.0318644812890625),
    ("blocks3.4.*", 5, 0.04902227890625),
    ("blocks3.5.*", 6, 0.075418890625),
    ("blocks3.6.*", 7, 0.1160290625),
    ("blocks3.7.*", 8, 0.17850625),
    ("blocks3.8.*", 9, 0.274625),
    ("blocks3.9.*", 10, 0.4225),
    ("blocks3.10.*", 11, 0.65),
    ("fc_norm.*", 12, 1.0),
    ("head.*", 12, 1.0),
]

# name of a parameter -> whether weight decay applies to it
VIT_DECAYS: Decays = [
    ("cls_token", False),  # 3-D, spared by name
    ("pos_embed", False),
    ("patch_embed.proj.weight", True),
    ("patch_embed.proj.bias", False),
    ("blocks.*.norm[12].weight", False),
    ("blocks.*.norm[12].bias", False),
    ("blocks.*.attn.qkv.weight", True),
    ("blocks.*.attn.qkv.bias", False),
    ("blocks.*.attn.proj.weight", True),
    ("blocks.*.attn.proj.bias", False),
    ("blocks.*.mlp.fc[12].weight", True),
    ("blocks.*.mlp.fc[12].bias", False),
    ("fc_norm.weight", False),
    ("fc_norm.bias", False),
    ("head.weight", True),
    ("head.bias", False),
]
BEIT_DECAYS: Decays = [
    ("cls_token", False),
    ("pos_embed", False),
    ("patch_embed.proj.weight", True),
    ("patch_embed.proj.bias", False),
    ("blocks.*.gamma_[12]", False),
    ("blocks.*.norm[12].weight", False),
    ("blocks.*.norm[12].bias", False),
    ("blocks.*.attn.[qv]_bias", False),
    # 2-D and on no list of CAE or Feature Distillation; timm's own list spares it
    ("blocks.*.attn.relative_position_bias_table", True),
    ("blocks.*.attn.qkv.weight", True),
    ("blocks.*.attn.proj.weight", True),
    ("blocks.*.attn.proj.bias", False),
    ("blocks.*.mlp.fc[12].weight", True),
    ("blocks.*.mlp.fc[12].bias", False),
    ("fc_norm.weight", False),
    ("fc_norm.bias", False),
    ("head.weight", True),
    ("head.bias", False),
]
CONV_VIT_DECAYS: Decays = [
    ("pos_embed", False),
    ("patch_embed[123].proj.weight", True),
    ("patch_embed[123].proj.bias", False),
    ("patch_embed[123].norm.weight", False),
    ("patch_embed[123].norm.bias", False),
    ("patch_embed4.weight", True),
    ("patch_embed4.bias", False),
    ("blocks[12].?.norm[12].weight", False),
    ("blocks[12].?.norm[12].bias", False),
    ("blocks[12].?.conv[12].weight", True),
    ("blocks[12].?.conv[12].bias", False),
    ("blocks[12].?.attn.weight", True),  # the depth-wise convolution
    ("blocks[12].?.attn.bias", False),
    ("blocks[12].?.mlp.fc[12].weight", True),
    ("blocks[12].?.mlp.fc[12].bias", False),
    ("blocks3.*.norm[12].weight", False),
    ("blocks3.*.norm[12].bias", False),
    ("blocks3.*.attn.qkv.weight", True),
    ("blocks3.*.attn.qkv.bias", False),
    ("blocks3.*.attn.proj.weight", True),
    ("blocks3.*.attn.proj.bias", False),
    ("blocks3.*.mlp.fc[12].weight", True),
    ("blocks3.*.mlp.fc[12].bias", False),
    ("fc_norm.weight", False),
    ("fc_norm.bias", False),
    ("head.weight", True),
    ("head.bias", False),
]


# --- the three families, narrow but of full depth -------------------------------------------------


def vit(**changes: object) -> nn.Module:
    """Build timm's ViT-B as MAE fine-tunes it: mean of the patches, fc_norm, head."""
    options = {"global_pool": "avg", "embed_dim": 12, "num_heads": 3, "num_classes": 5, **changes}
    return timm.create_model("vit_base_patch16_224", img_size=32, **options)


def beit(**changes: object) -> nn.Module:
    """Build timm's BEiT-B as CAE fine-tunes it: a table of relative positions in every block."""
    options = {
        "global_pool": "avg",
        "use_rel_pos_bias": True,
        "use_abs_pos_emb": True,
        "init_values": 0.1,
        "embed_dim": 12,
        "num_heads": 3,
        "num_classes": 5,
        **changes,
    }
    return timm.create_model("beit_base_patch16_224", img_size=32, **options)


def conv() -> nn.Module:
    """Build ConvMAE's encoder with the names of a classifier, its positions trained."""
    sizes = "stage1=4,stage2=6,embed_dim=8,depth=11,num_heads=2,stage_mlp=2"
    net = conv_vit.build(f"base,{sizes}", img_size=32)
    net.pos_embed.requires_grad_(True)
    net.norm = nn.Identity()  # type: ignore[assignment]  # a classifier's comes after the pooling
    net.fc_norm = nn.LayerNorm(8)
    net.head = nn.Linear(8, 5)
    return net


FAMILIES = {
    "vit": (vit, VIT_LAYERS, VIT_DECAYS, 13),
    "beit": (beit, VIT_LAYERS, BEIT_DECAYS, 13),
    "conv_vit": (conv, CONV_VIT_LAYERS, CONV_VIT_DECAYS, 12),
}
families = pytest.mark.parametrize("family", FAMILIES)


def by_name(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.65
) -> dict[str, tuple[float, float]]:
    """Return (lr_scale, weight_decay) of every grouped parameter; none is grouped twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in param_groups(model, weight_decay, layer_decay):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr_scale"], group["weight_decay"])
    return found


def row_of(name: str, rows: list[Any]) -> Any:
    """Return the one row whose pattern matches the name."""
    (row,) = [row for row in rows if fnmatchcase(name, str(row[0]))]
    return row


# --- rates ----------------------------------------------------------------------------------------


@families
def test_every_parameter_learns_at_its_layers_rate(family: str) -> None:
    build, layers, _, _ = FAMILIES[family]
    model = build()
    got = by_name(model)
    assert got.keys() == {name for name, _ in model.named_parameters()}
    for name, (scale, _) in got.items():
        assert scale == pytest.approx(row_of(name, layers)[2], rel=1e-12), name


@families
def test_layers_are_numbered_from_the_stem(family: str) -> None:
    """Halves are exact: a scale is 2^(layer - last)."""
    build, layers, _, last = FAMILIES[family]
    for name, (scale, _) in by_name(build(), layer_decay=0.5).items():
        assert scale == 1 / (1 << (last - row_of(name, layers)[1])), name


@families
def test_tables_have_no_idle_row(family: str) -> None:
    """Every pattern above names a parameter, so that no expectation is empty."""
    build, layers, decays, _ = FAMILIES[family]
    names = [name for name, _ in build().named_parameters()]
    for pattern, *_ in [*layers, *decays]:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_two_blocks() -> None:
    got = by_name(vit(depth=2), layer_decay=0.75)
    assert got["patch_embed.proj.weight"][0] == pytest.approx(0.421875)
    assert got["blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.5625)
    assert got["blocks.1.mlp.fc1.weight"][0] == pytest.approx(0.75)
    assert got["head.weight"][0] == 1.0


@families
def test_without_layer_decay_all_learn_at_one_rate(family: str) -> None:
    build, _, decays, _ = FAMILIES[family]
    got = by_name(build(), layer_decay=1.0)
    assert {scale for scale, _ in got.values()} == {1.0}
    assert {name for name, (_, decay) in got.items() if decay} == {
        name for name in got if row_of(name, decays)[1]
    }


def test_the_norm_before_a_cls_head_learns_as_the_head() -> None:
    """Whatever is no stem and no block is the last layer; timm counts the norm to the last
    block."""
    got = by_name(vit(global_pool="token"))
    assert got["norm.weight"] == (1.0, 0.0)
    assert got["blocks.11.norm2.weight"][0] == pytest.approx(0.65)


def test_a_shared_table_learns_as_the_head() -> None:
    """CAE's and Feature Distillation's rule for `rel_pos_bias`; timm counts it to the stem."""
    model = beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    assert by_name(model)["rel_pos_bias.relative_position_bias_table"] == (1.0, 0.05)


# --- weight decay ---------------------------------------------------------------------------------


@families
def test_weight_decay_applies_to_matrices(family: str) -> None:
    build, _, decays, _ = FAMILIES[family]
    for name, (_, decay) in by_name(build()).items():
        assert decay == (0.05 if row_of(name, decays)[1] else 0.0), name


@families
def test_no_weight_decay_is_none_for_all(family: str) -> None:
    build, layers, _, _ = FAMILIES[family]
    got = by_name(build(), weight_decay=0.0)
    assert {decay for _, decay in got.values()} == {0.0}
    assert got["head.weight"][0] == 1.0
    first = layers[0]
    assert got[first[0]][0] == pytest.approx(first[2], rel=1e-12)


# --- the groups themselves ------------------------------------------------------------------------


@families
def test_what_is_frozen_is_in_no_group(family: str) -> None:
    """CAE's positions are fixed in fine-tuning."""
    model = FAMILIES[family][0]()
    model.get_parameter("pos_embed").requires_grad_(False)
    got = by_name(model)
    assert "pos_embed" not in got
    assert len(got) == len(list(model.parameters())) - 1


@families
def test_params_of_a_group_share_rate_and_decay(family: str) -> None:
    """A rate has at most two groups, decayed and not."""
    groups = param_groups(FAMILIES[family][0](), 0.05, 0.65)
    assert all({"params", "weight_decay", "lr_scale"} <= group.keys() for group in groups)
    kinds = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert len(kinds) == len(set(kinds)) == 2 * (FAMILIES[family][3] + 1)


@families
def test_an_optimiser_keeps_the_scales(family: str) -> None:
    groups = param_groups(FAMILIES[family][0](), 0.05, 0.65)
    expected = [group["lr_scale"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr_scale"] for group in optimizer.param_groups] == expected
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
