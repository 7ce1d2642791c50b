"""The loss of fine-tuning and two whole steps are those of plain torch: pixels rendered by hand,
timm's network, AdamW written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from featcache import rng
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.views.draw import draw_views
from featcache.views.policy import Policy
from featcache.views.render import render
from student.data.sampler import SampleOrder
from student.training import metrics
from student.training.finetune import soft_cross_entropy
from tests import finetuning as ft
from tests import student_fixtures as fx

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cross_entropy_and_its_gradient(dtype: torch.dtype) -> None:
    """mean over pictures of -sum_c t_c (x_c - log sum_k exp x_k); its gradient in x_c is
    (softmax(x)_c sum_k t_k - t_c) / B; in float64."""
    draw = np.random.default_rng(0)
    given = torch.from_numpy(8 * draw.standard_normal((4, 6))).to(dtype).requires_grad_()
    x = given.detach().double().numpy()
    t = draw.dirichlet(np.ones(6), 4)
    loss = soft_cross_entropy(given, torch.from_numpy(t).float())
    assert loss.dtype == torch.float32
    exp = np.exp(x - x.max(1, keepdims=True))
    log_softmax = x - x.max(1, keepdims=True) - np.log(exp.sum(1, keepdims=True))
    assert loss.item() == pytest.approx(-(t * log_softmax).sum(1).mean(), rel=1e-6)
    loss.backward()
    expected = (exp / exp.sum(1, keepdims=True) - t) / 4
    assert given.grad is not None
    tolerance = 1e-7 if dtype == torch.float32 else 2e-3
    np.testing.assert_allclose(given.grad.double().numpy(), expected, atol=tolerance)


def test_two_classes_by_hand() -> None:
    """Logits (0, log 3) have probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, np.log(3.0)]])
    assert soft_cross_entropy(logits, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(
        1.3862943611198906
    )
    assert soft_cross_entropy(logits, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(
        0.8369882167858358
    )


def test_autocast_leaves_the_loss_in_float32() -> None:
    logits, targets = torch.full((2, 3), 100.0), torch.full((2, 3), 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1.0986122886681098)


# --- two steps ------------------------------------------------------------------------------------

PLAIN = (
    "rand_augment=", "erasing=0", "mixup=0", "cutmix=0", "drop_path=0", "smoothing=0.1",
    "head_std=0.3", "lr=0.002", "warmup_epochs=1", "layer_decay=0.5", "weight_decay=0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch of two steps, the first at a rate of 0: its checkpoint has the start values."""
    out = tmp_path_factory.mktemp("steps") / "run"
    fx.good(ft.finetune("mae", out, "--epochs", 1, "--save-every", 1, sets=PLAIN))
    return out


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images (8,3,32,32) and labels (8,) of a step of the first epoch."""
    source = open_source(str(ft.train_pictures()))
    policy = Policy(size=32, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=0)
    images, labels = [], []
    for at in SampleOrder(len(source), 0).step(0, 8 * step, 8):
        key, picture = source.keys[at], decode(source.read(int(at)))
        size = np.array([(picture.height, picture.width)])
        drawn = draw_views(policy, rng.key_digests([key]), size, [0])
        pixels = render(
            picture, drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0], 32, "bicubic"
        )
        images.append(((pixels / 255 - MEAN) / STD).transpose(2, 0, 1))
        labels.append(int(key[1]))  # c3/p08
    return torch.from_numpy(np.stack(images)).float(), torch.tensor(labels)


def network(weights: dict[str, Tensor]) -> Any:
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8}
    net = timm.create_model(
        "vit_tiny_patch16_224", num_classes=ft.CLASSES, global_pool="avg", **sizes
    )
    net.load_state_dict(weights)
    return net


def saved(run: Path, step: int) -> dict[str, Tensor]:
    path = run / f"checkpoints/step-{step:08d}.pt"
    model = torch.load(path, weights_only=True)["model"]
    return {name.removeprefix("encoder."): value for name, value in model.items()}


def plain_loss(net: Any, step: int) -> Tensor:
    """Label smoothing 0.1 over five classes: 0.92 for the own one and 0.02 for the others."""
    images, labels = batch(step)
    logp = torch.log(torch.softmax(net(images), 1))
    targets = torch.full_like(logp, 0.02)
    targets[torch.arange(8), labels] = 0.92
    return -(targets * logp).sum() / 8


@pytest.mark.parametrize("step", [0, 1])
def test_the_loss_of_a_step(step: int, run: Path) -> None:
    row = metrics.read(run)[step]
    expected = plain_loss(network(saved(run, 1)).eval(), step).item()
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_start_is_the_pretrained_encoder(run: Path) -> None:
    """The first step, at a rate of 0, changes nothing, and of the encoder nothing was new."""
    given = torch.load(ft.pretrained("mae") / "checkpoints/step-00000002.pt", weights_only=True)
    own = saved(run, 1)
    for name, value in own.items():
        if not name.startswith(("head.", "fc_norm.")):
            assert torch.equal(value, given["model"][f"encoder.{name}"]), name
    assert own["head.weight"].std().item() == pytest.approx(0.3, rel=0.2)


def scale(name: str) -> float:
    """0.5 to the layers above: five for the stem of four blocks, none for what follows them."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0.5**5
    return 0.5 ** (4 - int(name.split(".")[1])) if name.startswith("blocks.") else 1.0


def test_the_update_is_adamw_with_layer_decay(run: Path) -> None:
    """Half of the warm-up: a rate of 1e-3; decay for matrices and kernels alone."""
    before = saved(run, 1)
    net, after = network(before).eval(), saved(run, 2)
    gradients = [
        torch.autograd.grad(plain_loss(net, step), list(net.parameters())) for step in (0, 1)
    ]
    for i, (name, parameter) in enumerate(net.named_parameters()):
        first, second = gradients[0][i].double(), gradients[1][i].double()
        moment = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
        square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
        rate = 1e-3 * scale(name)
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        value = before[name].double() * (1 - rate * 0.3 * decays)
        expected = value - rate * moment / (square.sqrt() + 1e-8)
        moved, wanted = after[name].double(), expected
        if name.endswith("qkv.bias"):  # no gradient reaches the keys', but for rounding
            moved, wanted = (torch.cat([x[:48], x[96:]]) for x in (moved, wanted))
        torch.testing.assert_close(moved, wanted, rtol=0, atol=0.02 * rate, msg=name)
