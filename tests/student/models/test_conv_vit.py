"""The masked-convolution encoder equals plain slices and matrices, and keeps its promise: no hidden
pixel is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featcache.errors import UsageError
from student.models import conv_vit, vit
from tests.student.models.test_vit import Weights, linear, reference_block
from tests.student.recipes.test_recipes import fill, trained, wave

TINY = "tiny,stage1=4,stage2=6,embed_dim=16,depth=3,num_heads=2,stage_mlp=2"
IDS = torch.tensor([[1, 5, 10, 12], [0, 3, 6, 15]])


def tiny(encoder: str = TINY, **changes: object) -> conv_vit.ConvViT:
    """Build 16 patches of 8 x 8 pixels: maps of 16 x 16, 8 x 8 and 4 x 4 cells."""
    net = conv_vit.build(encoder, **{"img_size": 32, "patch_size": 8, **changes}).double()  # type: ignore[arg-type]
    fill(net)
    return net


def pictures() -> Tensor:
    return wave(2, 3, 32, 32, phase=0.3)


# --- an independent encoder, cell by cell ---------------------------------------------------------


def channel_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Normalise x (..., C); eps 1e-5 in the convolutional stages, where the blocks have 1e-6."""
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def cells(x: Tensor, w: Weights, name: str) -> Tensor:
    """Apply a convolution whose stride is its kernel to x (H,W,C): each cell's values times the
    kernel."""
    kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]  # (O,C,k,k)
    k = kernel.shape[-1]
    rows = []
    for top in range(0, x.shape[0], k):
        row = [
            (kernel * x[top : top + k, left : left + k].permute(2, 0, 1)).sum((1, 2, 3)) + bias
            for left in range(0, x.shape[1], k)
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def point(x: Tensor, w: Weights, name: str) -> Tensor:
    """Apply a 1 x 1 convolution to x (H,W,C)."""
    return x @ w[f"{name}.weight"][:, :, 0, 0].T + w[f"{name}.bias"]


def depthwise(x: Tensor, w: Weights, name: str) -> Tensor:
    """Sum 25 shifted copies of x (H,W,C), zeros beyond the border."""
    height, width, _ = x.shape
    padded = torch.zeros(height + 4, width + 4, x.shape[2], dtype=x.dtype)
    padded[2:-2, 2:-2] = x
    kernel, out = w[f"{name}.weight"], w[f"{name}.bias"].expand_as(x)
    for i in range(5):
        for j in range(5):
            out = out + padded[i : i + height, j : j + width] * kernel[:, 0, i, j]
    return out


def reference_cblock(x: Tensor, visible: Tensor, w: Weights, name: str) -> Tensor:
    """Compute a block on x (H,W,C), visible (H,W) of 0 and 1."""
    inner = visible[..., None] * point(channel_norm(x, w, f"{name}.norm1"), w, f"{name}.conv1")
    x = x + point(depthwise(inner, w, f"{name}.attn"), w, f"{name}.conv2")
    hidden = gelu(point(channel_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1"))
    return x + point(hidden, w, f"{name}.mlp.fc2")


def reference_embed(x: Tensor, w: Weights, name: str) -> Tensor:
    return gelu(channel_norm(cells(x, w, f"{name}.proj"), w, f"{name}.norm"))


def repeated(grid: Tensor, times: int) -> Tensor:
    """Repeat (G,G) -> (times G, times G), cell by cell."""
    size = times * len(grid)
    return torch.tensor(
        [[float(grid[r // times, c // times]) for c in range(size)] for r in range(size)]
    ).double()


def reference_conv_encode(
    w: Weights, images: Tensor, ids_keep: Tensor, heads: int, depth: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Compute outputs of all blocks, and both maps with channels last; picture by picture."""
    tokens, maps1, maps2 = [], [], []
    for picture, ids in zip(images, ids_keep.tolist(), strict=True):
        grid = int(w["pos_embed"].shape[1] ** 0.5)
        visible = torch.zeros(grid, grid, dtype=torch.float64)
        for i in ids:
            visible[i // grid, i % grid] = 1
        at1, at2 = repeated(visible, 4), repeated(visible, 2)
        x = reference_embed(picture.permute(1, 2, 0), w, "patch_embed1")
        for i in range(2):
            x = reference_cblock(x, at1, w, f"blocks1.{i}")
        maps1.append(x)
        x = reference_embed(x, w, "patch_embed2")
        for i in range(2):
            x = reference_cblock(x, at2, w, f"blocks2.{i}")
        maps2.append(x)
        x = linear(reference_embed(x, w, "patch_embed3"), w, "patch_embed4")
        rows = [x[i // grid, i % grid] + w["pos_embed"][0, i] for i in ids]
        tokens.append(torch.stack([w["cls_token"][0, 0], *rows] if "cls_token" in w else rows))
    x, outputs = torch.stack(tokens), []
    for i in range(depth):
        x = reference_block(x, w, f"blocks3.{i}", heads)
        outputs.append(x)
    return outputs, torch.stack(maps1), torch.stack(maps2)


def reference_stage_fusion(w: Weights, maps1: Tensor, maps2: Tensor, ids_keep: Tensor) -> Tensor:
    """Sum each visible patch's 4 x 4 and 2 x 2 cells through their own matrices: (B,V,D)."""
    rows = []
    for one, two, ids in zip(maps1, maps2, ids_keep.tolist(), strict=True):
        both = cells(one, w, "stage1_output_decode") + cells(two, w, "stage2_output_decode")
        rows.append(torch.stack([both[i // both.shape[1], i % both.shape[1]] for i in ids]))
    return torch.stack(rows)


@pytest.mark.parametrize("cls_token", [False, True])
def test_encode_equals_the_independent_encoder(cls_token: bool) -> None:
    net = tiny(cls_token=cls_token)
    outputs, (map1, map2) = net.encode(pictures(), IDS)
    expected, expected1, expected2 = reference_conv_encode(
        net.state_dict(), pictures(), IDS, heads=2, depth=3
    )
    assert [tuple(x.shape) for x in outputs] == [(2, 4 + cls_token, 16)] * 3
    assert (map1.shape, map2.shape) == ((2, 4, 16, 16), (2, 6, 8, 8))
    ours, theirs = (
        [*outputs, map1.movedim(1, -1), map2.movedim(1, -1)],
        [*expected, expected1, expected2],
    )
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    fusion = conv_vit.StageFusion(4, 6, 16).double()
    fill(fusion)
    torch.testing.assert_close(
        fusion((map1, map2), IDS),
        reference_stage_fusion(fusion.state_dict(), expected1, expected2, IDS),
    )


def test_all_patches_visible_is_forward_features() -> None:
    """Nothing is masked then, in whatever order the patches are named."""
    net = tiny(cls_token=True)
    every = torch.arange(16).flip(0).expand(2, -1)
    last = net.norm(net.encode(pictures(), every)[0][-1])
    features = net.forward_features(pictures())
    assert features.shape == (2, 17, 16)
    torch.testing.assert_close(last[:, 0], features[:, 0])
    torch.testing.assert_close(last[:, 1:].flip(1), features[:, 1:])


# --- no leakage -----------------------------------------------------------------------------------


def seen(net: conv_vit.ConvViT, fusion: conv_vit.StageFusion, images: Tensor) -> list[Tensor]:
    """Return all that a loss on visible patches can depend on."""
    outputs, maps = net.encode(images, IDS)
    return [*outputs, fusion(maps, IDS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_pixels_never_reach_the_visible_outputs(dtype: torch.dtype) -> None:
    """Every hidden pixel is changed, to large numbers and to NaN: visible outputs stay, to the
    bit."""
    net, fusion = tiny().to(dtype), conv_vit.StageFusion(4, 6, 16).to(dtype)
    images = pictures().to(dtype)
    before = seen(net, fusion, images)
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, IDS, False).view(2, 1, 4, 4)
    at = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images)
    # The CPU's own bfloat16 convolution multiplies cells beside the kernel by zero, which NaN
    # survives.
    large = 1e4 if dtype == torch.bfloat16 else float("nan")
    for value in (
        torch.flip(images, (3,)),
        torch.full_like(images, 1e3),
        torch.full_like(images, large),
    ):
        after = seen(net, fusion, torch.where(at, value, images))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_each_visible_patch_is_seen_by_its_neighbours() -> None:
    """The test above could fail: one visible pixel changes every token, and the map beside its own
    cell."""
    net = tiny()
    images = pictures()
    changed = images.clone()
    changed[0, 0, 9, 9] += 1  # patch 5 of the first picture, in its upper left cell
    (before, (map1, _)), (after, (moved1, _)) = net.encode(images, IDS), net.encode(changed, IDS)
    assert (before[-1][0] != after[-1][0]).any(-1).all()
    assert torch.equal(before[-1][1], after[-1][1])
    rows, cols = (map1 != moved1)[0].any(0).nonzero().T
    # Cell (4, 4) moves cells 2 to 6. Of those, patch 5 (cells 4 to 7 each way) and patch 1 above it
    # are visible, and move what is two cells from them: rows 2 - 2 to 6 + 2, columns 4 - 2 to 6 +
    # 2. The patches to the left are hidden.
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (0, 8, 2, 8)


def test_a_mask_that_lay_elsewhere_would_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask between the convolutions the outputs do change: what the test of leakage
    looks at is real."""
    net, fusion = tiny(), conv_vit.StageFusion(4, 6, 16).double()
    monkeypatch.setattr(conv_vit, "_upsample_mask", lambda hidden, times: None)
    before = seen(net, fusion, pictures())
    changed = pictures()
    changed[0, :, :8, :8] += 1  # patch 0, hidden in the first picture
    after = seen(net, fusion, changed)
    assert not torch.equal(before[0], after[0])


# --- gradients, start values, sizes ---------------------------------------------------------------


def test_gradcheck_of_a_block() -> None:
    block = conv_vit.CBlock(2, 2, 0.0).double()
    fill(block)
    hidden = torch.tensor([[[[True, False, False], [False, True, False], [False, False, False]]]])
    x = wave(1, 2, 3, 3, phase=0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block(x, hidden), (x,))


def test_gradcheck_of_stage_fusion() -> None:
    fusion = conv_vit.StageFusion(1, 2, 2).double()
    maps = (
        wave(1, 1, 8, 8, phase=0.1).requires_grad_(),
        wave(1, 2, 4, 4, phase=0.5).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda a, b: fusion((a, b), torch.tensor([[0, 3]])), maps)


def test_start_values() -> None:
    """Xavier's limits on Linears and the third kernel, the framework's sqrt(1 / fan-in) on other
    convolutions."""
    torch.manual_seed(0)
    net = conv_vit.build("small", cls_token=True)
    third = net.patch_embed3.proj.weight  # (384, 256 * 2 * 2)
    assert third.abs().max().item() == pytest.approx((6 / (384 + 1024)) ** 0.5, rel=1e-3)
    assert net.blocks3[0].attn.qkv.weight.abs().max().item() == pytest.approx(
        (6 / (4 * 384)) ** 0.5, rel=1e-3
    )  # type: ignore[union-attr]
    for conv, fan_in in ((net.patch_embed1.proj, 48), (net.patch_embed2.proj, 512)):
        assert conv.weight.abs().max().item() == pytest.approx(fan_in**-0.5, rel=1e-2)
    assert torch.equal(net.pos_embed[0], vit.sincos(384, 14)[1:].float())
    assert not net.pos_embed.requires_grad
    assert net.cls_token is not None
    assert net.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    norms = [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms if norm.normalized_shape == (128,)} == {1e-5}
    assert {
        norm.eps for norm in [*net.blocks3.modules(), net.norm] if isinstance(norm, nn.LayerNorm)
    } == {1e-6}


def test_drop_path_rises_over_all_blocks() -> None:
    """15 blocks of base from 0 to the given rate, the two stages' among them."""
    with torch.device("meta"):
        net = conv_vit.build("base", drop_path=0.14)
    drops = [block.drop_path1 for block in (*net.blocks1, *net.blocks2)] + [
        block.drop_path1 for block in net.blocks3
    ]
    rates = [getattr(drop, "drop_prob", 0.0) for drop in drops]
    assert rates == pytest.approx([0.01 * i for i in range(15)])


def test_names_are_those_of_the_released_code() -> None:
    """A released state dict of base loads: its first and last names, and how many there are of each
    part."""
    with torch.device("meta"):
        names = list(conv_vit.build("base").state_dict())
    for name in ("pos_embed", "patch_embed1.proj.weight", "patch_embed3.norm.bias",
                 "patch_embed4.weight", "blocks1.1.attn.weight", "blocks2.0.conv1.bias",
                 "blocks2.1.mlp.fc2.weight", "blocks3.10.attn.qkv.weight", "blocks3.0.mlp.fc1.bias",
                 "norm.weight"):  # fmt: skip
        assert name in names
    # 3 embeddings of 4, the fourth of 2, 4 CBlocks of 14, 11 blocks of 12, the norm and the
    # positions
    assert len(names) == 3 * 4 + 2 + 4 * 14 + 11 * 12 + 2 + 1


@pytest.mark.slow
def test_sizes() -> None:
    """Worked out by hand. A CBlock of c channels and MLP ratio r: two norms 4c, two 1 x 1 2(c^2 +
    c), depth-wise 25c + c, MLP 2rc^2 + (r + 1)c; that is 10 c^2 + 37 c with r = 4 and 18 c^2 + 41 c
    with 8.

    base   patch_embed1   3 * 16 * 256 + 256 + 512           13,056
           2 CBlocks      2 * (10 * 256^2 + 37 * 256)     1,329,664
           patch_embed2   4 * 256 * 384 + 384 + 768         394,368
           2 CBlocks      2 * (10 * 384^2 + 37 * 384)     2,977,536
           patch_embed3   4 * 384 * 768 + 768 + 1536      1,181,952
           patch_embed4   768^2 + 768                       590,592
           pos_embed      196 * 768                         150,528   fixed
           11 blocks      11 * (12 * 768^2 + 13 * 768)   77,966,592
           norm           2 * 768                             1,536
                                                         84,605,824
    tiny   3,264 + 86,656 + 33,152 + 337,152 + 98,880 + 37,056 + 37,632
           + 11 * (12 * 192^2 + 13 * 192) + 384 = 5,527,680
    small  6,528 + 337,152 + 131,840 + 1,329,664 + 394,368 + 147,840 + 75,264
           + 11 * (12 * 384^2 + 13 * 384) + 768 = 21,942,528
    large  stages with ratio 8: 19,584 + 5,339,904 + 1,181,952 + 21,296,640 + 3,148,800 + 1,049,600
           + 200,704 + 23 * (12 * 1024^2 + 13 * 1024) + 2,048 = 321,952,384
    huge   ratio 8 too: 39,168 + 21,296,640 + 3,148,800 + 37,832,704 + 5,246,720 + 1,639,680
           + 250,880 + 31 * (12 * 1280^2 + 13 * 1280) + 2,560 = 679,457,792
    """
    expected = {"tiny": 5_527_680, "small": 21_942_528, "base": 84_605_824, "large": 321_952_384}
    expected["huge"] = 679_457_792
    for size, count in expected.items():
        with torch.device("meta"):
            net = conv_vit.build(size)
        assert sum(x.numel() for x in net.parameters()) == count, size
    with torch.device("meta"):
        net = conv_vit.build("base", cls_token=True)
    assert sum(x.numel() for x in trained(net).values()) == 84_605_824 - 150_528 + 768


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("bass", "unknown encoder 'bass' of family conv_vit: did you mean base"),
        ("vit_tiny_patch16_224", "unknown encoder 'vit_tiny_patch16_224' of family conv_vit"),
        ("tiny,stage3=8", "unknown option 'stage3', did you mean stage2"),
        ("tiny,depth=0", "depth=0; allowed: a whole number from 1"),
        (
            "tiny,embed_dim=10",
            "embed_dim=10, num_heads=3; allowed: a width that 4 and the heads divide",
        ),
    ],
)
def test_what_is_refused(encoder: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        conv_vit.parse_encoder(encoder)


def test_patches_that_four_does_not_divide() -> None:
    with pytest.raises(UsageError, match="patch_size=14; allowed: one that 4 divides"):
        conv_vit.build("tiny", img_size=224, patch_size=14)
