"""The encoder and decoder equal plain matrix code; start values, positions and patches equal hand
values."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from featcache.errors import UsageError
from student.models import beit, vit

TINY = "vit_tiny_patch16_224,embed_dim=16,depth=2,num_heads=2"
Weights = Mapping[str, Tensor]


# --- an independent ViT, from the text of the methods ---------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def reference_block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """Compute x += attn(LN x); x += mlp(LN x), head by head."""
    width = x.shape[-1]
    d = width // heads
    qkv = linear(
        layer_norm(x, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"]), w, f"{name}.attn.qkv"
    )
    mixed = []
    for head in range(heads):
        q, k, v = (qkv[..., i * width + head * d : i * width + (head + 1) * d] for i in range(3))
        score = (q @ k.transpose(1, 2)) / math.sqrt(d)
        mixed.append(score.softmax(-1) @ v)
    x = x + linear(torch.cat(mixed, -1), w, f"{name}.attn.proj")
    hidden = linear(
        layer_norm(x, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"]), w, f"{name}.mlp.fc1"
    )
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(gelu, w, f"{name}.mlp.fc2")


def reference_encode(
    w: Weights, images: Tensor, ids_keep: Tensor, heads: int, depth: int
) -> list[Tensor]:
    """Compute outputs of all blocks; `w` holds an encoder's parameters by name."""
    kernel = w["patch_embed.proj.weight"]
    p = kernel.shape[-1]
    rows = []
    for picture, ids in zip(images, ids_keep.tolist(), strict=True):
        tokens = [w["cls_token"][0, 0]]
        for i in ids:
            row, col = divmod(i, picture.shape[-1] // p)
            patch = picture[:, row * p : (row + 1) * p, col * p : (col + 1) * p]
            tokens.append(
                (kernel * patch).sum((1, 2, 3))
                + w["patch_embed.proj.bias"]
                + w["pos_embed"][0, 1 + i]
            )
        rows.append(torch.stack(tokens))
    x, outputs = torch.stack(rows), []
    for i in range(depth):
        x = reference_block(x, w, f"blocks.{i}", heads)
        outputs.append(x)
    return outputs


def tiny(**changes: object) -> vit.VisionTransformer:
    torch.manual_seed(0)
    return vit.build(TINY, **{"img_size": 16, "patch_size": 4, **changes})  # type: ignore[arg-type]


def test_encode_equals_plain_matrix_code() -> None:
    model = tiny().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ids_keep = torch.tensor([[3, 0, 9], [15, 2, 4]])
    got = vit.encode(model, images, ids_keep)
    expected = reference_encode(model.state_dict(), images, ids_keep, heads=2, depth=2)
    assert [tuple(x.shape) for x in got] == [(2, 4, 16)] * 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_encode_of_all_patches_is_timms_forward() -> None:
    model = tiny().double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    last = vit.encode(model, images, torch.arange(16).expand(2, -1))[-1]
    torch.testing.assert_close(model.norm(last), model.forward_features(images))


@pytest.mark.parametrize("family", ["mae", "cae"])
def test_visible_patches_are_embedded_as_by_timm(family: str) -> None:
    """timm embeds all patches by a convolution; the same tokens and the same gradients, to
    rounding. The norm behind the convolution is timm's option."""
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4}
    build = vit.build if family == "mae" else partial(beit.build, family=family)
    ours = build("tiny,embed_dim=16,depth=1,num_heads=2", **sizes).double()
    ours.patch_embed.norm = torch.nn.LayerNorm(16).double()
    timms = copy.deepcopy(ours)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    ids = torch.tensor([[35, 7, 0], [1, 20, 4]])
    every = timms.patch_embed(images) + timms.pos_embed[:, 1:]
    cls = timms.cls_token[0] + timms.pos_embed[0, :1]
    expected = torch.stack([torch.cat([cls, row[i]]) for row, i in zip(every, ids, strict=True)])
    got = vit.embed_visible(ours, images, ids)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    names = ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
    for name in (*names, "patch_embed.norm.weight"):
        one, two = ours.get_parameter(name).grad, timms.get_parameter(name).grad
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_project_patches_is_the_convolution_at_these_cells(bias: bool) -> None:
    """Of a map of 5 channels too; the values and both gradients, to rounding."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 2, stride=2, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    got = vit.project_patches(conv, x, torch.tensor([[4, 1], [0, 5]]))
    out = conv(x)  # (2,7,2,3)
    expected = torch.stack([out[0, :, 1, 1], out[0, :, 0, 1], out[1, :, 0, 0], out[1, :, 1, 2]])
    expected = expected.view(2, 2, 7)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn_like(got)
    one = torch.autograd.grad((got * weight).sum(), [x, *conv.parameters()])
    two = torch.autograd.grad((expected * weight).sum(), [x, *conv.parameters()])
    for mine, other in zip(one, two, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_hidden_pixels_never_reach_the_visible_tokens() -> None:
    model = tiny()
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, :4, 4:8] += 1  # patch 1
    ids_keep = torch.tensor([[0, 5]])
    assert torch.equal(
        vit.encode(model, images, ids_keep)[-1], vit.encode(model, changed, ids_keep)[-1]
    )


# --- positions ------------------------------------------------------------------------------------


def test_sincos_hand_values() -> None:
    """Width 8: w = (1, 10000^-1/2) = (1, 0.01). Patch (row 0, col 1) is token 2, patch (row 1, col
    0) token 3."""
    table = vit.sincos(8, 2)
    assert table.shape == (5, 8)
    assert table.dtype == torch.float64
    s1, c1, s01, c01 = (
        0.8414709848078965,
        0.5403023058681398,
        0.009999833334166664,
        0.9999500004166653,
    )
    expected = torch.tensor(
        [
            [0, 0, 0, 0, 0, 0, 0, 0],  # CLS
            [0, 0, 1, 1, 0, 0, 1, 1],
            [s1, s01, c1, c01, 0, 0, 1, 1],
            [0, 0, 1, 1, s1, s01, c1, c01],
            [s1, s01, c1, c01, s1, s01, c1, c01],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-15)


def test_sincos_of_the_base_encoder_in_numpy() -> None:
    table = vit.sincos(768, 14).numpy()
    row, col, k = 5, 11, np.arange(192)
    w = 10000.0 ** (-k / 192)
    expected = np.concatenate([np.sin(col * w), np.cos(col * w), np.sin(row * w), np.cos(row * w)])
    np.testing.assert_allclose(table[1 + row * 14 + col], expected, rtol=0, atol=1e-14)


# --- start values ---------------------------------------------------------------------------------


def test_start_values() -> None:
    torch.manual_seed(0)
    model = vit.build("tiny")  # width 192
    assert not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0], vit.sincos(192, 14).float())
    block = model.blocks[3]
    for weight, limit in (
        # fan in 192 + fan out 3 * 192, one fused matrix
        (block.attn.qkv.weight, math.sqrt(6 / (4 * 192))),
        (block.attn.proj.weight, math.sqrt(6 / (2 * 192))),
        (block.mlp.fc1.weight, math.sqrt(6 / (5 * 192))),
        (model.patch_embed.proj.weight, math.sqrt(6 / (192 + 768))),
    ):
        assert weight.abs().max() <= limit
        assert weight.abs().max() > 0.999 * limit
    assert not block.attn.qkv.bias.any()
    assert not block.mlp.fc2.bias.any()
    bias = model.patch_embed.proj.bias  # the framework's own: U(-1/sqrt(768), 1/sqrt(768))
    assert 0.9 / math.sqrt(768) < bias.abs().max() <= 1 / math.sqrt(768)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.norm.eps == 1e-6
    assert block.norm1.eps == 1e-6


def test_drop_path_rises_linearly() -> None:
    model = vit.build(
        "tiny,depth=5,embed_dim=16,num_heads=2", img_size=16, patch_size=4, drop_path=0.4
    )
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        # patch conv 192*768 + 192, cls 192, positions 197*192, 12 blocks of 12 D^2 + 13 D, norm 2 D
        ("tiny", 192 * 768 + 192 + 192 + 197 * 192 + 12 * (12 * 192**2 + 13 * 192) + 2 * 192),
        ("small", 384 * 768 + 384 + 384 + 197 * 384 + 12 * (12 * 384**2 + 13 * 384) + 2 * 384),
    ],
)
def test_names_load_strictly_into_timm(encoder: str, count: int) -> None:
    model = vit.build(encoder)
    timm.create_model(vit.SIZES[encoder], num_classes=0).load_state_dict(
        model.state_dict(), strict=True
    )
    assert sum(x.numel() for x in model.parameters()) == count


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("bse", "unknown encoder 'bse': did you mean base"),
        ("vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("tiny,img_size=32", "sets img_size"),
        ("tiny,drop_path_rate=0.1", "sets drop_path_rate.*give drop_path=VALUE"),
        ("tiny,depth=1,proj_drop_rate=0.1", "it has dropout"),
        ("tiny,depth=1,attn_drop_rate=0.1", "it has dropout"),
        ("tiny,depth=1,patch_drop_rate=0.5", "it has dropout"),
        ("tiny,deepth=2", "deepth.*did you mean depth"),
        ("vit_small_patch14_dinov2", "it has LayerScale"),
        ("vit_base_patch16_clip_224,depth=1", "it has a norm before the blocks"),
        ("tiny,reg_tokens=2", "it has register tokens"),
        ("tiny,qkv_bias=false", "no bias on q, k, v"),
    ],
)
def test_other_encoders_are_refused(encoder: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vit.build(encoder)


# --- patches and the decoder ----------------------------------------------------------------------


def test_gather_patches_by_hand() -> None:
    """A coded picture: value = 100 * channel + 10 * row + column; 2 x 3 patches of 2 x 2, of which
    the fifth and the second are asked for."""
    channel, row, col = torch.meshgrid(
        torch.arange(3), torch.arange(4), torch.arange(6), indexing="ij"
    )
    images = torch.stack([100 * channel + 10 * row + col, torch.zeros(3, 4, 6, dtype=torch.int64)])
    patches = vit.gather_patches(images, torch.tensor([[4, 1], [0, 5]]), 2)
    assert patches.shape == (2, 2, 12)
    assert patches[0].tolist() == [
        [22, 122, 222, 23, 123, 223, 32, 132, 232, 33, 133, 233],
        [2, 102, 202, 3, 103, 203, 12, 112, 212, 13, 113, 213],
    ]
    assert not patches[1].any()


def reference_decode(
    w: Weights, tokens: Tensor, ids_keep: Tensor, heads: int, depth: int
) -> Tensor:
    """Compute (B,P,out); `w` holds a decoder's parameters by name."""
    narrow = linear(tokens, w, "decoder_embed")
    n_patches = w["decoder_pos_embed"].shape[1] - 1
    rows = []
    for x, ids in zip(narrow, ids_keep.tolist(), strict=True):
        patches = [
            x[1 + ids.index(i)] if i in ids else w["mask_token"][0, 0] for i in range(n_patches)
        ]
        rows.append(torch.stack([x[0], *patches]) + w["decoder_pos_embed"][0])
    x = torch.stack(rows)
    for i in range(depth):
        x = reference_block(x, w, f"decoder_blocks.{i}", heads)
    x = layer_norm(x, w["decoder_norm.weight"], w["decoder_norm.bias"])
    return linear(x, w, "decoder_pred")[:, 1:]


