"""Groups of parameters are compared by name, the schedule with numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from student import recipes
from student.config import RecipeConfig
from student.training import metrics, optim
from tests import student_fixtures as fx
from tests.student.recipes.test_recipes import tiny_model


class Toy(nn.Module):
    """One parameter of each kind the rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 3))
        self.mix = nn.Parameter(torch.zeros(2, 4))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def no_weight_decay(self) -> list[str]:
        return ["mix"]


def names(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: [known[id(parameter)] for parameter in group["params"]] for group in groups
    }


def test_groups_by_timms_rule() -> None:
    model = Toy()
    groups = optim.param_groups(model, weight_decay=0.05)
    assert names(model, groups) == {
        "decay": ["linear.weight"],
        "no_decay": [
            "cls_token",
            "mask_token",
            "pos_embed",
            "mix",
            "linear.bias",
            "norm.weight",
            "norm.bias",
        ],
    }
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


def test_tokens_decay_in_the_released_codes_manner() -> None:
    model = Toy()
    groups = names(model, optim.param_groups(model, weight_decay=0.05, decay_tokens=True))
    assert groups["decay"] == ["cls_token", "mask_token", "pos_embed", "linear.weight"]


def test_a_model_without_a_skip_list() -> None:
    model = nn.Linear(2, 2)
    assert names(model, optim.param_groups(model, 0.1)) == {
        "decay": ["weight"],
        "no_decay": ["bias"],
    }


def test_without_decay_the_groups_are_the_same() -> None:
    """A checkpoint numbers the parameters group by group."""
    model = Toy()
    none, some = optim.param_groups(model, weight_decay=0.0), optim.param_groups(model, 0.05)
    assert names(model, none) == names(model, some)
    assert [group["weight_decay"] for group in none] == [0.0, 0.0]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("decay_tokens", [False, True])
@pytest.mark.parametrize("name", recipes.names())
def test_groups_of_every_recipe(name: str, decay_tokens: bool) -> None:
    """1-D parameters and those that the recipe spares, besides the tokens of the MAE family."""
    model, _ = tiny_model(name)
    tokens = set() if decay_tokens else {"cls_token", "mask_token", "pos_embed"}
    expected: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for key, parameter in model.named_parameters():
        spared = (
            parameter.ndim == 1
            or key in model.no_weight_decay()  # type: ignore[operator]
            or key.split(".")[-1].removeprefix("decoder_") in tokens
        )
        if parameter.requires_grad:
            expected["no_decay" if spared else "decay"].append(key)
    assert names(model, optim.param_groups(model, 0.05, decay_tokens)) == expected


def test_adamw_takes_the_recipes_numbers() -> None:
    optimizer = optim.adamw(Toy(), RecipeConfig(betas=(0.8, 0.7), weight_decay=0.3), lr=0.02)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.7)}
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}
    assert optimizer.defaults["fused"]


def test_fused_equals_the_plain_loop() -> None:
    """torch's own unfused AdamW over the same gradients: five steps, to rounding."""
    models = [Toy(), Toy()]
    models[1].load_state_dict(models[0].state_dict())
    config = RecipeConfig(weight_decay=0.3, betas=(0.8, 0.7))
    groups = optim.param_groups(models[1], 0.3)
    both = [
        optim.adamw(models[0], config, 0.02),
        torch.optim.AdamW(groups, 0.02, (0.8, 0.7), fused=False),
    ]
    for step in range(5):
        for model, optimizer in zip(models, both, strict=True):
            draws = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draws)
            optimizer.step()
    assert both[0].defaults["fused"]
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_a_device_without_the_kernel_takes_the_loop() -> None:
    assert not optim.adamw(Toy().to("meta"), RecipeConfig(), lr=0.1).defaults["fused"]


