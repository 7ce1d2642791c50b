"""Derived targets against the unmodified library model, by hooks, and against the formulas in
float64.

The networks are small and random, with final norms that are not the identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

import featcache
from featcache.errors import UsageError, UserError
from featcache.extraction import extract, plan
from featcache.models.open_clip_wrapper import OpenClipVit
from featcache.models.timm_wrapper import TimmVit
from featcache.pictures.open_source import open_source
from featcache.targets import derived, levels
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, make_plan


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def tail_of(width: int, eps: float, projection: int | None = 5) -> dict[str, Tensor]:
    tail = {
        "gamma": torch.from_numpy(1 + draw(width, seed=3) / 4),
        "beta": torch.from_numpy(draw(width, seed=4)),
        "eps": torch.tensor(eps, dtype=torch.float32),
    }
    if projection:
        tail["proj"] = torch.from_numpy(draw(width, projection, seed=5))
    return tail


# ---------------------------------------------------------------- the formulas


@pytest.mark.parametrize(("eps", "scale"), [(1e-5, 1.0), (1e-6, 1.0), (1e-6, 0.01), (1e-12, 0.02)])
def test_derived_targets_are_the_formulas(eps: float, scale: float) -> None:
    """f is the final LayerNorm with its own eps on y itself, whatever eps h was stored with."""
    y = draw(2, 4, 16, seed=6, scale=scale)
    h, stats = levels.normalise(torch.from_numpy(y))
    tail = tail_of(16, eps)
    gamma, beta, proj = (tail[name].numpy() for name in ("gamma", "beta", "proj"))
    f = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps) * gamma + beta
    fd = (f - f.mean(-1, keepdims=True)) / np.sqrt(f.var(-1, keepdims=True) + 1e-5)
    for name, expected in (("f", f), ("z", f @ proj), ("fd", fd), ("y", y)):
        got = derived.target(name, h, tail, stats)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """h = (1, -1), stored divisor sqrt(1 + 1e-5) of variance 1; gamma (2, 3), beta (1, 0); another
    eps of 3."""
    h, stats = (
        torch.tensor(pair, dtype=torch.float64) for pair in ([1.0, -1.0], [5.0, 1.00001**0.5])
    )
    tail = {
        "gamma": torch.tensor([2.0, 3.0]),
        "beta": torch.tensor([1.0, 0.0]),
        "eps": torch.tensor(1e-5),
    }
    assert derived.target("f", h, tail).tolist() == [3.0, -3.0]
    tail["proj"] = torch.tensor([[1.0], [2.0]]).double()
    assert derived.target("z", h, tail).tolist() == [-3.0]
    assert derived.target("fd", h, tail).tolist() == pytest.approx([1.0, -1.0], abs=1e-5)
    assert derived.target("y", h, tail, stats).tolist() == pytest.approx(
        [6.000005, 3.999995], abs=1e-9
    )
    ours = 1.00001**0.5 / 2  # the model divides by sqrt(1 + 3)
    got = derived.target("f", h, {**tail, "eps": torch.tensor(3.0)}, stats).tolist()
    assert got == pytest.approx([2 * ours + 1, -3 * ours], abs=1e-9)


def test_what_needs_the_statistics_says_so() -> None:
    h, _ = levels.normalise(torch.from_numpy(draw(1, 2, 16)))
    assert derived.target("f", h, tail_of(16, 1e-5)).shape == (1, 2, 16)
    for name in ("f", "z", "fd"):
        with pytest.raises(
            UsageError, match=rf"'{name}': this teacher's eps is 1e-06, so `stats`.*are needed"
        ):
            derived.target(name, h, tail_of(16, 1e-6))
    with pytest.raises(UsageError, match=r"'y' needs `stats`.*feature_stats"):
        derived.target("y", h, tail_of(16, 1e-5))


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        ({"rms_gamma": torch.ones(16), "eps": torch.tensor(1e-5)}, "final norm is an RMS norm"),
        ({"identity": torch.tensor(1.0)}, "has no final norm"),
    ],
)
def test_other_norms_need_the_statistics(tail: dict[str, torch.Tensor], told: str) -> None:
    h, stats = levels.normalise(torch.from_numpy(draw(1, 2, 16)))
    assert derived.needs_stats(tail)
    assert derived.has_output(tail)
    assert derived.target("f", h, tail, stats).shape == (1, 2, 16)
    with pytest.raises(UsageError, match=rf"'f': this teacher('s)? {told}, so `stats`"):
        derived.target("f", h, tail)
    with pytest.raises(UserError, match="'z': this teacher's tail has no projection"):
        derived.target("z", h, tail, stats)


def test_an_rms_norm_and_no_norm_by_hand() -> None:
    """y = (3, -4), as h = (1, -1), mean -0.5 and std 3.5 give it; the mean of its squares is 12.5,
    and an eps of 12.5 makes the root 5."""
    h, stats = torch.tensor([1.0, -1.0]), torch.tensor([-0.5, 3.5])
    rms = {"rms_gamma": torch.tensor([2.0, 0.5]), "eps": torch.tensor(12.5)}
    assert derived.target("f", h, rms, stats).tolist() == pytest.approx([1.2, -0.4])
    assert derived.output(torch.tensor([3.0, -4.0]), rms).tolist() == pytest.approx([1.2, -0.4])
    bare = {"identity": torch.tensor(1.0), "proj": torch.tensor([[1.0], [2.0]])}
    assert derived.target("f", h, bare, stats).tolist() == [3.0, -4.0]
    assert derived.target("z", h, bare, stats).tolist() == [-5.0]
    assert derived.target("fd", h, bare, stats).tolist() == pytest.approx([1.0, -1.0], abs=1e-5)


def test_what_cannot_be_derived_is_one_line() -> None:
    h = torch.zeros(1, 2, 16)
    with pytest.raises(UsageError, match=r"unknown derived target 'q'.*known: f, fd, h, y, z"):
        derived.target("q", h, tail_of(16, 1e-5))
    with pytest.raises(UserError, match="has no projection; it has gamma, beta, eps"):
        derived.target("z", h, tail_of(16, 1e-5, None))
    # a user's own teacher that tells nothing
    with pytest.raises(UserError, match="has no beta, eps, gamma; it has nothing"):
        derived.target("f", h, {})


# ---------------------------------------------------------------- the models


def shake(module: nn.Module) -> nn.Module:
    """Norms that scale and shift."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.named_parameters():
        if value.ndim == 1:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
        if name.endswith("proj") and value.ndim == 2:
            value.data = torch.randn(value.shape, generator=generator) * value.shape[0] ** -0.5
    return module.eval().requires_grad_(False)


