"""Every vision transformer that is known by a short name, made small, equals timm's unmodified
model in float64: its levels, the output f that is made of the stored levels, and its attention.

B batch, T tokens, P patches, D width, H heads.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from featcache import teachers
from featcache.errors import UserError
from featcache.models.weights import weight_hash
from featcache.targets import derived, levels
from featcache.teachers import timm_vit
from tests import teacher_reference

CLOSE = 1e-5
SIDE, SMALL = 5, "embed_dim=24,depth=3,num_heads=3"
# the new kinds; all others end with a LayerNorm and have the attention of their [CLS]
NO_NORM = ("radiov", "pe-spatial-", "beitv2-")
RMS_NORM, NO_ATTENTION = ("aimv2-",), ("aimv2-",)
POOL, NO_CLS = ("siglip", "pe-core-"), ("siglip", "aimv2-")
PREFIXES = {
    "dinov2-b14-reg": 5, "dinov2-l14-reg": 5, "dinov3-b16": 5, "dinov3-l16": 5, "tipsv2-b14": 2,
    "tipsv2-l14": 2, "radiov3-b16": 8, "radiov3-l16": 8, "radiov3-h16": 8,
    "radiov4-so400m": 10, "radiov4-h16": 10, "aimv2-l14": 0, "aimv2-h14": 0,
    "siglip-b16": 0, "siglip2-b16": 0,
}  # fmt: skip


def small(name: str) -> tuple[Any, Any]:
    """Return the teacher with drawn parameters, and timm's own model with the same in float64."""
    card = timm_vit.NAMES[name]
    options = f"img_size={SIDE * (16 if card.input_px == 224 else 14)},{SMALL}"
    teacher: Any = teachers.load(f"{name},{options}", "random:0")
    teacher_reference.randomise_parameters(teacher.vit)
    sizes = dict(timm_vit_options(options))
    exact: Any = timm.create_model(card.hub.removeprefix("timm/"), num_classes=0, **sizes)
    exact.load_state_dict(teacher.vit.state_dict())
    return teacher, exact.eval().requires_grad_(False).double()


def timm_vit_options(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (part.split("=") for part in text.split(","))}


def pool_weights(pool: Any, x: Tensor) -> Tensor:
    """Compute the weights (B, H, T) by which an attention pool mixes tokens (B, T, D), written
    out."""
    heads, width = pool.num_heads, x.shape[-1]
    q = pool.latent[0, 0] @ pool.q.weight.T + pool.q.bias
    k = x @ pool.kv.weight[:width].T + pool.kv.bias[:width]
    logits = torch.einsum(
        "hd,bthd->bht", q.unflatten(-1, (heads, -1)), k.unflatten(-1, (heads, -1))
    )
    return (logits / (width // heads) ** 0.5).softmax(-1)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", timm_vit.NAMES)
def test_levels_output_and_attention_equal_timms(name: str) -> None:
    teacher, exact = small(name)
    images = teacher_reference.photographs(teacher.input_px)
    ys, attention = teacher(images, (1, 3))
    cfg, prefix = exact.pretrained_cfg, exact.num_prefix_tokens
    pixels = teacher_reference.normalise_in_float64(images, cfg["mean"], cfg["std"])
    own = teacher_reference.block_outputs(exact.blocks, lambda: exact.forward_features(pixels))
    assert prefix == PREFIXES.get(name, 1)
    assert teacher.first_token == ("mean" if name.startswith(NO_CLS) else "cls")

    def stored(y: Tensor) -> Tensor:
        first = y[:, prefix:].mean(1, keepdim=True) if name.startswith(NO_CLS) else y[:, :1]
        return torch.cat([first, y[:, prefix:]], 1)

    for y, k in zip(ys, (1, 3), strict=True):
        assert y.shape == (3, 1 + SIDE**2, 24)
        assert teacher_reference.relative_error(y, stored(own[k - 1])) < CLOSE
    # f, of what is stored of the last level
    h, stats = levels.normalise(ys[1])
    f = derived.derive("f", h, _tail(teacher), stats)
    expected = stored(exact.forward_features(pixels))
    if name.startswith(NO_CLS):  # the norm of the mean, not the mean of what is normed
        expected[:, :1] = exact.norm(own[2].mean(1, keepdim=True))
    assert teacher_reference.relative_error(f, expected) < CLOSE
    # and its attention
    assert teacher.has_attention != name.startswith(NO_ATTENTION)
    if not teacher.has_attention:
        assert attention.shape == (3, 0)
        return
    if name.startswith(POOL):
        weights = pool_weights(exact.attn_pool, exact.forward_features(pixels)).mean(1)
    else:
        weights = teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0]
    assert teacher_reference.attention_error(attention, weights[:, prefix:]) < CLOSE
    assert attention.std(1).min() > 1e-5


def _tail(teacher: Any) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in teacher.tail().items()}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", timm_vit.NAMES)
def test_a_tail_tells_the_kind_of_the_final_norm(name: str) -> None:
    teacher, _ = small(name)
    kinds = {RMS_NORM: {"rms_gamma", "eps"}, NO_NORM: {"identity"}}
    wanted = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
    assert set(teacher.tail()) == (wanted or {"gamma", "beta", "eps"})


