"""Positions on another grid equal arithmetic by hand, timm's own resizing and the papers' order of
operations.

T positions, D width, S pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from featcache import teachers
from featcache.errors import UsageError
from featcache.models import position_embedding, weights
from tests import teacher_reference
from tests.featcache.teachers.test_families import small_clip

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _taps(old: int, new: int, cubic: bool) -> np.ndarray:
    """Return (new, old) weights of one axis: centres aligned, edges repeated, no antialias; Keys'
    cubic with a = -0.75."""
    table = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        if not cubic:
            centre = max(centre, 0.0)
        first = int(np.floor(centre))
        for j in range(first - 1, first + 3):
            t = abs(centre - j)
            if cubic:
                a = -0.75
                near, far = (
                    (a + 2) * t**3 - (a + 3) * t**2 + 1,
                    a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a,
                )
                weight = near if t <= 1 else far if t < 2 else 0.0
            else:
                weight = max(0.0, 1 - t)
            table[i, min(max(j, 0), old - 1)] += weight
    return table


@pytest.mark.parametrize(
    ("mode", "cubic"), [("bicubic", True), ("tensor-bicubic", True), ("bilinear", False)]
)
@pytest.mark.parametrize(("old", "new", "prefix"), [(16, 14, 1), (37, 14, 0), (4, 7, 5)])
def test_resized_positions_by_hand(mode: str, cubic: bool, old: int, new: int, prefix: int) -> None:
    given = torch.from_numpy(
        np.random.default_rng(0).normal(size=(1, prefix + old * old, 3)).astype(np.float32)
    )
    got = position_embedding.resize_positions(given, new, mode, prefix)
    taps = _taps(old, new, cubic)
    grid = given[0, prefix:].double().numpy().reshape(old, old, 3)
    expected = np.einsum("iy,jx,yxd->ijd", taps, taps, grid).reshape(new * new, 3)
    assert got.shape == (1, prefix + new * new, 3)
    assert torch.equal(got[:, :prefix], given[:, :prefix])
    np.testing.assert_allclose(got[0, prefix:], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "kind", "antialias"),
    [
        ("bicubic", "bicubic", False),
        ("bilinear", "bilinear", False),
        ("bicubic-antialias", "bicubic", True),
        ("tensor-bicubic", "bicubic", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("old", "new", "prefix"), [(16, 14, 1), (14, 14, 1), (37, 14, 0), (4, 7, 5)]
)
def test_resized_positions_are_torchs_interpolation(
    mode: str, kind: str, antialias: bool, dtype: torch.dtype, old: int, new: int, prefix: int
) -> None:
    """They are equal exactly: the grid in float32 with align_corners False, then cast back; the
    prefix stays."""
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(1, prefix + old * old, 8, generator=generator).to(dtype)
    grid = given[:, prefix:].float().reshape(1, old, old, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode=kind, align_corners=False, antialias=antialias)
    patches = grid.permute(0, 2, 3, 1).reshape(1, new * new, 8).to(dtype)
    got = position_embedding.resize_positions(given, new, mode, prefix)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, torch.cat([given[:, :prefix], patches], dim=1))


def test_antialiased_is_what_timm_does() -> None:
    given = torch.randn(1, 1 + 37 * 37, 4, generator=torch.Generator().manual_seed(0))
    own = resample_abs_pos_embed(given, [14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(
        position_embedding.resize_positions(given, 14, "bicubic-antialias", 1), own
    )
    assert not torch.allclose(
        position_embedding.resize_positions(given, 14, "bicubic", 1), own, atol=0.1
    )


def test_a_shrunk_picture_by_hand() -> None:
    pixels = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    taps = _taps(8, 7, cubic=True)
    expected = np.einsum("iy,jx,bcyx->bcij", taps, taps, pixels.double().numpy())
    np.testing.assert_allclose(position_embedding.shrink_pixels(pixels, 7), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "bicubic-antialias"])
def test_clip_of_another_grid_runs_with_the_resized_positions(tmp_path: Path, mode: str) -> None:
    """A 4 x 4 file on the 6 x 6 grid: the tower equals one whose positions were put in by hand."""
    config = small_clip(tmp_path, image_size=32)
    drawn: Any = teachers.load(f"open_clip:{config}", "random:0")
    teacher_reference.randomise_parameters(drawn.visual)
    save_file(drawn.visual.state_dict(), tmp_path / "w.safetensors")
    teacher: Any = teachers.load(
        f"open_clip:{config},img_size=48,pos={mode}", str(tmp_path / "w.safetensors")
    )
    assert (teacher.input_px, teacher.patches) == (48, 36)
    same: Any = teachers.load(
        f"open_clip:{config},grid=6,pos={mode}", str(tmp_path / "w.safetensors")
    )
    assert weights.weight_hash(same) == weights.weight_hash(teacher)
    larger: Any = teachers.load(f"open_clip:{small_clip(tmp_path, name='l.json')}", "random:0")
    values = position_embedding.resize_positions(
        drawn.visual.positional_embedding[None], 6, mode, 1
    )[0]
    larger.visual.load_state_dict({**drawn.visual.state_dict(), "positional_embedding": values})
    images = teacher_reference.photographs(48)
    for mine, own in zip(teacher(images, (3,)), larger(images, (3,)), strict=True):
        torch.testing.assert_close(mine, own)


def test_maskaligns_whole_path(tmp_path: Path) -> None:
    """METHODS 1.2: the student's ImageNet-normalised 224 pixels are shrunk as a tensor, then given
    CLIP's statistics; positions bicubic."""
    about = json.loads(small_clip(tmp_path, image_size=224, patch_size=28).read_text())
    (tmp_path / "c.json").write_text(json.dumps(about))
    spec = f"open_clip:{tmp_path / 'c.json'}"
    drawn: Any = teachers.load(spec, "random:0")
    teacher_reference.randomise_parameters(drawn.visual)
    save_file(drawn.visual.state_dict(), tmp_path / "w.safetensors")
    teacher: Any = teachers.load(
        f"{spec},img_size=196,pos=tensor-bicubic", str(tmp_path / "w.safetensors")
    )
    assert (teacher.input_px, teacher.patches) == (224, 49)
    images = teacher_reference.photographs(224)
    (y,), _ = teacher(images, (3,))
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in IMAGENET)
    x = (
        F.interpolate(
            teacher_reference.normalise_in_float64(images, *IMAGENET),
            (196, 196),
            mode="bicubic",
            align_corners=False,
        )
        * std
        + mean
    )
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in CLIP)
    tower: Any = drawn.visual.double()
    grid = F.interpolate(
        tower.positional_embedding[1:].detach().reshape(1, 8, 8, 24).permute(0, 3, 1, 2),
        (7, 7),
        mode="bicubic",
    )
    tower.positional_embedding = nn.Parameter(
        torch.cat(
            [tower.positional_embedding[:1].detach(), grid.permute(0, 2, 3, 1).reshape(49, 24)]
        )
    )
    own = teacher_reference.block_outputs(
        tower.transformer.resblocks, lambda: tower((x - mean) / std)
    )
    assert teacher_reference.relative_error(y, own[2]) < 1e-5
    direct: Any = teachers.load(f"{spec},img_size=196", str(tmp_path / "w.safetensors"))
    assert direct.input_px == 196  # rendered at its own size by default