def tower() -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shake(VisionTransformer(32, 8, 24, 3, 3, 4.0, output_dim=10, act_layer=QuickGELU))


def vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 3,
            "num_classes": 0,
        }
        return shake(timm.create_model("vit_tiny_patch16_224", **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {"clip": tower, "timm": vit}


def teacher(kind: str) -> OpenClipVit | TimmVit:
    made = OpenClipVit(tower(), "random:0") if kind == "clip" else TimmVit(vit(), "random:0")
    made.name = kind
    return made


def reference(kind: str, batch: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 (n, S, S, 3) -> the model's own final norm of every token, its projection of them, and
    of [CLS] what the model returns; float64, the library's forward with one hook."""
    model = MODELS[kind]().double()
    norm = model.ln_post if kind == "clip" else model.norm
    mean, std = (
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        if kind == "clip"
        else (0.5, 0.5)
    )
    x = (batch / 255 - np.asarray(mean)) / np.asarray(std)
    seen: list[Tensor] = []
    if kind == "clip":  # the tower norms [CLS] alone; every token is what its last block gives
        model.transformer.resblocks[-1].register_forward_hook(lambda _, __, y: seen.append(norm(y)))
    else:
        norm.register_forward_hook(lambda _, __, f: seen.append(f))
    out = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    f = seen[0].numpy()
    found = {"f": f, "own": out.numpy()}
    return {**found, "z": f @ model.proj.numpy()} if kind == "clip" else found


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest relative L2 of any token."""
    return float((np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())


@functools.cache
def cache_of(folder: Path, kind: str) -> Path:
    out = folder.parent / f"derive-{kind}"
    policy = Policy(size=32)
    made = plan.Plan(
        source=open_source(folder),
        teacher=teacher(kind),
        policy=policy,
        views=2,
        levels=(2, 3),
        rows_per_shard=5,
        pixels=True,
    )
    extract.run(made, out, batch_size=4)
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_unencoded_h_gives_the_models_own_output(kind: str) -> None:
    batch = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), np.uint8)
    wanted, made = reference(kind, batch), teacher(kind)
    ys, _ = made(torch.from_numpy(batch).permute(0, 3, 1, 2), (3,))
    h, stats = levels.normalise(ys[0])
    tail = {name: torch.from_numpy(value) for name, value in made.tail().items()}
    for name in ("f", "z") if kind == "clip" else ("f",):
        assert relative(derived.target(name, h, tail, stats).double().numpy(), wanted[name]) < 1e-5
    own = derived.target("z" if kind == "clip" else "f", h, tail, stats)[:, 0]
    assert relative(own.double().numpy(), wanted["own"]) < 1e-5  # of CLIP: encode_image


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_gives_the_models_own_output(photos: Path, kind: str) -> None:
    """fp16 storage is between them."""
    with featcache.open(cache_of(photos, kind)) as cache:
        for view in range(2):
            wanted = reference(kind, cache.read(range(11), view, ["pixels"])["pixels"])
            for name in ("f", "z") if kind == "clip" else ("f",):
                got = cache.derive(name, range(11), view)
                assert got.dtype == np.float32
                assert got.shape == (11, 17, 10 if name == "z" else 24)
                assert 0 < relative(got.astype(np.float64), wanted[name]) < 1e-3
            own = cache.derive("z" if kind == "clip" else "f", range(11), view)[:, 0]
            assert relative(own.astype(np.float64), wanted["own"]) < 1e-3
            np.testing.assert_array_equal(
                cache.derive("f", [7, 2], view, tokens=3), cache.derive("f", view=view)[[7, 2], :3]
            )


def test_the_residual_stream_of_any_level(photos: Path) -> None:
    with featcache.open(cache_of(photos, "timm")) as cache:
        pixels = torch.from_numpy(cache.read(range(11), 0, ["pixels"])["pixels"]).permute(
            0, 3, 1, 2
        )
        ys, _ = teacher("timm")(pixels, (2, 3))
        for level, y in zip((2, 3), ys, strict=True):
            assert relative(cache.derive("y", level=level), y.numpy()) < 1e-3
        np.testing.assert_array_equal(cache.derive("y"), cache.derive("y", level=3))
        with pytest.raises(UsageError, match=r"'f' is of the last level, 3; level 2 is given"):
            cache.derive("f", level=2)
        with pytest.raises(
            UserError, match=r"'y' needs level 1 of timm, stored are 2,3; add it with .*--levels 1"
        ):
            cache.derive("y", level=1)
        with pytest.raises(UserError, match="has no proj"):
            cache.derive("z")
        with pytest.raises(UsageError, match="teacher 'clip' is not in this cache"):
            cache.derive("f", teacher="clip")


@pytest.mark.slow
def test_ranked_tokens_come_by_rank(photos: Path, tmp_path: Path) -> None:
    made = make_plan(photos, SYNTHETIC, levels=(3,))
    extract.run(made, tmp_path / "raster", batch_size=4)
    extract.run(
        make_plan(photos, SYNTHETIC, levels=(3,), tokens="ranked", keep=2),
        tmp_path / "ranked",
        batch_size=4,
    )
    with (
        featcache.open(tmp_path / "raster") as raster,
        featcache.open(tmp_path / "ranked") as ranked,
    ):
        order = raster.read(range(11), 1, ["mask_order"])["mask_order"].astype(int)
        whole, kept = raster.derive("f", view=1), ranked.derive("f", view=1)
    for row in range(11):
        np.testing.assert_array_equal(kept[row], whole[row][[0, *(1 + order[row, :2])]])


def test_the_real_encode_image() -> None:
    """The whole open_clip model, not its tower alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
        text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
        model = open_clip.CLIP(12, vision, text, quick_gelu=True).eval().requires_grad_(False)
    shake(model.visual)
    made = OpenClipVit(model.visual, "random:0")
    batch = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, 3, 32, 32), np.uint8))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (made.pixel_mean, made.pixel_std))
    wanted = model.encode_image((batch / 255 - mean) / std).numpy()
    ys, _ = made(batch, (2,))
    tail = {name: torch.from_numpy(value) for name, value in made.tail().items()}
    got = derived.target("z", levels.normalise(ys[0])[0], tail)[:, 0].numpy()
    assert relative(got, wanted) < 1e-5