# ---------------------------------------------------------------- BEiT's relative positions


def test_beits_shared_positions_are_within_the_softmax() -> None:
    """As in its self-supervised weights, which have one table for all blocks, and a final norm."""
    own = "use_fc_norm=false,use_rel_pos_bias=false,use_shared_rel_pos_bias=true"
    teacher: Any = teachers.load(f"beitv2-b16,img_size=80,{SMALL},{own}", "random:0")
    teacher_reference.randomise_parameters(teacher.vit)
    assert set(teacher.tail()) == {"gamma", "beta", "eps"}
    options = {**timm_vit_options(f"img_size=80,{SMALL}"), "use_rel_pos_bias": False}
    exact: Any = timm.create_model(
        "beitv2_base_patch16_224", num_classes=0, use_fc_norm=False, use_shared_rel_pos_bias=True,
        **options,
    ).eval().double()  # fmt: skip
    exact.load_state_dict(teacher.vit.state_dict())
    images = teacher_reference.photographs(80)
    _, attention = teacher(images, (3,))
    cfg = exact.pretrained_cfg
    pixels = teacher_reference.normalise_in_float64(images, cfg["mean"], cfg["std"])
    weights = teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0, 1:]
    assert teacher_reference.attention_error(attention, weights) < CLOSE
    with torch.no_grad():
        exact.rel_pos_bias.relative_position_bias_table.zero_()
    without = teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0, 1:]
    assert teacher_reference.attention_error(attention, without) > 0.01