def test_dinov2_on_the_students_grid(tmp_path: Path) -> None:
    """A 5 x 5 file with registers on the 4 x 4 grid: as timm's model of that size with positions
    put in by hand."""
    arch, small = (
        "vit_base_patch14_reg4_dinov2.lvd142m",
        {"embed_dim": 24, "depth": 2, "num_heads": 3},
    )
    text = ",".join(f"{key}={value}" for key, value in small.items())
    drawn: Any = timm.create_model(arch, num_classes=0, img_size=70, **small)
    teacher_reference.randomise_parameters(drawn)
    save_file(drawn.state_dict(), tmp_path / "w.safetensors")
    teacher: Any = teachers.load(f"timm:{arch},grid=4,{text}", str(tmp_path / "w.safetensors"))
    assert (teacher.input_px, teacher.patches) == (56, 16)
    exact: Any = timm.create_model(arch, num_classes=0, img_size=56, **small).eval()
    values = position_embedding.resize_positions(drawn.pos_embed.detach(), 4, "bicubic", 0)
    exact.load_state_dict({**drawn.state_dict(), "pos_embed": values})
    exact = exact.double()
    images = teacher_reference.photographs(56)
    (y,), attention = teacher(images, (2,))
    pixels = teacher_reference.normalise_in_float64(images, *IMAGENET)
    own = teacher_reference.block_outputs(exact.blocks, lambda: exact.forward_features(pixels))[1]
    assert teacher_reference.relative_error(y, torch.cat([own[:, :1], own[:, 5:]], 1)) < 1e-5
    assert (
        teacher_reference.attention_error(
            attention, teacher_reference.timm_attention_map(exact, pixels).mean(1)[:, 0, 5:]
        )
        < 1e-5
    )


def test_rotary_positions_follow_the_grid() -> None:
    arch, small = "vit_base_patch16_dinov3.lvd1689m", {"embed_dim": 24, "depth": 2, "num_heads": 3}
    text = ",".join(f"{key}={value}" for key, value in small.items())
    teacher: Any = teachers.load(f"timm:{arch},grid=5,{text}", "random:0")
    teacher_reference.randomise_parameters(teacher.vit)
    exact: Any = timm.create_model(arch, num_classes=0, img_size=80, **small).eval().double()
    exact.load_state_dict(teacher.vit.state_dict())
    images = teacher_reference.photographs(80)
    (y,), _ = teacher(images, (2,))
    own = teacher_reference.block_outputs(
        exact.blocks,
        lambda: exact.forward_features(teacher_reference.normalise_in_float64(images, *IMAGENET)),
    )[1]
    assert teacher_reference.relative_error(y, torch.cat([own[:, :1], own[:, 5:]], 1)) < 1e-5


def test_maskaligns_picture_is_the_students_whatever_the_teachers_own_size() -> None:
    """DINOv2's own 518 pixels are rendered by nobody: the student's 224 are shrunk to 196."""
    assert position_embedding.rendered_px("x", "tensor-bicubic", native=518, size=196) == 224
    assert position_embedding.rendered_px("x", "bicubic", native=518, size=196) == 0


VIT = "timm:vit_base_patch16_224,embed_dim=24,depth=1,num_heads=3"
ROPE = "timm:vit_base_patch16_dinov3,embed_dim=24,depth=1,num_heads=3"


@pytest.mark.slow_after(6)
@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (VIT + ",grid=14,pos=bilinear", "resizes nothing"),
        (VIT + ",grid=10,pos=cubic", "did you mean bicubic"),
        (VIT + ",grid=10,img_size=160", "give one of them"),
        (VIT + ",grid=0", "grid=0; a whole number"),
        (VIT + ",grid=2.5", "grid=2.5"),
        (VIT + ",img_size=170,pos=bilinear", "give 160 or 176"),
        (VIT + ",grid=16,pos=tensor-bicubic", "resizes nothing"),
        (ROPE + ",grid=10,pos=bilinear", "rotary"),
        ("clip-l14,img_size=200", "give 196 or 210"),
    ],
)
def test_grids_and_modes_that_cannot_be_meant(spec: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        teachers.load(spec, "random:0")
    assert "\n" not in str(caught.value)
