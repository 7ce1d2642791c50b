"""The Beit encoders equal plain matrix code, their positions and start values hand values."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import UsageError
from student.models import beit, vit
from tests.student.models.test_vit import Weights, layer_norm, linear

TINY = "tiny,embed_dim=16,depth=3,num_heads=2"


# --- an independent encoder, from the text of the methods -----------------------------------------


def reference_block(
    x: Tensor, w: Weights, name: str, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Compute x += g1 attn(LN x); x += g2 mlp(LN x); no bias on k; bias (heads,N,N) is added to the
    scores."""
    width = x.shape[-1]
    d = width // heads
    normed = layer_norm(x, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"])
    wq, wk, wv = w[f"{name}.attn.qkv.weight"].split(width)
    q, k, v = (
        normed @ wq.T + w[f"{name}.attn.q_bias"],
        normed @ wk.T,
        normed @ wv.T + w[f"{name}.attn.v_bias"],
    )
    mixed = []
    for head in range(heads):
        at = slice(head * d, (head + 1) * d)
        score = q[..., at] @ k[..., at].transpose(-2, -1) / math.sqrt(d)
        mixed.append((score if bias is None else score + bias[head]).softmax(-1) @ v[..., at])
    x = x + w[f"{name}.gamma_1"] * linear(torch.cat(mixed, -1), w, f"{name}.attn.proj")
    hidden = linear(
        layer_norm(x, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"]), w, f"{name}.mlp.fc1"
    )
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + w[f"{name}.gamma_2"] * linear(gelu, w, f"{name}.mlp.fc2")


def embedded(w: Weights, images: Tensor) -> Tensor:
    """Embed every patch through the kernel, without a position: (B,P,D)."""
    kernel = w["patch_embed.proj.weight"]
    patches = F.unfold(images, kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2)
    flat = patches @ kernel.flatten(1).T
    return flat + w["patch_embed.proj.bias"]


def reference_encode(
    w: Weights, images: Tensor, ids: Tensor, heads: int = 2, depth: int = 3
) -> Tensor:
    """Encode as family cae: CLS and the chosen patches with their positions, through all blocks and
    the final norm."""
    patches = embedded(w, images)
    rows = [
        torch.stack(
            [
                w["cls_token"][0, 0] + w["pos_embed"][0, 0],
                *(x[i] + w["pos_embed"][0, 1 + i] for i in chosen),
            ]
        )
        for x, chosen in zip(patches, ids.tolist(), strict=True)
    ]
    x = torch.stack(rows)
    for i in range(depth):
        x = reference_block(x, w, f"blocks.{i}", heads)
    return layer_norm(x, w["norm.weight"], w["norm.bias"])


def relative_bias(table: Tensor, grid: int) -> Tensor:
    """Look up (heads,1+P,1+P) in the table: a row for each offset of row and column, then CLS to
    patch, patch to CLS, and CLS to itself."""
    n, width = grid * grid, 2 * grid - 1
    bias = table.new_zeros(table.shape[1], 1 + n, 1 + n)
    for i in range(n):
        for j in range(n):
            row, col = i // grid - j // grid + grid - 1, i % grid - j % grid + grid - 1
            bias[:, 1 + i, 1 + j] = table[row * width + col]
    bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, 0] = (
        table[-3, :, None],
        table[-2, :, None],
        table[-1],
    )
    return bias


def reference_encode_all(w: Weights, patches: Tensor, heads: int = 2, depth: int = 3) -> Tensor:
    """Encode as family beit: CLS and all patches, relative positions in every block, the final
    norm."""
    bias = relative_bias(
        w["rel_pos_bias.relative_position_bias_table"], math.isqrt(patches.shape[1])
    )
    x = torch.cat([w["cls_token"].expand(len(patches), -1, -1), patches], 1)
    for i in range(depth):
        x = reference_block(x, w, f"blocks.{i}", heads, bias)
    return layer_norm(x, w["norm.weight"], w["norm.bias"])


def build(family: str, **changes: object) -> beit.Beit:
    torch.manual_seed(0)
    return beit.build(TINY, family, **{"img_size": 16, "patch_size": 4, **changes})  # type: ignore[arg-type]


def randomised(family: str) -> beit.Beit:
    """Set other values than the zeros and tenths of the start."""
    model = build(family).double()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name != "pos_embed":
                x.add_(0.3 * torch.randn_like(x))
    return model


IMAGES = torch.sin(torch.arange(2 * 3 * 256, dtype=torch.float64) * 1.3).view(2, 3, 16, 16)


def test_encode_equals_plain_matrix_code() -> None:
    model = randomised("cae")
    ids_keep = torch.tensor([[3, 0, 9], [15, 2, 4]])
    got = beit.encode(model, IMAGES, ids_keep)
    torch.testing.assert_close(
        got, reference_encode(model.state_dict(), IMAGES, ids_keep), rtol=1e-10, atol=1e-12
    )
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(beit.encode(model, IMAGES, every), model.forward_features(IMAGES))


def test_encode_all_equals_plain_matrix_code() -> None:
    model = randomised("beit")
    w = model.state_dict()
    got = beit.encode_all(model, model.patch_embed(IMAGES))
    torch.testing.assert_close(
        got, reference_encode_all(w, embedded(w, IMAGES)), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(got, model.forward_features(IMAGES))


def test_positions_have_rows_first() -> None:
    """Width 8: w = (1, 0.01). Patch (row 0, col 1) is token 2, patch (row 1, col 0) token 3; MAE's
    halves, swapped."""
    table = vit.sincos(8, 2, layout="cae")
    s1, c1, s01, c01 = (
        0.8414709848078965,
        0.5403023058681398,
        0.009999833334166664,
        0.9999500004166653,
    )
    expected = [
        [0.0] * 8,
        [0, 0, 1, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, s1, s01, c1, c01],
        [s1, s01, c1, c01, 0, 0, 1, 1],
    ]
    torch.testing.assert_close(table[:4], torch.tensor(expected, dtype=torch.float64))
    model = build("cae")
    assert model.pos_embed is not None
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0], vit.sincos(16, 4, layout="cae").float())
    assert build("beit").pos_embed is None


