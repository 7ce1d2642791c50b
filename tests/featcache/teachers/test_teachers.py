"""Teachers equal an independent reading of the same network: own hooks, explicit softmax attention
in float64.

B batch, T tokens, P patches, D width, H heads. The networks are tiny and random; what is compared
is which numbers are taken from them, not what they mean.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models.open_clip_wrapper import OpenClipVit
from featcache.models.spec import parse_options
from featcache.models.timm_wrapper import TimmVit
from featcache.models.weights import weight_hash
from tests.conftest import Ran, python

TINY = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"
# METHODS 0.8
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), np.uint8)
    )


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    x = images.numpy().astype(np.float64) / 255
    x = (x - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    return torch.from_numpy(x)


def explicit_attention(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, heads: int, norm: tuple | None = None
) -> np.ndarray:
    """Compute softmax(q k / sqrt(d)) (B, H, T, T) in float64 of normed input x (B, T, D), fused
    weights (3D, D) and (3D,)."""
    batch, tokens, width = x.shape
    qkv = x @ w.T + b
    q, k = (
        qkv[..., i * width : (i + 1) * width].reshape(batch, tokens, heads, -1) for i in range(2)
    )
    if norm:
        q, k = (
            (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + e) * g + s
            for v, (g, s, e) in zip((q, k), norm, strict=True)
        )
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def record(
    blocks: nn.ModuleList, norm: nn.Module, run: Callable[[], object]
) -> tuple[list[Tensor], Tensor]:
    """Record the outputs of all blocks and of the last block's first norm, by hooks of our own,
    removed afterwards."""
    ys: list[Tensor] = []
    seen: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, y: ys.append(y.detach().clone()))
        for block in blocks
    ]
    handles.append(norm.register_forward_hook(lambda _, __, y: seen.append(y.detach().clone())))
    run()
    for handle in handles:
        handle.remove()
    return ys, seen[0]  # the first call is the network's own


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    """Build an OpenAI-style picture tower, 16 pixels, 2x2 patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = VisionTransformer(
            image_size=16,
            patch_size=8,
            width=32,
            layers=3,
            heads=4,
            mlp_ratio=2,
            output_dim=12,
            act_layer=QuickGELU,
        )
        for parameter in tower.parameters():
            nn.init.normal_(parameter, std=0.3)
        return tower.eval().requires_grad_(False)


def test_clip_levels_and_attention_are_the_towers(tower: VisionTransformer) -> None:
    images = pictures(3, 16)
    teacher = OpenClipVit(tower, "random:0").eval()
    assert (teacher.input_px, teacher.patches, teacher.width, teacher.depth) == (16, 4, 32, 3)
    assert (tuple(teacher.pixel_mean), tuple(teacher.pixel_std)) == (CLIP_MEAN, CLIP_STD)
    got, attention = teacher(images, (1, 3))
    exact = tower.double()
    blocks = exact.transformer.resblocks
    ys, normed = record(
        blocks, blocks[-1].ln_1, lambda: exact(normalised(images, CLIP_MEAN, CLIP_STD))
    )
    last = blocks[-1].attn
    weights = explicit_attention(
        normed.numpy(), last.in_proj_weight.numpy(), last.in_proj_bias.numpy(), 4
    )
    tower.float()
    assert [tuple(y.shape) for y in got] == [(3, 5, 32)] * 2
    for y, k in zip(got, (1, 3), strict=True):
        relative = (y.double() - ys[k - 1]).norm(dim=-1) / ys[k - 1].norm(dim=-1)
        assert relative.max() < 1e-5
    expected = weights.mean(1)[:, 0, 1:]
    assert attention.dtype == torch.float32
    np.testing.assert_allclose(attention, expected, atol=1e-5 * expected.max())
    # the [CLS] weight on itself is left out, nothing is renormalised
    assert (attention.sum(1) < 1).all()


