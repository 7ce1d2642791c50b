"""Names and shapes of exported weights, tiny to large, as MAE's checkpoints and transformers' have
them: literal lists, on the meta device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from featcache.errors import UserError
from student import exporting
from student.exporting import hf, mae, vitdet
from student.exporting import timm as timm_format
from student.features import export_folder
from student.models import beit, classifier, conv_vit
from student.models.build import build_encoder
from student.models.plain_vit import plain_vit

# width, blocks, heads of family mae
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "vit_huge_patch14_224": (1280, 32, 16),
}
MAE_TOP = {
    "cls_token": "1,1,D",
    "pos_embed": "1,197,D",
    "patch_embed.proj.weight": "D,3,16,16",
    "patch_embed.proj.bias": "D",
    "norm.weight": "D",
    "norm.bias": "D",
}
MAE_BLOCK = {
    "norm1.weight": "D",
    "norm1.bias": "D",
    "attn.qkv.weight": "T,D",
    "attn.qkv.bias": "T",
    "attn.proj.weight": "D,D",
    "attn.proj.bias": "D",
    "norm2.weight": "D",
    "norm2.bias": "D",
    "mlp.fc1.weight": "M,D",
    "mlp.fc1.bias": "M",
    "mlp.fc2.weight": "D,M",
    "mlp.fc2.bias": "D",
}
VITDET_TOP = {
    "backbone.net.pos_embed": "1,197,D",
    "backbone.net.patch_embed.proj.weight": "D,3,16,16",
    "backbone.net.patch_embed.proj.bias": "D",
}
HF_TOP = {
    "embeddings.cls_token": "1,1,D",
    "embeddings.position_embeddings": "1,197,D",
    "embeddings.patch_embeddings.projection.weight": "D,3,16,16",
    "embeddings.patch_embeddings.projection.bias": "D",
    "layernorm.weight": "D",
    "layernorm.bias": "D",
}
HF_BLOCK = {
    "layernorm_before.weight": "D",
    "layernorm_before.bias": "D",
    "attention.attention.query.weight": "D,D",
    "attention.attention.query.bias": "D",
    "attention.attention.key.weight": "D,D",
    "attention.attention.key.bias": "D",
    "attention.attention.value.weight": "D,D",
    "attention.attention.value.bias": "D",
    "attention.output.dense.weight": "D,D",
    "attention.output.dense.bias": "D",
    "layernorm_after.weight": "D",
    "layernorm_after.bias": "D",
    "intermediate.dense.weight": "M,D",
    "intermediate.dense.bias": "M",
    "output.dense.weight": "D,M",
    "output.dense.bias": "D",
}


def settings(size: str, **more: Any) -> dict[str, Any]:
    return {"encoder": size, "img_size": 224, "patch_size": 16, **more}


def given(net: nn.Module, about: dict[str, Any], family: str, classes: int = 0) -> Any:
    pixels = ((0.0,) * 3, (1.0,) * 3)
    return SimpleNamespace(
        run="RUN",
        net=net,
        settings=about,
        family=family,
        classes=classes,
        img_size=224,
        pixels=pixels,
    )


def expected(
    top: dict[str, str], block: dict[str, str], where: str, width: int, depth: int
) -> dict[str, tuple[int, ...]]:
    names = {
        **top,
        **{f"{where}.{i}.{name}": of for i in range(depth) for name, of in block.items()},
    }
    letters = {"D": width, "T": 3 * width, "M": 4 * width}
    return {
        name: tuple(letters.get(part) or int(part) for part in of.split(","))
        for name, of in names.items()
    }


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


FAMILIES = {
    "mae": [*SIZES],
    "cae": [*beit.SIZES],
    "beit": [*beit.SIZES],
    "conv_vit": [*conv_vit.SIZES],
}
BUILT = [(family, size) for family, sizes in FAMILIES.items() for size in sizes]
# the word of a refusal, of family and format; all others are exported
REFUSED = {
    **{("beit", form): "relative positions" for form in ("hf", "mae", "vitdet")},
    **{("conv_vit", form): "'conv_vit'" for form in ("timm", "hf", "mae", "vitdet")},
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("form", exporting.names())
@pytest.mark.parametrize(("family", "size"), BUILT)
def test_every_format_says_of_every_size_whether_it_takes_it(
    family: str, size: str, form: str
) -> None:
    about, module = settings(size), exporting.load(form)
    with torch.device("meta"):
        whole = given(build_encoder(about, family), about, family)
    if why := REFUSED.get((family, form)):
        with pytest.raises(UserError, match=why):
            _check(whole, module)
    else:
        _check(whole, module)


def _check(whole: Any, module: Any) -> None:
    export_folder.check_family(whole, module)
    with torch.device("meta"):
        module.check(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [each for each in BUILT if each[0] in ("mae", "cae")])
def test_names_and_shapes(size: str, family: str) -> None:
    width, depth, heads = SIZES[size]
    about = settings(size)
    with torch.device("meta"):
        net = build_encoder(about, family)
        whole = given(net, about, family)
        found, theirs = mae.plain(whole), hf.state_dict(hf.plain(whole))
        detector = vitdet.state_dict(vitdet.plain(whole))
    assert shapes(found.state) == expected(MAE_TOP, MAE_BLOCK, "blocks", width, depth)
    assert shapes(theirs) == expected(HF_TOP, HF_BLOCK, "encoder.layer", width, depth)
    names = expected(VITDET_TOP, MAE_BLOCK, "backbone.net.blocks", width, depth)
    assert shapes(detector) == names
    # CAE's tiny and small have 12 heads
    assert found.heads == (heads if family == "mae" else max(heads, 12))
    assert (found.eps, found.depth, found.mlp_width) == (1e-6, depth, 4 * width)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [each for each in BUILT if each[0] != "conv_vit"])
def test_timm_builds_what_the_run_has(size: str, family: str) -> None:
    about = settings(size)
    with torch.device("meta"):
        net = build_encoder(about, family)
        whole = given(net, about, family)
        timm_format.check(whole)
        name, arguments = timm_format.architecture(whole)
        theirs = timm.create_model(name, **arguments)
    own = size if size.startswith("vit_") else f"vit_{size}_patch16_224"
    assert name == (own if family == "mae" else "beit_base_patch16_224")
    assert shapes(theirs.state_dict()) == shapes(net.state_dict())


def test_a_head_has_maes_fine_tuned_names() -> None:
    about = settings("tiny", classes=7, pool="mean", rel_pos=False, drop_path=0.1)
    with torch.device("meta"):
        found = mae.plain(given(classifier.build(about, "mae"), about, "mae", 7))
    own = expected(MAE_TOP, MAE_BLOCK, "blocks", 192, 12)
    for kind in ("weight", "bias"):
        own[f"fc_norm.{kind}"] = own.pop(f"norm.{kind}")
    assert shapes(found.state) == {**own, "head.weight": (7, 192), "head.bias": (7,)}
    about["pool"] = "cls"
    with torch.device("meta"):
        theirs = hf.state_dict(hf.plain(given(classifier.build(about, "mae"), about, "mae", 7)))
    assert {name for name in theirs if "vit." not in name} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert theirs["vit.layernorm.weight"].shape == (192,)


def test_layer_scale_and_biases_by_hand() -> None:
    net = build_encoder(settings("tiny,embed_dim=4,depth=1,num_heads=1"), "cae")
    block: Any = net.blocks[0]  # type: ignore[index]
    with torch.no_grad():
        block.gamma_1.copy_(torch.tensor([2.0, 3.0, 5.0, 7.0]))
        block.attn.proj.weight.fill_(1.0)
        block.attn.proj.bias.fill_(10.0)
        block.gamma_2.fill_(0.5)
        block.mlp.fc2.weight.fill_(4.0)
        block.attn.q_bias.fill_(1.5)
        block.attn.v_bias.fill_(2.5)
    state = plain_vit(net, "it", "no").state
    assert state["blocks.0.attn.proj.weight"][:, 0].tolist() == [2.0, 3.0, 5.0, 7.0]
    assert state["blocks.0.attn.proj.bias"].tolist() == [20.0, 30.0, 50.0, 70.0]
    assert state["blocks.0.mlp.fc2.weight"].unique().tolist() == [2.0]
    assert state["blocks.0.attn.qkv.bias"].tolist() == [1.5] * 4 + [0.0] * 4 + [2.5] * 4


def test_a_detectors_backbone_has_no_head_and_no_class_token() -> None:
    about = settings("tiny", classes=7, pool="mean", rel_pos=False, drop_path=0.1)
    with torch.device("meta"):
        whole = given(classifier.build(about, "mae"), about, "mae", 7)
        found = vitdet.state_dict(vitdet.plain(whole))
    assert shapes(found) == expected(VITDET_TOP, MAE_BLOCK, "backbone.net.blocks", 192, 12)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("vit_base_patch16_clip_224", {}, "a norm before the blocks"),
        ("vit_small_patch14_reg4_dinov2", {}, "register tokens"),
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}, "another activation"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norms inside the attention"),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "without a class"),
        ("vit_base_patch16_siglip_224", {}, "attention pooling"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "norms other than LayerNorm"),
        ("eva02_tiny_patch14_224", {}, "the network Eva"),
        ("vit_small_patch16_rope_224", {}, "the network Eva"),
        ("beit_base_patch16_224", {}, "relative positions"),
        ("vit_giant_patch14_dinov2", {"depth": 2}, "an MLP of another kind"),
    ],
)
def test_what_no_plain_vit_has_is_named(name: str, options: dict[str, Any], why: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **options)
    with pytest.raises(UserError, match=why):
        plain_vit(net, "it", "no")


def test_zeros_where_there_is_no_bias() -> None:
    with torch.device("meta"):
        net = timm.create_model("vit_small_patch14_dinov2", qkv_bias=False, num_classes=0, depth=1)
    found = plain_vit(net, "it", "no")
    assert shapes(found.state)["blocks.0.attn.qkv.bias"] == (3 * 384,)
    assert "blocks.0.ls1.gamma" not in found.state