def test_beits_file_is_loaded_at_its_own_grid(tmp_path: Path) -> None:
    """Its tables tell the grid that they are of; another is timm's resizing of them."""
    drawn: Any = teachers.load(f"beitv2-b16,img_size=96,{SMALL}", "random:3")
    teacher_reference.randomise_parameters(drawn.vit)
    path = tmp_path / "w.safetensors"
    extra = {"lm_head.weight": torch.zeros(2, 24), "cls_pt_layers.0.norm1.bias": torch.zeros(24)}
    save_file({**drawn.vit.state_dict(), **extra, "mask_token": torch.zeros(1, 1, 24)}, path)
    same = teachers.load(f"beitv2-b16,img_size=96,{SMALL}", str(path))
    assert weight_hash(same) == weight_hash(drawn)
    other: Any = teachers.load(f"beitv2-b16,img_size=64,{SMALL}", str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how timm's resizing calls torch
        drawn.vit.set_input_size((64, 64))
    assert other.input_px == 64
    torch.testing.assert_close(dict(other.vit.state_dict()), dict(drawn.vit.state_dict()))


# ---------------------------------------------------------------- RADIO's own files


def radio_file(path: Path, prefixes: int) -> dict[str, Tensor]:
    """Write a file as NVIDIA's are: positions of 128 x 128 patches, a linear patch embedding, and
    a token for each teacher and register in one array."""
    draw = torch.Generator().manual_seed(1)
    donor: Any = timm.create_model(
        "vit_base_patch16_radio_v3", num_classes=0, img_size=64, embed_dim=24, depth=3, num_heads=3
    )
    blocks = {n: v for n, v in donor.state_dict().items() if n.startswith("blocks.")}
    model = {name: torch.randn(value.shape, generator=draw) for name, value in blocks.items()}
    model |= {
        "patch_generator.embedder.weight": torch.randn(24, 768, generator=draw),
        "patch_generator.pos_embed": torch.randn(1, 128 * 128, 24, generator=draw),
        "patch_generator.cls_token.token": torch.randn(prefixes, 24, generator=draw),
    }
    others = {"input_conditioner.norm_mean": torch.zeros(3, 1, 1)}
    whole = {f"radio_model.model.{name}": value for name, value in model.items()} | {
        f"radio_model.{name}": value for name, value in others.items()
    }
    save_file(whole, path)
    return model


@pytest.mark.parametrize(
    ("name", "prefixes", "corners"), [("radiov3-b16", 8, True), ("radiov3-l16", 8, False)]
)
def test_radios_own_positions_are_resized_as_its_authors_do(
    tmp_path: Path, name: str, prefixes: int, corners: bool
) -> None:
    path = tmp_path / "radio.safetensors"
    model = radio_file(path, prefixes)
    teacher: Any = teachers.load(f"{name},img_size=80,{SMALL}", str(path))
    state = teacher.vit.state_dict()
    grid = model["patch_generator.pos_embed"].reshape(1, 128, 128, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, (5, 5), mode="bilinear", align_corners=corners)
    torch.testing.assert_close(state["pos_embed"], wanted.flatten(2).transpose(1, 2))
    tokens = model["patch_generator.cls_token.token"]
    torch.testing.assert_close(torch.cat([state["cls_token"], state["reg_token"]], 1)[0], tokens)
    weight = model["patch_generator.embedder.weight"]
    torch.testing.assert_close(state["patch_embed.proj.weight"], weight.reshape(24, 3, 16, 16))
    # by the rule that is named, of the file's own grid
    other: Any = teachers.load(f"{name},img_size=80,{SMALL},pos=bicubic", str(path))
    bicubic = F.interpolate(grid, (5, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        other.vit.state_dict()["pos_embed"], bicubic.flatten(2).transpose(1, 2)
    )


def test_radio_is_made_at_224_pixels_unless_another_rule_is_named() -> None:
    teacher: Any = teachers.load(f"radiov4-h16,{SMALL}", "random:0")
    assert (teacher.input_px, teacher.patches) == (224, 196)
    assert teacher.vit.pos_embed.shape == (1, 196, 24)
    assert np.allclose(teacher.pixel_mean, (0.48145466, 0.4578275, 0.40821073))
    named: Any = teachers.load(f"radiov4-h16,{SMALL},grid=7,pos=bilinear", "random:0")
    assert (named.input_px, named.patches) == (112, 49)
    bare: Any = teachers.load(f"timm:vit_huge_patch16_radio_v4,{SMALL}", "random:0")
    assert bare.input_px == 512
    with pytest.raises(UserError, match="pos=bicubic, but its positions are rotary or relative"):
        teachers.load(f"beitv2-b16,{SMALL},grid=7,pos=bicubic", "random:0")


def test_rms_norms_run_in_float32_under_autocast() -> None:
    """As LayerNorms do: a norm of bfloat16 numbers would lose five bits more."""
    teacher, _ = small("aimv2-l14")
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    teacher.vit.patch_embed.norm.register_forward_hook(
        lambda _, given, out: seen.append((given[0].dtype, out.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        teacher(teacher_reference.photographs(teacher.input_px), (3,))
    assert seen == [(torch.float32, torch.float32)]