def test_clip_tail_gives_the_towers_own_output(tower: VisionTransformer) -> None:
    images = pictures(2, 16)
    (y,), _ = OpenClipVit(tower, "x")(images, (3,))
    tail = OpenClipVit(tower, "x").tail()
    assert {name: (value.dtype.str, value.shape) for name, value in tail.items()} == {
        "gamma": ("<f4", (32,)),
        "beta": ("<f4", (32,)),
        "proj": ("<f4", (32, 12)),
        "eps": ("<f4", ()),
    }
    assert tail["eps"] == np.float32(1e-5)
    cls = y[:, 0].double().numpy()
    h = (cls - cls.mean(-1, keepdims=True)) / np.sqrt(cls.var(-1, keepdims=True) + 1e-5)
    z = (h * tail["gamma"] + tail["beta"]) @ tail["proj"]
    with torch.no_grad():
        own = tower(normalised(images, CLIP_MEAN, CLIP_STD).float())
    np.testing.assert_allclose(z, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ("", 1),
        (",reg_tokens=2", 3),
        (",qk_norm=true", 1),
        (",reg_tokens=4,qk_norm=true,init_values=0.5", 5),
        (",qkv_bias=false", 1),
        (",no_embed_class=true,reg_tokens=1", 2),
        (",pre_norm=true", 1),
    ],
)
def test_timm_levels_and_attention_are_the_models(options: str, prefix: int) -> None:
    images = pictures(2, 32, seed=1)
    teacher = teachers.load(TINY + options, "random:3")
    assert (teacher.input_px, teacher.patches, teacher.width, teacher.depth) == (32, 16, 24, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        # every part must matter, norms and biases too
        for name, parameter in teacher.vit.named_parameters():
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    got, attention = teacher(images, (2, 3))
    mean, std = teacher.vit.pretrained_cfg["mean"], teacher.vit.pretrained_cfg["std"]
    assert (tuple(teacher.pixel_mean), tuple(teacher.pixel_std)) == (tuple(mean), tuple(std))
    exact = teacher.vit.double()
    block = exact.blocks[-1]
    ys, normed = record(
        exact.blocks, block.norm1, lambda: exact.forward_features(normalised(images, mean, std))
    )
    attn = block.attn
    bias = attn.qkv.bias.numpy() if attn.qkv.bias is not None else np.zeros(72)
    norm = None
    if "qk_norm" in options:
        norm = tuple((n.weight.numpy(), n.bias.numpy(), n.eps) for n in (attn.q_norm, attn.k_norm))
    weights = explicit_attention(normed.numpy(), attn.qkv.weight.numpy(), bias, 3, norm)
    expected = weights.mean(1)[:, 0, prefix:]
    assert expected.shape == (2, 16)
    np.testing.assert_allclose(attention, expected, atol=1e-5 * expected.max())
    for y, k in zip(got, (2, 3), strict=True):
        kept = torch.cat([ys[k - 1][:, :1], ys[k - 1][:, prefix:]], 1)
        assert y.shape == kept.shape == (2, 17, 24)
        assert ((y.double() - kept).norm(dim=-1) / kept.norm(dim=-1)).max() < 1e-5


def test_attention_is_what_the_block_itself_uses() -> None:
    """A second check by the block's arithmetic: with an identity projection and v = one-hot tokens
    the block's output is the attention row itself."""
    teacher = teachers.load(
        "timm:vit_tiny_patch16_224,img_size=16,patch_size=8,embed_dim=8,depth=1,num_heads=1",
        "random:0",
    )
    attn = teacher.vit.blocks[0].attn
    seen: list[Tensor] = []
    attn.register_forward_hook(lambda _, __, y: seen.append(y))
    images = pictures(1, 16)
    normed: list[Tensor] = []
    teacher.vit.blocks[0].norm1.register_forward_hook(lambda _, __, y: normed.append(y))
    _, attention = teacher(images, (1,))
    v = normed[0] @ attn.qkv.weight[16:].T + attn.qkv.bias[16:]
    own = 1 - attention.sum(1)
    mixed = own[:, None] * v[:, 0] + (attention[..., None] * v[:, 1:]).sum(1)
    torch.testing.assert_close(
        mixed @ attn.proj.weight.T + attn.proj.bias, seen[0][:, 0], rtol=1e-4, atol=1e-6
    )


def test_timm_tail_is_its_final_norm() -> None:
    teacher = teachers.load(TINY, "random:0")
    tail = teacher.tail()
    assert set(tail) == {"gamma", "beta", "eps"}
    assert tail["eps"] == np.float32(teacher.vit.norm.eps) == np.float32(1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (",norm_layer=rmsnorm", {"rms_gamma", "eps"}),
        (",final_norm=false", {"identity"}),
        (",fc_norm=true", {"identity"}),  # it pools before its norm: its tokens are as they are
    ],
)
def test_timm_tail_tells_of_other_norms(options: str, names: set[str]) -> None:
    tail = teachers.load(TINY + options, "random:0").tail()
    assert set(tail) == names
    assert all(values.dtype == np.float32 for values in tail.values())