def test_decoder_equals_plain_matrix_code() -> None:
    torch.manual_seed(0)
    decoder = vit.Decoder(width_in=6, width=8, depth=2, heads=2, patches_grid=3, out_dim=5).double()
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    ids_keep = torch.tensor([[7, 0, 2], [1, 4, 5]])
    ids_masked = torch.tensor([[1, 3, 4, 5, 6, 8], [0, 2, 3, 6, 7, 8]])
    masked = decoder(tokens, ids_keep, ids_masked)
    every = decoder.predict_all(tokens, ids_keep, ids_masked)
    raster = reference_decode(decoder.state_dict(), tokens, ids_keep, heads=2, depth=2)
    ids = torch.cat([ids_keep, ids_masked], dim=1)
    expected = torch.stack([row[order] for row, order in zip(raster, ids, strict=True)])
    assert (masked.shape, every.shape) == ((2, 6, 5), (2, 10, 5))
    torch.testing.assert_close(masked, expected[:, 3:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(every[:, 1:], expected, rtol=1e-10, atol=1e-12)


def test_decoder_names_are_those_of_the_released_code() -> None:
    names = set(
        vit.Decoder(width_in=8, width=8, depth=1, heads=2, patches_grid=2, out_dim=12).state_dict()
    )
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    layers = (
        "decoder_embed",
        "decoder_norm",
        "decoder_pred",
        *(f"decoder_blocks.0.{name}" for name in block),
    )
    both = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert names == both | {"mask_token", "decoder_pos_embed"}


def test_decoder_start_values() -> None:
    torch.manual_seed(0)
    decoder = vit.Decoder(width_in=768, width=512, depth=1, heads=16, patches_grid=14, out_dim=768)
    assert not decoder.decoder_pos_embed.requires_grad
    assert torch.equal(decoder.decoder_pos_embed[0], vit.sincos(512, 14).float())
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert 0.999 < decoder.decoder_pred.weight.abs().max() / math.sqrt(6 / (512 + 768)) <= 1
    assert not decoder.decoder_embed.bias.any()
    assert decoder.decoder_norm.eps == 1e-6


@pytest.mark.parametrize(("width", "heads"), [(512, 3), (6, 2)])
def test_decoder_sizes_are_checked(width: int, heads: int) -> None:
    with pytest.raises(UsageError, match=f"decoder_width={width}, decoder_heads={heads}; allowed"):
        vit.check_decoder(width, heads)
