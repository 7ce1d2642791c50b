"""A teacher's network becomes timm's own module: the same tokens, by a name that a run records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models.open_clip_wrapper import OpenClipVit
from student.models import classifier, timm_network

SMALL = ",depth=2,embed_dim=48,num_heads=3,img_size=32,patch_size=8"
TOWER = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 4, "output_dim": 16}


def settings(text: str, **changes: object) -> dict[str, Any]:
    fixed = {"img_size": 32, "patch_size": 8, "classes": 5, "rel_pos": False, "drop_path": 0.0}
    return {"encoder": text, "pool": "mean", **fixed, **changes}


@pytest.mark.parametrize("act", [QuickGELU, nn.GELU])
@pytest.mark.parametrize("ratio", [4.0, 3.0])
def test_an_open_clip_tower_gives_the_same_tokens(act: type[nn.Module], ratio: float) -> None:
    """Its own tokens before the last norm are read by a hook of ours on the unmodified tower."""
    torch.manual_seed(1)
    tower = VisionTransformer(
        **TOWER,
        mlp_ratio=ratio,
        act_layer=act,
        norm_layer=LayerNorm,  # type: ignore[arg-type]
    ).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    last: list[torch.Tensor] = []
    tower.transformer.register_forward_hook(lambda _, __, out: last.append(out))
    images = torch.randn(2, 3, 32, 32)
    network, text = timm_network.of_teacher(OpenClipVit(tower, "random:1"), "clip-b16")
    with torch.no_grad():
        tower(images)
        expected = tower.ln_post(last[0])
        found = network.eval().forward_features(images)  # type: ignore[operator]
    assert found.shape == (2, 17, 48)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    again = timm_network.build(text, img_size=32, patch_size=8)
    assert again.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("timm:vit_tiny_patch16_224" + SMALL, "vit_tiny_patch16_224,depth=2,embed_dim=48"),
        ("timm:vit_base_patch16_siglip_224" + SMALL, "vit_base_patch16_siglip_224,depth=2"),
        ("timm:eva02_tiny_patch14_224,depth=2,grid=2", "eva02_tiny_patch14_224,depth=2"),
        ("timm:vit_small_patch14_reg4_dinov2" + SMALL, "vit_small_patch14_reg4_dinov2,depth=2"),
    ],
)
def test_a_timm_teacher_is_named_and_built_again(spec: str, text: str) -> None:
    teacher: Any = teachers.load(spec, "random:3")
    network, told = timm_network.of_teacher(teacher, spec)
    assert told.startswith(text)
    assert "img_size" not in told
    patch = int(teacher.vit.patch_embed.patch_size[0])
    own = settings(told, img_size=teacher.input_px, patch_size=patch)
    net: Any = classifier.build(own, "timm").eval()
    classifier.load_encoder(net, network, fc_norm_from_norm=True)
    images = torch.randn(2, 3, teacher.input_px, teacher.input_px)
    with torch.no_grad():
        last: Any = network.eval()
        expected = last.fc_norm(last.forward_features(images))  # one of both is none
        found = net.fc_norm(net.forward_features(images))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        pooled = net.fc_norm(net.forward_features(images)[:, net.num_prefix_tokens :].mean(1))
        torch.testing.assert_close(net(images), net.head(pooled), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_registered_clip_is_vit_b16() -> None:
    teacher = teachers.load("clip-b16", "random:0")
    _, text = timm_network.of_teacher(teacher, "clip-b16")
    assert text == (
        "vit_base_patch16_clip_224,embed_dim=768,depth=12,num_heads=12,mlp_ratio=4.0,"
        "act_layer=quick_gelu"
    )


def test_a_teacher_of_ones_own_is_refused() -> None:
    teacher = teachers.load("synthetic", None)
    with pytest.raises(UserError, match="cannot fine-tune the teacher 'synthetic'"):
        timm_network.of_teacher(teacher, "synthetic")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ("hf-hub:someone/model", "unknown encoder"),
        ("./mine.py", "unknown encoder"),
        ("vit_tiny_patch16_224,checkpoint_path=x", "checkpoint_path"),
        ("resnet18", "cannot (build encoder|fine-tune) 'resnet18'"),
        ("vit_tiny_patch16_224,depth=256,embed_dim=16383", "GiB"),
        ("deit_tiny_distilled_patch16_224,depth=1", "VisionTransformerDistilled has two heads"),
        ("vit_tiny_patch16_224,patch_drop_rate=1", "timm says AssertionError;"),
    ],
)
def test_what_a_run_may_not_name(encoder: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        timm_network.build(encoder, img_size=32, patch_size=8)


def test_registers_are_no_cls() -> None:
    text = (
        "vit_tiny_patch16_224,depth=1,embed_dim=48,class_token=false,reg_tokens=4,global_pool=avg"
    )
    assert classifier.build(settings(text, patch_size=8), "timm").num_prefix_tokens == 4
    with pytest.raises(UsageError, match=r"reg_tokens=4,global_pool=avg has no \[CLS\] token"):
        classifier.build(settings(text, patch_size=8, pool="cls"), "timm")