def test_a_model_without_cls_and_pool_has_no_attention() -> None:
    teacher: Any = teachers.load(TINY + ",class_token=false,global_pool=avg", "random:0")
    (y,), attention = teacher(pictures(2, 32), (3,))
    assert (teacher.has_attention, teacher.first_token) == (False, "mean")
    assert attention.shape == (2, 0)
    torch.testing.assert_close(y[:, 0], y[:, 1:].mean(1))


def test_a_teacher_is_frozen_and_in_eval_mode() -> None:
    teacher = teachers.load(TINY + ",proj_drop_rate=0.5,drop_path_rate=0.5", "random:0")
    assert isinstance(teacher, nn.Module)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = pictures(1, 32)
    torch.testing.assert_close(teacher(images, (3,)), teacher(images, (3,)), rtol=0, atol=0)


def test_levels_come_in_the_order_asked_for_and_nothing_is_kept() -> None:
    teacher = teachers.load(TINY, "random:0")
    images = pictures(1, 32)
    all_levels, _ = teacher(images, (1, 2, 3))
    reversed_levels, _ = teacher(images, (3, 1))
    torch.testing.assert_close(reversed_levels, [all_levels[2], all_levels[0]], rtol=0, atol=0)
    assert not all_levels[0].requires_grad


# ---------------------------------------------------------------- synthetic


def test_synthetic_gives_the_same_bits_at_every_batch_size() -> None:
    teacher = teachers.load("synthetic:levels=3,tokens=16,width=40,size=30")
    images = pictures(7, 30)
    ys, attention = teacher(images, (1, 3))
    assert [y.shape for y in ys] == [(7, 17, 40)] * 2
    assert attention.shape == (7, 16)
    for i in range(7):
        alone, weights = teacher(images[i : i + 1], (1, 3))
        for y, one in zip(ys, alone, strict=True):
            assert torch.equal(y[i], one[0])
        assert torch.equal(attention[i], weights[0])
    pair = teacher(images[[2, 2, 5]], (3,))[0][0]
    assert torch.equal(pair[2], ys[1][5])


def test_synthetic_is_like_a_teacher() -> None:
    """Defaults of DESIGN 7, outlier channels, an attention that leaves something to [CLS], features
    of the picture."""
    teacher = teachers.load("synthetic")
    assert (teacher.depth, teacher.patches, teacher.width) == (12, 196, 64)
    images = pictures(2, 224)
    ys, attention = teacher(images, (12,))
    size = ys[0].abs().mean((0, 1))
    assert 1 <= (size > 10 * size.median()).sum() <= 5
    assert (attention > 0).all()
    assert (attention.sum(1) < 1).all()
    assert not torch.equal(ys[0][0], ys[0][1])


def test_synthetic_feels_one_pixel_in_its_own_patch_only() -> None:
    teacher = teachers.load("synthetic:levels=1,tokens=4,width=8,size=28")
    images = pictures(1, 28)
    changed = images.clone()
    changed[0, 1, 20, 3] ^= 64  # patch row 1, column 0
    before, after = (teacher(x, (1,))[0][0][0] for x in (images, changed))
    assert ((before != after).any(-1)).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("synthetic:levls=3", "did you mean levels"),
        ("synthetic:levels=0", "levels=0"),
        ("synthetic:width=1.5", "width=1.5"),
        ("synthetic:tokens=5", "square"),
        ("synthetic:tokens=196,size=13", "fit"),
        ("synthetic:levels", "synthetic:levels=5"),
    ],
)
def test_synthetic_options_are_checked(spec: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        teachers.load(spec)


def test_synthetic_takes_no_weights() -> None:
    with pytest.raises(UsageError, match="no weights"):
        teachers.load("synthetic", "random:0")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("clip-b61", "did you mean clip-b16"),
        ("dino_b16", "did you mean dino-b16"),
        ("synthetik", "did you mean synthetic"),
        ("", "known:"),
        ("clip-b16,size=3", "did you mean img_size"),
        ("timm:vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("tim:vit_tiny_patch16_224", "known:"),
        ("timm:vit_tiny_patch16_224.augreg", "did you mean augreg_in21k"),
        (TINY + ",nonsense=3", "nonsense"),
        (TINY.replace("num_heads=3", "num_heads=5"), "num_heads"),
        (TINY + ",img_size=large", "img_size"),
    ],
)
def test_impossible_names_and_options_are_usage_errors(spec: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        teachers.load(spec, "random:0")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet18",
        # parallel attention
        "timm:vit_small_patch16_18x2_224,img_size=32,embed_dim=24,depth=1,num_heads=3",
        TINY + ",in_chans=1",
        TINY.replace("depth=3", "depth=0"),
        # post-norm
        "timm:vit_base_patch16_rpn_224,img_size=32,embed_dim=24,depth=1,num_heads=3,class_token=true",
    ],
)
def test_networks_without_what_is_read_are_refused(spec: str) -> None:
    """Their attention could not be read, or worse: it would be read wrongly and nobody would
    notice."""
    with pytest.raises(UserError, match="plain attention and three colours is needed"):
        teachers.load(spec, "random:0")


