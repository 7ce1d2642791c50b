"""Every module of the recipe folder keeps its promises; the recipes' own tests share the tiny case
here.

The tiny case has no random number in it: weights and pictures are sines of their index, so that a
loss is the same literal whatever the versions of torch and timm draw at the start.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featcache.errors import UsageError
from student import config, masking, recipes
from student.models import losses
from student.recipes import TargetSpec
from student.training import optim

# 16 patches of 4 x 4 pixels; 3 student blocks of 2 heads, 3 teacher levels.
TINY = [
    "encoder=vit_tiny_patch16_224,embed_dim=16,depth=3,num_heads=2",
    "img_size=16",
    "patch_size=4",
    "drop_path=0",
    "teacher_depth=3",
    "teacher_width=12",
]
TINY_ALIGN = [*TINY, "level_weights=top:2"]
TINY_OUTPUT = [*TINY, "teacher_out=10"]
TINY_DECODER = ["decoder_width=8", "decoder_depth=2", "decoder_heads=2"]
TINY_BEIT = "encoder=tiny,embed_dim=16,depth=3,num_heads=2"
TINY_REGRESSOR = ["regressor_width=16", "regressor_heads=2"]
TINY_SETTINGS = {
    "maskalign": TINY_ALIGN,
    "mae": [*TINY, *TINY_DECODER],
    "mralign": [*TINY_ALIGN, *TINY_DECODER],
    "milan": [*TINY_OUTPUT, *TINY_DECODER],
    "kd": TINY_OUTPUT,
    "caev2": [*TINY_OUTPUT, TINY_BEIT, *TINY_REGRESSOR, "regressor_depth=2"],
    "cae": [
        *TINY,
        TINY_BEIT,
        *TINY_REGRESSOR,
        "regressor_depth=2",
        "decoder_depth=2",
        "vocabulary=9",
    ],
    "fd": [*TINY, "teacher_width=10", TINY_BEIT],
    "mvp": [*TINY_OUTPUT, TINY_BEIT],
    "mrmae": [*TINY, "teacher_width=10", *TINY_DECODER],
}


def wave(*shape: int, phase: float, size: float = 1.0) -> Tensor:
    return size * torch.sin(1.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(
        shape
    )


def tiny_batch(levels: int = 2) -> dict[str, Tensor]:
    """Make two pictures, 4 of 16 patches visible."""
    ids_keep = torch.tensor([[1, 5, 10, 12], [0, 3, 6, 15]])
    hidden = [[p for p in range(16) if p not in row] for row in ids_keep.tolist()]
    return {
        "images": wave(2, 3, 16, 16, phase=0.3),
        "features": wave(2, levels, 17, 12, phase=0.9, size=1.4),
        "targets": wave(2, 17, 10, phase=0.7, size=1.6),
        "second": wave(2, 17, 6, phase=1.9, size=1.2),
        "token_ids": torch.arange(32).view(2, 16) * 5 % 9,
        "ids_keep": ids_keep,
        "ids_masked": torch.tensor(hidden),
    }


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Set small sines in every trained parameter, around 1 in the norms' weights; fixed positions
    stay."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        # names of norms: norm1, decoder_norm, ...; encoder_to_regresser_norm
        if not name.endswith("pos_embed"):
            parameter.copy_(wave(*parameter.shape, phase=0.1 * i, size=0.2))
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)


def tiny_model(name: str, *more: str) -> tuple[nn.Module, Any]:
    module = recipes.load(name)
    settings = config.from_overrides(module.Config, [*TINY_SETTINGS[name], *more])
    model = module.Model(settings).double()
    fill(model)
    return model, settings


def first_losses(
    name: str, steps: int = 3, more: Sequence[str] = (), levels: int = 2
) -> list[float]:
    model, settings = tiny_model(name, *more)
    optimizer = optim.adamw(model, settings, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(tiny_batch(levels))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def check_against(
    model: nn.Module, out: Tensor, reference: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """Check that the loss and its gradients equal those of a second implementation, a function of
    the state dict."""
    parameters = trained(model)
    got = torch.autograd.grad(out, list(parameters.values()))
    copies = {
        name: x.clone().requires_grad_(name in parameters) for name, x in model.state_dict().items()
    }
    expected_loss = reference(copies)
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in parameters])
    torch.testing.assert_close(out, expected_loss, rtol=1e-12, atol=0)
    for name, a, b in zip(parameters, got, expected, strict=True):
        # An absolute floor: the gradient of a key bias is zero by symmetry.
        torch.testing.assert_close(
            a, b, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )


def parameters(name: str, *more: str) -> tuple[int, int]:
    """Return how many numbers the model has, and how many of them are trained; nothing is
    allocated."""
    module = recipes.load(name)
    with torch.device("meta"):
        model = module.Model(config.from_overrides(module.Config, more))
    return sum(x.numel() for x in model.parameters()), sum(
        x.numel() for x in trained(model).values()
    )


def gmac(name: str, *more: str) -> float:
    """Return multiply-accumulates (1e9) of one picture's forward pass at the recipe's own size,
    counted by torch."""
    module = recipes.load(name)
    settings = config.from_overrides(module.Config, more)
    spec, p = module.needs(settings), settings.patches
    width = settings.teacher_out if spec.derive == "z" else settings.teacher_width
    ids = {"ids_keep": settings.visible, "ids_masked": p - settings.visible, "token_ids": p}
    # Shapes alone (a device without autocast), and the plain form of attention, whose products the
    # counter knows.
    without = mock.patch.object(losses, "autocast_off", return_value=contextlib.nullcontext())
    with torch.device("meta"), without:
        model = module.Model(settings).requires_grad_(False)
        batch = {key: torch.empty(1, n, dtype=torch.int64) for key, n in ids.items()}
        batch |= {"images": torch.empty(1, 3, settings.img_size, settings.img_size)}
        batch |= {
            "targets": torch.empty(1, 1 + p, width),
            "features": torch.empty(1, len(spec.levels), 1 + p, width),
        }
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(batch)
    return counter.get_total_flops() / 2e9


def reference_losses(
    name: str,
    reference: Callable[[dict[str, Tensor]], Tensor],
    steps: int = 3,
    more: Sequence[str] = (),
) -> list[float]:
    """Return what `first_losses` must give: a second implementation's loss of the state dict,
    and AdamW written out (learning rate 1e-2, eps 1e-8, decay 0.05 of every matrix that is no
    token)."""
    model, settings = tiny_model(name, *more)
    names, (b1, b2) = list(trained(model)), settings.betas
    w = {key: x.clone() for key, x in model.state_dict().items()}
    m, v = ({key: torch.zeros_like(w[key]) for key in names} for _ in range(2))
    found = []
    for t in range(1, steps + 1):
        copies = {key: x.clone().requires_grad_(key in names) for key, x in w.items()}
        loss = reference(copies)
        found.append(loss.item())
        for key, g in zip(
            names, torch.autograd.grad(loss, [copies[key] for key in names]), strict=True
        ):
            m[key], v[key] = b1 * m[key] + (1 - b1) * g, b2 * v[key] + (1 - b2) * g**2
            decay = 0.05 if w[key].ndim > 1 and "token" not in key else 0.0
            step = (m[key] / (1 - b1**t)) / ((v[key] / (1 - b2**t)).sqrt() + 1e-8)
            w[key] = w[key] * (1 - 1e-2 * decay) - 1e-2 * step
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


# --- the contract, for every module in the folder -------------------------------------------------

each = pytest.mark.parametrize("name", sorted(TINY_SETTINGS))


def test_each_recipe_of_the_folder_has_a_tiny_case() -> None:
    assert set(TINY_SETTINGS) == set(recipes.names())


@each
def test_module_has_docstring_config_model_needs(name: str) -> None:
    module = recipes.load(name)
    assert module.__doc__ is not None
    for heading in ("Paper:", "Command:", "Cost:", "Expected:", "differs"):
        assert heading in module.__doc__, heading
    assert f"--recipe {name}" in module.__doc__
    assert issubclass(module.Config, config.RecipeConfig)
    assert isinstance(module.needs(module.Config()), TargetSpec)


@pytest.mark.slow_after(2)
@each
def test_loss_has_a_gradient_in_every_trained_parameter(name: str) -> None:
    model, _ = tiny_model(name)
    out = model(tiny_batch())
    assert out["loss"].dtype == torch.float64
    assert all(value.ndim == 0 for value in out.values())
    assert not any(value.requires_grad for part, value in out.items() if part != "loss")
    out["loss"].backward()
    assert [part for part, parameter in trained(model).items() if parameter.grad is None] == []


@pytest.mark.slow_after(2)
@each
def test_encoder_loads_strictly_into_timm(name: str) -> None:
    model, _ = tiny_model(name)
    small: dict[str, Any] = {"num_classes": 0, "img_size": 16, "patch_size": 4}
    small |= {"embed_dim": 16, "depth": 3, "num_heads": 2}
    if isinstance(model.encoder, Beit):
        relative = model.encoder.pos_embed is None
        positions = {
            "use_abs_pos_emb": not relative,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": relative,
        }
        plain = timm.create_model(
            "beit_base_patch16_224", global_pool="token", **small, **positions
        )
    else:
        plain = timm.create_model("vit_tiny_patch16_224", **small)
    plain.double().load_state_dict(model.encoder.state_dict(), strict=True)
    ours, timms = (
        net.eval().forward_features(tiny_batch()["images"]) for net in (model.encoder, plain)
    )  # type: ignore[union-attr,operator]
    torch.testing.assert_close(ours, timms)


@each
def test_no_weight_decay_names_parameters(name: str) -> None:
    model, _ = tiny_model(name)
    assert model.no_weight_decay() <= set(trained(model))


@each
def test_any_order_of_ids_keep_gives_the_same_loss(name: str) -> None:
    model, _ = tiny_model(name)
    batch = tiny_batch()
    shuffled = {**batch, "ids_keep": batch["ids_keep"].flip(1)}
    torch.testing.assert_close(model(shuffled)["loss"], model(batch)["loss"])


@pytest.mark.slow_after(2)
@each
def test_bf16_autocast_computes_the_loss_in_float32(name: str) -> None:
    model, _ = tiny_model(name)
    model.float()
    batch = {key: x.float() if x.is_floating_point() else x for key, x in tiny_batch().items()}
    exact = model(batch)["loss"]
    batch["features"], batch["targets"] = batch["features"].half(), batch["targets"].half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.0)
    loss.backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in trained(model).values())


@pytest.mark.slow_after(2)
@each
def test_drop_path_draws_from_the_global_generator(name: str) -> None:
    model, _ = tiny_model(name, "drop_path=0.5")

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(tiny_batch())["loss"].item()

    assert loss(1) == loss(1)
    assert len({loss(seed) for seed in range(8)}) > 1


def golden(**changes: object) -> dict[str, object]:
    common: dict[str, object] = {
        "encoder": "base", "img_size": 224, "patch_size": 16, "drop_path": 0.1,
        "teacher": "clip-b16", "teacher_depth": 12, "teacher_width": 768,
        "mask": "attentive", "mask_ratio": 0.7, "mask_count": "visible", "repeat_peak": False,
        "blr": 1.5e-4, "lr": None, "min_lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.05,
        "decay_tokens": False, "clip_grad": None, "epochs": 200, "warmup_epochs": 20,
    }  # fmt: skip
    return {**common, **changes}


OUTPUT = {"target": "z", "teacher_out": 512}
ALIGN = {"level_weights": "top:5", "align_levels": "auto"}
DECODER = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16, "norm_pix": True}
GOLDEN = {
    "maskalign": golden(
        **ALIGN, alignment="mix_then_adapt", mix_start="auto", adaptor="linear", target_norm="ln",
        loss="smooth_l1", cls_loss=True,
    ),
    "mae": golden(
        drop_path=0.0, mask="uniform", mask_ratio=0.75, min_lr=0.0, epochs=800, warmup_epochs=40,
        **DECODER,
    ),
    "mralign": golden(mask_ratio=0.75, align_weight=0.5, pixel_weight=0.5, **ALIGN, **DECODER),
    "milan": golden(
        drop_path=0.0, mask_ratio=0.75, min_lr=0.0, epochs=400, warmup_epochs=40,
        decoder="prompting", prompts="projected", cls_loss=True, **OUTPUT, **DECODER,
    ),
    "kd": golden(
        drop_path=0.0, mask_ratio=0.75, min_lr=0.0, epochs=400, warmup_epochs=40, **OUTPUT
    ),
    "caev2": golden(
        mask="blockwise", mask_ratio=0.5, lr=1.5e-3, betas=[0.9, 0.999], clip_grad=3.0, epochs=300,
        warmup_epochs=10, family="cae", layer_scale=0.1, regressor_width=768, regressor_depth=4,
        regressor_heads=12, align="both", loss="cosine", reduction="code", head="norm_linear",
        jitter=0.4, **OUTPUT,
    ),
    "cae": golden(
        mask="blockwise", mask_ratio=0.5, lr=1.5e-3, betas=[0.9, 0.999], clip_grad=3.0, epochs=800,
        warmup_epochs=20, family="cae", layer_scale=0.1, xavier=True, regressor_width=768,
        regressor_depth=4, regressor_heads=12, decoder_depth=4, token_field="dvae/token_ids",
        vocabulary=8192, align_weight=2.0, align_drop_path=True, target="tokens", teacher_out=512,
        norm_pix=True,
    ),
    "fd": golden(
        drop_path=0.2, mask="uniform", mask_ratio=0.0, min_lr=2e-5, betas=[0.9, 0.999],
        clip_grad=3.0, epochs=300, warmup_epochs=10, family="beit", layer_scale=0.1, beta=2.0,
    ),
    "mvp": golden(
        mask="blockwise", mask_ratio=0.4, lr=1.5e-3, betas=[0.9, 0.999], clip_grad=3.0, epochs=300,
        warmup_epochs=10, family="beit", layer_scale=0.1, **OUTPUT,
    ),
}  # fmt: skip
GOLDEN["mrmae"] = golden(
    drop_path=0.0, mask_ratio=0.75, min_lr=0.0, epochs=400, warmup_epochs=80, target="fd",
    teacher_out=512, family="mae", conv_cls=False, fuse="auto", mimic_at="encoder",
    mimic_weight=0.5, pixel_weight=0.5, reduction="mean", joint="", joint_depth=12, joint_width=768,
    **DECODER,
)  # fmt: skip
CLIP_L14 = {"teacher": "clip-l14", "teacher_depth": 24, "teacher_width": 1024, "teacher_out": 768}
# What a model size changes.
GOLDEN_SIZES: dict[tuple[str, str], dict[str, object]] = {
    ("caev2", "tiny"): {"mask_ratio": 0.15, "regressor_width": 96, "regressor_depth": 1},
    ("caev2", "small"): {"mask_ratio": 0.25, "regressor_width": 384, "regressor_depth": 1},
    ("caev2", "large"): {
        "mask_ratio": 0.6, "regressor_width": 1024, "regressor_heads": 16, "drop_path": 0.2,
        "layer_scale": 1e-5, **CLIP_L14,
    },
    ("maskalign", "large"): {"drop_path": 0.2},
    ("milan", "large"): CLIP_L14,
    ("fd", "large"): {
        "drop_path": 0.3, "patch_size": 14, "teacher": "clip-l14,img_size=224", "teacher_depth": 24,
        "teacher_width": 1024,
    },
    ("cae", "large"): {"layer_scale": 1e-5, "epochs": 1600, "warmup_epochs": 40},
}  # fmt: skip


@each
def test_defaults_are_the_published_ones(name: str) -> None:
    assert config.as_dict(recipes.load(name).Config()) == GOLDEN[name]


@each
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_defaults_of_each_size(name: str, size: str) -> None:
    given = config.from_overrides(recipes.load(name).Config, [f"encoder={size}"])
    assert config.as_dict(given) == {
        **GOLDEN[name],
        "encoder": size,
        **GOLDEN_SIZES.get((name, size), {}),
    }


@pytest.mark.parametrize("name", sorted(set(TINY_SETTINGS) - {"fd"}))  # which hides nothing
@pytest.mark.parametrize("mask", sorted(masking.MASKS))
def test_needs_holds_what_the_mask_reads(name: str, mask: str) -> None:
    module = recipes.load(name)
    spec = module.needs(config.from_overrides(module.Config, [f"mask={mask}"]))
    read = {"attentive": ("attention",), "topk": ("attention",), "stored": ("mask_order",)}.get(
        mask, ()
    )
    assert (
        tuple(field for field in spec.fields if field not in ("features", "dvae/token_ids")) == read
    )


# --- loading --------------------------------------------------------------------------------------


def test_unknown_recipe_lists_near_names() -> None:
    with pytest.raises(
        UsageError, match=r"unknown recipe 'maskaling': did you mean maskalign\b.*known: .*\bmae\b"
    ):
        recipes.load("maskaling")


MINE = '''"""My own."""
from __future__ import annotations
from dataclasses import dataclass
from student.recipes import mae
Config = mae.Config
Model = mae.Model
needs = mae.needs

@dataclass(frozen=True)
class Extra:
    number: int = 3
'''


def write(path: Path, text: str) -> ModuleType:
    path.write_text(text)
    return recipes.load(str(path))


def test_a_users_file_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write(tmp_path / "mine.py", MINE)
    assert module.Extra().number == 3
    assert module.needs(module.Config()).fields == ()
    monkeypatch.chdir(tmp_path)
    assert recipes.load("./mine.py").__doc__ == "My own."


def test_a_file_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"it lacks Model, needs; needed: Config, Model, needs"):
        write(tmp_path / "half.py", "Config = int\n")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        recipes.load(str(tmp_path / "none.py"))