def test_start_values() -> None:
    """Width 192. cae: Xavier, a fused qkv's limit sqrt(6 / 4 D); beit: normals cut at one std,
    whose std is then 0.0108, and both ends of block i over sqrt(2 i)."""
    sizes = {"img_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    cae, plain = (
        beit.build("tiny,depth=3", "cae", **sizes),
        beit.build("tiny,depth=3", "beit", **sizes),
    )  # type: ignore[arg-type]
    block = cae.blocks[2]
    for weight, limit in (
        (block.attn.qkv.weight, math.sqrt(6 / (4 * 192))),
        (block.attn.proj.weight, math.sqrt(6 / (2 * 192))),
        (block.mlp.fc2.weight, math.sqrt(6 / (5 * 192))),
    ):
        assert 0.98 < weight.abs().max() / limit <= 1
    cut = 0.02 * math.sqrt(
        1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(1 / math.sqrt(2))
    )
    for model in (cae, plain):
        for x in (model.patch_embed.proj.weight, model.cls_token):
            assert x.abs().max() <= 0.02
            assert x.std().item() == pytest.approx(cut, rel=0.1)
        assert not model.patch_embed.proj.bias.any()
        assert not any(block.attn.q_bias.any() or block.attn.v_bias.any() for block in model.blocks)
        assert all(
            torch.equal(gamma, torch.full((192,), 0.1))
            for b in model.blocks
            for gamma in (b.gamma_1, b.gamma_2)
        )
        assert model.norm.eps == 1e-6
        assert (model.norm.weight == 1).all()
    for i, block in enumerate(plain.blocks, 1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(cut, rel=0.03)
        assert block.attn.proj.weight.std().item() == pytest.approx(
            cut / math.sqrt(2 * i), rel=0.03
        )
        assert block.mlp.fc2.weight.std().item() == pytest.approx(cut / math.sqrt(2 * i), rel=0.03)
    assert plain.rel_pos_bias is not None
    assert plain.rel_pos_bias.relative_position_bias_table.shape == (3 * 3 + 3, 12)
    assert not plain.rel_pos_bias.relative_position_bias_table.any()


def test_without_xavier_the_cae_encoder_keeps_beits_start() -> None:
    torch.manual_seed(0)
    model = beit.build("tiny,depth=2", "cae", img_size=32, xavier=False, layer_scale=1e-5)
    assert model.blocks[0].attn.qkv.weight.abs().max() <= 0.02
    assert model.blocks[1].mlp.fc2.weight.abs().max() <= 0.02 / 2
    assert torch.equal(model.blocks[0].gamma_1, torch.full((192,), 1e-5))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            "vit_tiny_patch16_224",
            "unknown encoder 'vit_tiny_patch16_224' for this recipe: .*known: base, large",
        ),
        ("tiny,img_size=32", "unknown option 'img_size'"),
        ("tiny,num_heads=7", "cannot build the encoder: width 192, 7 heads"),
    ],
)
def test_other_encoders_are_refused(encoder: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        beit.build(encoder, "cae")


def test_drop_path_rises_linearly() -> None:
    model = beit.build("tiny,depth=5", "cae", img_size=32, drop_path=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