def test_an_option_that_is_given_twice_is_refused() -> None:
    """The name of a cache would hold both, and its numbers come of the last."""
    with pytest.raises(UsageError, match="option 'a' is given twice, the second time as 'a=2'"):
        parse_options("a=1,b=0,a=2")


def test_every_registered_name_has_its_facts() -> None:
    rows = teachers.model_cards()
    assert {"clip-b16", "dino-b16", "synthetic"} <= rows.keys()
    assert (
        rows["clip-b16"].input_px,
        rows["clip-b16"].patches,
        rows["clip-b16"].width,
        rows["clip-b16"].depth,
    ) == (224, 196, 768, 12)
    assert parse_options("a=1,b=0.5,c=TRUE,d=x,e=-2") == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": "x",
        "e": -2,
    }


@pytest.mark.slow
def test_a_name_is_found_without_the_libraries() -> None:
    """They take seconds to import, and one of them may not be installed."""
    code = (
        "import sys; from featcache import teachers; teachers.load('synthetic');"
        "teachers.model_cards();"
        "print([name for name in ('timm', 'open_clip', 'torchvision', 'transformers') if name in "
        "sys.modules])"
    )
    ran = python(code)
    assert ran.stdout.strip() == "[]", ran.stderr


# ---------------------------------------------------------------- a file of one's own

OWN = """
import torch
from torch import nn
from featcache.models.contract import REGISTERED
from featcache.errors import UsageError

class Mine(nn.Module):
    input_px, patches, width, depth = 8, 4, 3, 2
    pixel_mean, pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, gain, weights):
        super().__init__()
        self.gain, self.weights = nn.Parameter(torch.tensor(float(gain))), weights or REGISTERED

    def forward(self, images, levels):
        y = images.float().mean((2, 3))[:, None].expand(-1, 5, 3)
        y = y * self.gain * torch.tensor([1.0, 2.0, 4.0])
        return [y * k for k in levels], torch.full((len(images), 4), 0.2)

    def tail(self):
        return {}

def load(name, options, weights):
    unknown = set(options) - {"gain"}
    if unknown:
        raise UsageError(f"teacher {name!r}: unknown option {unknown}")
    return Mine(options.get("gain", 1), weights)
"""


