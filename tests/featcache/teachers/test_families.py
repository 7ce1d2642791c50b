"""Every family on real photographs equals slow independent readings of the libraries' own models.

The networks are small and random, of the very classes that the published ones are; one full-size
network runs too. B batch, T tokens, P patches, D width, H heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from featcache import teachers
from featcache.models import open_clip_wrapper
from featcache.models.spec import parse_options
from featcache.models.timm_wrapper import TimmVit
from featcache.models.weights import weight_hash
from tests import teacher_reference

CLOSE = 1e-5

# family -> (timm's name, options that make it small, tokens before the patches)
SMALL = "embed_dim=24,depth=3,num_heads=3"
TIMM = {
    "dino": ("vit_base_patch16_224.dino", f"img_size=96,patch_size=16,{SMALL}", 1),
    "dinov2": ("vit_base_patch14_dinov2.lvd142m", f"img_size=70,{SMALL}", 1),
    "dinov2-reg": ("vit_base_patch14_reg4_dinov2.lvd142m", f"img_size=70,{SMALL}", 5),
    "dinov2-giant": ("vit_giant_patch14_dinov2.lvd142m", f"img_size=70,{SMALL}", 1),  # SwiGLU
    "dinov3": ("vit_base_patch16_dinov3.lvd1689m", f"img_size=80,{SMALL}", 5),
    "dinov3-bias": ("vit_base_patch16_dinov3_qkvb.lvd1689m", f"img_size=80,{SMALL}", 5),
    # q, k, v apart, positions of both kinds
    "eva02": ("eva02_base_patch14_224.mim_in22k", f"img_size=56,{SMALL}", 1),
    # by block and head
    "rope-mixed": ("vit_small_patch16_rope_mixed_224.naver_in1k", f"img_size=80,{SMALL}", 1),
    "pe-spatial": ("vit_pe_spatial_base_patch16_512.fb", f"img_size=80,{SMALL}", 1),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k", f"img_size=80,{SMALL}", 1),
    "mae": ("vit_base_patch16_224.mae", f"img_size=96,{SMALL}", 1),
    "deit": ("deit_base_patch16_224.fb_in1k", f"img_size=96,{SMALL}", 1),
    "deit-distilled": ("deit_base_distilled_patch16_224.fb_in1k", f"img_size=96,{SMALL}", 2),
    "deit3": ("deit3_base_patch16_224.fb_in1k", f"img_size=96,{SMALL}", 1),
    "clip-by-timm": ("vit_base_patch16_clip_quickgelu_224.openai", f"img_size=96,{SMALL}", 1),
    "qk-norm": (
        "vit_base_patch16_224",
        f"img_size=96,{SMALL},qk_norm=true,reg_tokens=3,init_values=0.5",
        4,
    ),
}


def _options(text: str) -> dict[str, Any]:
    return dict(parse_options(text))


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("family", TIMM)
def test_timm_families_equal_the_unmodified_model(family: str) -> None:
    arch, options, prefix = TIMM[family]
    teacher: Any = teachers.load(f"timm:{arch},{options}", "random:0")
    teacher_reference.randomise_parameters(teacher.vit)
    exact: Any = timm.create_model(arch, num_classes=0, **_options(options)).eval().double()
    exact.load_state_dict(teacher.vit.state_dict())
    size = teacher.input_px
    images = teacher_reference.photographs(size)
    ys, attention = teacher(images, (1, 3))
    pixels = teacher_reference.normalise_in_float64(
        images, exact.pretrained_cfg["mean"], exact.pretrained_cfg["std"]
    )
    own = teacher_reference.block_outputs(exact.blocks, lambda: exact.forward_features(pixels))
    weights = teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0]  # (B, T)
    assert exact.num_prefix_tokens == prefix
    assert (
        teacher.patches
        == weights.shape[1] - prefix
        == (size // exact.patch_embed.patch_size[0]) ** 2
    )
    for y, k in zip(ys, (1, 3), strict=True):
        expected = torch.cat([own[k - 1][:, :1], own[k - 1][:, prefix:]], 1)
        assert y.shape == expected.shape == (3, 1 + teacher.patches, 24)
        assert teacher_reference.relative_error(y, expected) < CLOSE
    assert teacher_reference.attention_error(attention, weights[:, prefix:]) < CLOSE
    # what [CLS] and registers get is left out, and nothing is renormalised
    assert (attention.sum(1) < 1 - 1e-4).all()
    assert attention.std(1).min() > 1e-5  # a reading that is the same everywhere would prove little


def _explicit_pool(pool: Any, x: np.ndarray) -> np.ndarray:
    """Compute attention (B, H, T) of an AttentionPoolLatent's query on tokens (B, T, D), by
    numpy."""
    heads, width = pool.num_heads, x.shape[-1]
    q = pool.latent[0, 0].numpy() @ pool.q.weight.numpy().T + pool.q.bias.numpy()
    k = x @ pool.kv.weight.numpy()[:width].T + pool.kv.bias.numpy()[:width]
    logits = np.einsum("hd,bthd->bht", q.reshape(heads, -1), k.reshape(*x.shape[:2], heads, -1))
    weights = np.exp(logits / np.sqrt(width // heads))
    return weights / weights.sum(-1, keepdims=True)


def test_siglip_has_the_mean_for_cls_and_its_pools_attention() -> None:
    arch, options = "vit_base_patch16_siglip_224.webli", f"img_size=96,{SMALL}"
    teacher: Any = teachers.load(f"timm:{arch},{options}", "random:0")
    teacher_reference.randomise_parameters(teacher.vit)
    exact: Any = (
        timm.create_model(arch, num_classes=0, **_options(options))
        .eval()
        .requires_grad_(False)
        .double()
    )
    exact.load_state_dict(teacher.vit.state_dict())
    images = teacher_reference.photographs(96)
    (y,), attention = teacher(images, (2,))
    pixels = teacher_reference.normalise_in_float64(images, (0.5,) * 3, (0.5,) * 3)
    own = teacher_reference.block_outputs(exact.blocks, lambda: exact.forward_features(pixels))
    assert teacher.first_token == "mean"
    assert y.shape == (3, 37, 24)
    assert teacher_reference.relative_error(y[:, 1:], own[1]) < CLOSE
    assert teacher_reference.relative_error(y[:, 0], own[1].mean(1)) < CLOSE
    with torch.no_grad():
        tokens = exact.forward_features(pixels)
    weights = _explicit_pool(exact.attn_pool, tokens.numpy())
    assert teacher_reference.attention_error(attention, torch.from_numpy(weights.mean(1))) < CLOSE
    torch.testing.assert_close(attention.sum(1), torch.ones(3))  # there is no [CLS] to take a share
    pool = exact.attn_pool  # and these weights are what the pool itself mixes by
    values = (tokens @ pool.kv.weight[24:].T + pool.kv.bias[24:]).unflatten(-1, (3, 8)).numpy()
    mixed = (
        torch.from_numpy(np.einsum("bht,bthd->bhd", weights, values)).flatten(1)
        @ pool.proj.weight.T
    )
    mixed = mixed + pool.proj.bias
    torch.testing.assert_close(mixed + pool.mlp(pool.norm(mixed)), pool(tokens))


# ---------------------------------------------------------------- CLIP

VISION = {"image_size": 48, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1}
CLIPS = {
    "quick": ({}, True),
    "gelu": ({}, False),
    "layer scale": ({"ls_init_value": 0.5}, False),
    "qk norm": ({"qk_norm": True}, False),
    "no first norm, mean pool": (
        {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        True,
    ),
}


def small_clip(folder: Path, quick: bool = True, name: str = "small.json", **vision: Any) -> Path:
    """Write a config that open_clip can build."""
    path = folder / name
    about = {
        "embed_dim": 12,
        "quick_gelu": quick,
        "vision_cfg": {**VISION, **vision},
        "text_cfg": TEXT,
    }
    path.write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("kind", CLIPS)
def test_clip_equals_the_unmodified_tower(tmp_path: Path, kind: str) -> None:
    vision, quick = CLIPS[kind]
    teacher: Any = teachers.load(f"open_clip:{small_clip(tmp_path, quick, **vision)}", "random:0")
    teacher_reference.randomise_parameters(teacher.visual)
    (tmp_path / "dir").mkdir()
    small_clip(tmp_path / "dir", quick, "open_clip_config.json", **vision)
    about = json.loads((tmp_path / "small.json").read_text())
    (tmp_path / "dir/open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    exact = (
        open_clip.create_model(f"local-dir:{tmp_path / 'dir'}", load_weights=False)
        .visual.eval()
        .double()
    )
    exact.load_state_dict(teacher.visual.state_dict())
    images = teacher_reference.photographs(48)
    ys, attention = teacher(images, (1, 3))
    pixels = teacher_reference.normalise_in_float64(
        images, open_clip_wrapper.OPENAI_MEAN, open_clip_wrapper.OPENAI_STD
    )
    seen: list[Tensor] = []
    blocks = exact.transformer.resblocks
    handle = blocks[-1].ln_1.register_forward_hook(lambda _, __, x: seen.append(x))
    own = teacher_reference.block_outputs(blocks, lambda: exact(pixels))
    handle.remove()
    weights = _tower_map(blocks[-1].attn, seen[0])
    for y, k in zip(ys, (1, 3), strict=True):
        assert y.shape == own[k - 1].shape == (3, 37, 24)
        assert teacher_reference.relative_error(y, own[k - 1]) < CLOSE
    assert teacher_reference.attention_error(attention, weights[:, 0, 1:]) < CLOSE


def _tower_map(attn: Any, x: Tensor) -> Tensor:
    """Map normed tokens (B, T, D) -> (B, T, T), heads averaged: torch's own weights, or the softmax
    written out."""
    if isinstance(attn, torch.nn.MultiheadAttention):
        return attn(x, x, x, need_weights=True, average_attn_weights=True)[1].detach()
    q, k, _ = (x @ attn.in_proj_weight.T + attn.in_proj_bias).detach().chunk(3, -1)
    q, k = (v.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2).numpy() for v in (q, k))
    q, k = (
        (v - v.mean(-1, keepdims=True))
        / np.sqrt(v.var(-1, keepdims=True) + n.eps)
        * n.weight.detach().numpy()
        + n.bias.detach().numpy()
        for v, n in ((q, attn.ln_q), (k, attn.ln_k))
    )
    logits = torch.from_numpy(np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    return logits.softmax(-1).mean(1)


@pytest.mark.slow
def test_a_tower_that_open_clip_takes_from_timm(tmp_path: Path) -> None:
    """SigLIP by its open_clip name: the trunk is timm's, the pixel statistics are the tag's."""
    teacher: Any = teachers.load("open_clip:ViT-B-16-SigLIP", "random:0")
    assert isinstance(teacher, TimmVit)
    assert (teacher.input_px, teacher.patches, teacher.width, teacher.depth) == (224, 196, 768, 12)
    assert teacher.pixel_mean == teacher.pixel_std == (0.5, 0.5, 0.5)


# ---------------------------------------------------------------- the whole size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino-b16", "dinov2-b14-reg", "dinov3-b16", "deit-b16"])
def test_base_networks_equal_the_unmodified_model(name: str) -> None:
    """float32 against float64: 12 blocks, 197 to 201 tokens, on the 14 x 14 grid."""
    teacher: Any = teachers.load(name, "random:0")
    row = teachers.model_cards()[name]
    facts = (teacher.input_px, teacher.patches, teacher.width, teacher.depth)
    assert facts == (row.input_px, row.patches, row.width, row.depth)
    assert sum(p.numel() for p in teacher.vit.parameters()) == row.params
    images = teacher_reference.photographs(row.input_px)[:2]
    ys, attention = teacher(images, (8, 12))
    exact: Any = (
        timm.create_model(row.hub.removeprefix("timm/"), num_classes=0, img_size=row.input_px)
        .eval()
        .double()
    )
    exact.load_state_dict(teacher.vit.state_dict())
    pixels = teacher_reference.normalise_in_float64(
        images, exact.pretrained_cfg["mean"], exact.pretrained_cfg["std"]
    )
    own = teacher_reference.block_outputs(exact.blocks, lambda: exact.forward_features(pixels))
    prefix = exact.num_prefix_tokens
    for y, k in zip(ys, (8, 12), strict=True):
        assert (
            teacher_reference.relative_error(
                y, torch.cat([own[k - 1][:, :1], own[k - 1][:, prefix:]], 1)
            )
            < CLOSE
        )
    assert (
        teacher_reference.attention_error(
            attention, teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0, prefix:]
        )
        < CLOSE
    )


@pytest.mark.parametrize("family", ["dinov2-reg", "dinov3", "eva02"])
def test_a_file_of_a_family_is_what_runs(tmp_path: Path, family: str) -> None:
    arch, options, _ = TIMM[family]
    drawn: Any = teachers.load(f"timm:{arch},{options}", "random:3")
    save_file(
        {name: value.contiguous() for name, value in drawn.vit.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    read = teachers.load(f"timm:{arch},{options}", str(tmp_path / "w.safetensors"))
    assert weight_hash(read) == weight_hash(drawn)