def test_one_step_of_adamw_by_hand() -> None:
    """First step: m/sqrt(v) = sign(gradient), so w = w (1 - lr * decay) - lr = 2 * (1 - 0.1 * 0.5)
    - 0.1 = 1.8."""
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    optimizer = optim.adamw(model, RecipeConfig(weight_decay=0.5), lr=0.1)
    model.weight.sum().backward()
    optimizer.step()
    assert model.weight.detach().numpy() == pytest.approx(1.8, rel=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_on_cuda() -> None:
    assert optim.adamw(Toy().cuda(), RecipeConfig(), lr=0.1).defaults["fused"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.25),
        (3, 0.75),
        (4, 1.0),
        (6, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the way: cos 45 degrees
        (8, 0.55),  # half of the way
        (10, 0.1 + 0.9 * 0.5 * (1 - math.sqrt(0.5))),
        (12, 0.1),
        (13, 0.1),
    ],
)
def test_schedule_by_hand(step: int, expected: float) -> None:
    got = optim.warmup_cosine(step, total=12, warmup=4, peak=1.0, minimum=0.1)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.0),
        (0.5, 0.32),
        (5, 3.2),
        (10, 6.4),
        (30, 3.2 * (1 + math.sqrt(0.5))),
        (50, 3.2),
        (70, 3.2 * (1 - math.sqrt(0.5))),
        (90, 0.0),
    ],
)
def test_schedule_in_epochs_by_hand(epoch: float, expected: float) -> None:
    """The linear probe of MAE has 90 epochs, 10 of warm-up; a step in mid-epoch has its own
    value."""
    got = optim.warmup_cosine(epoch, total=90, warmup=10, peak=6.4)
    assert got == pytest.approx(expected, abs=1e-12)


def test_schedule_edges() -> None:
    assert optim.warmup_cosine(0, total=5, warmup=0, peak=0.3) == 0.3
    # only ever rises
    assert optim.warmup_cosine(4, total=5, warmup=10, peak=1.0) == 0.4
    assert optim.warmup_cosine(5, total=5, warmup=5, peak=1.0, minimum=0.2) == 0.2


def test_released_schedule_by_hand() -> None:
    """CAE's: the warm-up's four steps are 0, 1/3, 2/3 and the peak, and the cosine begins at the
    peak again; from there on it is ours. One step of warm-up is at 0."""
    steps = range(12)
    ours, released = (
        [
            optim.warmup_cosine(step, total=12, warmup=4, peak=1.5, minimum=0.1, repeat_peak=twice)
            for step in steps
        ]
        for twice in (False, True)
    )
    assert released[:5] == pytest.approx([0, 0.5, 1.0, 1.5, 1.5], rel=1e-12)
    assert ours[:5] == pytest.approx([0, 0.375, 0.75, 1.125, 1.5], rel=1e-12)
    assert released[4:] == ours[4:]
    # a quarter of the way down: 0.1 + 1.4 * (1 + cos 45 degrees) / 2
    assert released[6] == pytest.approx(0.1 + 0.7 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert optim.warmup_cosine(0, total=3, warmup=1, peak=1.0, repeat_peak=True) == 0
    assert optim.warmup_cosine(0, total=3, warmup=0, peak=1.0, repeat_peak=True) == 1


def test_a_run_repeats_its_peak(tmp_path: Path) -> None:
    """One epoch of warm-up is three steps of eight pictures."""
    options = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--batch-size", "8")
    sets = ("warmup_epochs=1", "lr=0.002", "repeat_peak=true")
    fx.good(fx.train("kd", tmp_path / "run", *options, "--steps", "5", sets=sets))
    rates = [row["lr"] for row in metrics.read(tmp_path / "run")]
    assert rates[:4] == pytest.approx([0, 0.001, 0.002, 0.002], rel=1e-12)
    assert rates[4] < 0.002


def test_peak_lr() -> None:
    assert optim.peak_lr(RecipeConfig(), 1024) == pytest.approx(6e-4)
    assert optim.peak_lr(RecipeConfig(), 4096) == pytest.approx(2.4e-3)
    assert optim.peak_lr(RecipeConfig(lr=0.5), 4096) == 0.5