def test_a_users_own_file_is_a_teacher(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    teacher = teachers.load(f"{path},gain=2", "mine.pt")
    assert (teacher.name, teacher.weights, teacher.width) == (f"{path},gain=2", "mine.pt", 3)
    (y,), attention = teacher(torch.full((2, 3, 8, 8), 3, dtype=torch.uint8), (2,))
    assert y.shape == (2, 5, 3)
    assert (y == torch.tensor([12.0, 24.0, 48.0])).all()
    assert attention.shape == (2, 4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())  # type: ignore[attr-defined]
    assert weight_hash(teacher) != weight_hash(teachers.load(str(path)))
    assert not teachers.is_tokenizer(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "lacks load; needed: load(name, options, weights) -> Teacher"),
        ("load = 3", "lacks load"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def load(:", "SyntaxError"),
        (
            "def load(name, options, weights):\n    return 1 / 0",
            "load(...) fails: ZeroDivisionError",
        ),
        ("def load(name):\n    return 1", "load(...) fails: TypeError"),
        (
            "def load(name, options, weights):\n    return object()",
            "lacks weights, input_px, patches, width, depth",
        ),
        (OWN.replace("def tail", "def tale"), "lacks tail"),
        (OWN.replace("def load(", "TOKENIZER = True\ndef load("), "gives token ids"),
    ],
)
def test_mistakes_in_a_users_own_file_are_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        teachers.load(str(path))
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_users_own_file_fills_a_cache(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "cache"
    path.write_text(OWN)
    ran = featcache_command(
        "extract", "--teacher", path, "--images", photos, "--size", 8, "--levels", "2", "--out", out
    )
    assert ran.status == 0, ran.err
    assert (
        featcache_command(
            "verify", out, "--recompute", 3, "--images", photos, "--teacher", path
        ).status
        == 0
    )
    path.write_text(OWN + "# a remark\n")
    assert (
        featcache_command(
            "verify", out, "--recompute", 3, "--images", photos, "--teacher", path
        ).status
        == 0
    )
    # other code, the same weights: another teacher
    path.write_text(OWN.replace("* k for k", "* -k for k"))
    ran = featcache_command("verify", out, "--recompute", 3, "--images", photos, "--teacher", path)
    assert ran.status == 1
    assert "have hash" in ran.error


def test_a_users_file_that_is_not_there_or_an_option_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.py'.*no such file"):
        teachers.load("./nowhere.py")
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(UsageError, match="unknown option"):
        teachers.load(f"{tmp_path}/mine.py,gian=2")


# ---------------------------------------------------------------- weights


def test_random_weights_are_reproducible_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    hashes = [weight_hash(teachers.load(TINY, f"random:{seed}")) for seed in (0, 1, 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert hashes[0] == hashes[2] != hashes[1]
    torch.manual_seed(0)
    direct = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=0,
    )
    torch.random.set_rng_state(before)
    loaded = teachers.load(TINY, "random:0").vit.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in direct.state_dict().items())


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5"])
def test_random_needs_a_whole_seed(weights: str) -> None:
    with pytest.raises(UsageError, match="random:SEED"):
        teachers.load(TINY, weights)


def test_weight_hash_feels_one_flipped_bit_names_and_shapes() -> None:
    teacher = teachers.load(TINY, "random:0")
    before = weight_hash(teacher)
    assert len(before) == 32
    bits = teacher.vit.blocks[1].mlp.fc1.weight.view(-1).view(torch.int32)
    bits[7] ^= 1
    assert weight_hash(teacher) != before
    bits[7] ^= 1
    assert weight_hash(teacher) == before
    other = teachers.load("synthetic:levels=1,tokens=4,width=4,size=28")
    assert weight_hash(other) != before


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in teachers.load(TINY, "random:7").vit.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "with a head"])
def test_weights_from_a_file_are_the_ones_that_run(
    tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "nested":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        torch.save(
            {**state, **({"head.weight": torch.zeros(10, 24)} if kind == "with a head" else {})},
            path,
        )
    teacher = teachers.load(TINY, str(path))
    assert teacher.weights == str(path)
    assert weight_hash(teacher) == weight_hash(teachers.load(TINY, "random:7"))


def test_a_model_that_pools_and_then_norms_loads_its_own_file(tmp_path: Path) -> None:
    """MAE's fine-tuned form: its last norm is called fc_norm and is part of the model that runs."""
    spec = TINY + ",global_pool=avg"
    own = teachers.load(spec, "random:7")
    save_file(own.vit.state_dict(), tmp_path / "w.safetensors")
    loaded = teachers.load(spec, str(tmp_path / "w.safetensors"))
    assert weight_hash(loaded) == weight_hash(own)


class Evil:
    """Make a file where this is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def _bad_file(kind: str, path: Path, state: dict[str, Tensor], mark: Path) -> None:
    if kind == "text":
        path.write_text("these are not the weights\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"blocks": Evil(mark)}))
    elif kind == "torch pickle":
        torch.save({"blocks": Evil(mark)}, path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    else:
        torch.save({"a": "text"}, path)


@pytest.mark.parametrize(
    "kind", ["text", "empty", "html", "truncated", "pickle", "torch pickle", "list", "no tensors"]
)
def test_bad_torch_files_are_one_line_and_nothing_runs(
    tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    path, mark = tmp_path / "bad.pt", tmp_path / "ran"
    _bad_file(kind, path, state, mark)
    with pytest.raises(UserError, match=r"bad\.pt") as caught:
        teachers.load(TINY, str(path))
    assert not mark.exists()
    assert len(str(caught.value)) < 500
    if "pickle" in kind:
        assert "executed" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 4000])
def test_truncated_safetensors_are_one_line(
    tmp_path: Path, state: dict[str, Tensor], keep: int
) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.safetensors.*cannot be read"):
        teachers.load(TINY, str(path))


def test_weights_of_another_architecture_name_the_difference(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "w.safetensors"
    other = {**state, "pos_embed": torch.zeros(1, 6, 24)}  # no [CLS] and square
    save_file(other, path)
    with pytest.raises(
        UserError, match=r"do not fit.*pos_embed is \(1, 6, 24\), \(1, 17, 24\) is needed"
    ):
        teachers.load(TINY, str(path))
    save_file(
        {name: value for name, value in state.items() if not name.startswith("blocks.2")}, path
    )
    with pytest.raises(UserError, match=r"12 tensors are missing \(blocks\.2"):
        teachers.load(TINY, str(path))
    save_file({**state, "extra.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"1 are unknown \(extra\.weight"):
        teachers.load(TINY, str(path))


@pytest.mark.parametrize("weights", ["nowhere.safetensors", "no/such/file", "checkpoint.pth"])
def test_a_missing_file_is_one_line(weights: str) -> None:
    for spec in (TINY, "clip-b16"):
        with pytest.raises(UserError, match="no such file"):
            teachers.load(spec, weights)


def test_unknown_tags_offer_near_ones() -> None:
    with pytest.raises(UsageError, match="did you mean openai"):
        teachers.load("clip-b16", "opnai")
    with pytest.raises(UsageError, match="random:SEED"):
        teachers.load(TINY, "augreg")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no name resolve, with no proxy and no weights in the home."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino-s16", "timm:vit_tiny_patch16_224.augreg_in21k"])
def test_registered_weights_offline_name_both_ways_on(offline: None, name: str) -> None:
    with pytest.raises(UserError) as caught:
        teachers.load(name)
    assert "--weights FILE" in str(caught.value)
    assert "--weights random:SEED" in str(caught.value)
    assert caught.value.exit_status == 1


@pytest.mark.slow  # builds a whole CLIP before it asks for the weights
def test_clip_weights_offline_name_both_ways_on(offline: None) -> None:
    with pytest.raises(UserError, match=r"--weights FILE.*--weights random:SEED"):
        teachers.load("clip-b16")


# ---------------------------------------------------------------- QuickGELU


def test_openais_tags_are_quick_gelu() -> None:
    """Return what `clip-b16` means by its registered weights."""
    for arch in ("ViT-B-16", "ViT-B-32"):
        assert open_clip.get_pretrained_cfg(arch, "openai")["quick_gelu"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-b32"])
def test_a_file_gets_quick_gelu_with_or_without_the_text_tower(tmp_path: Path, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        whole = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval()
    images = pictures(1, 224)
    blocks = whole.visual.transformer.resblocks
    with torch.no_grad():
        ys, _ = record(
            blocks,
            blocks[-1].ln_1,
            lambda: whole.visual(normalised(images, CLIP_MEAN, CLIP_STD).float()),
        )
    for i, weights in enumerate((whole.state_dict(), whole.visual.state_dict())):
        path = tmp_path / f"w{i}.safetensors"
        save_file({key: value.clone() for key, value in weights.items()}, path)
        teacher = teachers.load(f"{name},quick_gelu=true", str(path))
        assert isinstance(teacher, OpenClipVit)
        assert isinstance(teacher.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
        got, _ = teacher(images, (12,))
        assert ((got[0] - ys[11]).norm(dim=-1) / ys[11].norm(dim=-1)).max() < 1e-4


def test_the_same_weights_under_another_activation_are_another_teacher(
    tower: VisionTransformer,
) -> None:
    """LAION's tags run with GELU, a file with QuickGELU: equal tensors, other features. What a
    cache's identity takes from a teacher must tell the two apart."""
    with torch.random.fork_rng(devices=[]):
        plain = VisionTransformer(
            image_size=16, patch_size=8, width=32, layers=3, heads=4, mlp_ratio=2, output_dim=12
        ).eval()
    plain.load_state_dict(tower.state_dict())
    images = pictures(1, 16)
    quick, gelu = OpenClipVit(tower, "FILE"), OpenClipVit(plain, "laion2b")
    assert not torch.allclose(quick(images, (3,))[0][0], gelu(images, (3,))[0][0], rtol=1e-3)
    assert weight_hash(quick) != weight_hash(gelu)


def test_wrapping_changes_nothing_of_the_network(tower: VisionTransformer) -> None:
    x = normalised(pictures(2, 16), CLIP_MEAN, CLIP_STD).float()
    with torch.no_grad():
        before = tower(x)
        OpenClipVit(tower, "x")(pictures(2, 16), (1,))
        assert torch.equal(tower(x), before)
    assert isinstance(teachers.load(TINY, "random:0"), TimmVit)
