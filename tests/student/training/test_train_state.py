"""The training state is run in several ways: the average of the weights, compilation, fused
attention, activation checkpointing. Each gives the numbers of the plain run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from student import checkpoint, recipes
from student.config import from_overrides
from student.models import conv_vit
from student.training import activation_checkpointing, metrics
from tests import processes
from tests import student_fixtures as fx
from tests.conftest import waves
from tests.test_end_to_end import assert_undisturbed

STEPS = ("--steps", "6", "--batch-size", "8")


def run_of(place: Path, *options: Any, recipe: str = "mralign", sets: tuple[str, ...] = ()) -> Path:
    fx.good(fx.train(recipe, place, "--cache", fx.cache_of(recipe), *STEPS, *options, sets=sets))
    return place


# --- the average of the weights -------------------------------------------------------------------


def test_the_average_by_hand(tmp_path: Path) -> None:
    """timm's warm-up: after step n the decay is min(0.5, 1 - n^(-2/3)), n = 1 being a copy; in
    float64 from the checkpoints of every step."""
    every = ("--save-every", "1", "--keep-checkpoints", "99")
    run = run_of(tmp_path / "run", "--ema", "0.5", *every)
    states = [torch.load(path, weights_only=True) for path in checkpoint.list_checkpoints(run)]
    assert len(states) == 6
    for name, value in states[0]["model"].items():
        average = value.double()
        for n, state in enumerate(states, 1):
            decay = min(0.5, 1 - n ** (-2 / 3))
            average = decay * average + (1 - decay) * state["model"][name].double()
            torch.testing.assert_close(state["ema"][name].double(), average, rtol=0, atol=1e-6)
    assert not torch.equal(states[-1]["ema"]["encoder.blocks.0.mlp.fc1.weight"],
                           states[-1]["model"]["encoder.blocks.0.mlp.fc1.weight"])  # fmt: skip


@pytest.mark.slow
def test_an_average_changes_no_number_of_the_run(tmp_path: Path) -> None:
    assert_undisturbed(run_of(tmp_path / "with", "--ema", "0.9"), run_of(tmp_path / "without"))


@pytest.mark.slow
def test_the_average_is_evaluated_where_it_is_asked_for(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "--ema", "0.5")
    plain, average = (checkpoint.load_encoder(run, ema)[0].state_dict() for ema in (False, True))
    saved = checkpoint.load_latest(run)
    assert all(torch.equal(plain[name], saved["model"][f"encoder.{name}"]) for name in plain)
    assert all(torch.equal(average[name], saved["ema"][f"encoder.{name}"]) for name in average)
    labelled = tmp_path / "labelled"
    for name, phase in (("a", 0.0), ("b", 2.0)):
        (labelled / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(waves(40, 40, phase + 0.02 * i)).save(labelled / name / f"{i}.png")
    options = ("--images", labelled, "--test", labelled, "--k", "3", "--device", "cpu", "--json")
    ran = fx.good(fx.stud("eval", "knn", run, *options, "--ema"))
    assert ran.json["ema"] is True
    assert "ema" not in fx.good(fx.stud("eval", "knn", run, *options)).json
    ran = fx.stud("eval", "knn", "--teacher", fx.TEACHER, *options, "--ema")
    assert (ran.status, "--ema" in ran.line) == (2, True)
    ran = fx.stud("eval", "knn", run_of(tmp_path / "none"), *options, "--ema")
    assert (ran.status, "keeps no average" in ran.line) == (2, True)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_average(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "--ema", "0.5", "--save-every", "3")
    (run / "checkpoints/step-00000006.pt").unlink()
    options = ("--cache", fx.cache_path(), *STEPS, "--save-every", "3", "--resume")
    ran = fx.train("mralign", run, *options)
    assert (ran.status, "ema 0.5 before, None now" in ran.line) == (1, True)
    state = torch.load(run / "checkpoints/step-00000003.pt", weights_only=True)
    torch.save({**state, "ema": {}}, run / "checkpoints/step-00000003.pt")
    ran = fx.train("mralign", run, *options, "--ema", "0.5")
    assert (ran.status, "holds no average" in ran.line) == (1, True)


@pytest.mark.parametrize("given", ["0", "1", "1.5", "x"])
def test_decays_that_are_none(given: str, tmp_path: Path) -> None:
    assert (
        fx.train(
            "mralign", tmp_path / "run", "--cache", fx.cache_path(), *STEPS, "--ema", given
        ).status
        == 2
    )


# --- activation checkpointing ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(fx.RECIPES))
def test_checkpointed_blocks_give_the_same_run_to_the_bit(recipe: str, tmp_path: Path) -> None:
    """Every recipe, drop path drawn alike in the second forward."""
    sets = ("drop_path=0.2",)
    plain = run_of(tmp_path / "plain", recipe=recipe, sets=sets)
    again = run_of(tmp_path / "again", "--checkpoint-activations", recipe=recipe, sets=sets)
    assert_undisturbed(again, plain)


def test_what_is_kept_for_the_backward_pass_shrinks() -> None:
    """Bytes that autograd saves: of four blocks their inputs remain."""
    saved = {}
    for again in (False, True):
        torch.manual_seed(0)
        settings = [*fx.RECIPES["mae"], "img_size=32", "patch_size=8"]
        recipe = recipes.load("mae")
        model = recipe.Model(from_overrides(recipe.Config, settings))
        if again:
            activation_checkpointing.apply(model)
        kept: list[int] = []

        def note(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        ids = torch.arange(16).repeat(2, 1)
        batch = {
            "images": torch.randn(2, 3, 32, 32),
            "ids_keep": ids[:, :4],
            "ids_masked": ids[:, 4:],
        }
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(batch)["loss"]
        saved[again] = sum(kept)
    assert saved[True] < saved[False] / 2


def test_every_block_is_found_by_the_names_of_the_field() -> None:
    encoder = [f"encoder.blocks.{i}" for i in range(4)]
    expected = {
        "maskalign": encoder,
        "mae": [*encoder, "decoder.decoder_blocks.0"],
        "milan": [*encoder, "decoder.decoder_blocks.0"],
        "caev2": [*encoder, "regresser.regressor_blocks.0"],
    }
    for name, names in expected.items():
        recipe = recipes.load(name)
        model = recipe.Model(
            from_overrides(recipe.Config, [*fx.RECIPES[name], "img_size=32", "patch_size=8"])
        )
        assert list(activation_checkpointing.blocks(model)) == names
    assert activation_checkpointing.blocks(nn.Sequential(nn.Linear(2, 2))) == {}


def test_masked_convolutions_are_checkpointed_too() -> None:
    """Two blocks in each of two stages and four after them, and the same gradients to the bit."""
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        net = conv_vit.build(
            "tiny,depth=4,stage1=8,stage2=8,embed_dim=16,num_heads=2", img_size=32, patch_size=8
        )
        names = [
            f"blocks{stage}.{i}" for stage, count in ((1, 2), (2, 2), (3, 4)) for i in range(count)
        ]
        assert list(activation_checkpointing.blocks(net)) == names
        if again:
            activation_checkpointing.apply(net)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        outputs, _ = net.encode(images, torch.tensor([[0, 3, 7], [1, 2, 15]]))
        outputs[-1].square().mean().backward()
        found[again] = {
            name: each.grad for name, each in net.named_parameters() if each.grad is not None
        }
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], grad) for name, grad in found[False].items())


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("recipe", sorted(fx.RECIPES))
def test_attention_is_torchs_fused_one(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called for every block of the student, and no softmax is written out beside it."""
    calls: list[int] = []
    plain = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return plain(*args, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("an attention was written out")

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(torch.Tensor, "softmax", refused)
    fx.good(
        fx.train(
            recipe,
            tmp_path / "run",
            "--cache",
            fx.cache_of(recipe),
            "--steps",
            "1",
            "--batch-size",
            "8",
        )
    )
    assert len(calls) >= 4


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_run_equals_the_plain_one(tmp_path: Path) -> None:
    """To rounding, with the same drop path. In its own process."""
    options = ("--cache", fx.cache_path(), *STEPS)
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        ran = processes.train(1, *options, "--out", tmp_path / name, *more, recipe="mralign")
        processes.good(ran)
    one, two = (np.array(fx.losses(tmp_path / name)) for name in ("plain", "compiled"))
    assert np.abs(one - two).max() <= 1e-4 * one.min()
    assert (one != two).any()  # it was compiled
    assert fx.weights(tmp_path / "compiled").keys() == fx.weights(tmp_path / "plain").keys()
    assert checkpoint.read_config(tmp_path / "compiled")["running"]["compiled"] is True


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path: Path) -> None:
    """Drop path on; and with the average, clipping, bf16 and two micro-batches besides."""
    options = (
        "--cache",
        fx.cache_path(),
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--accumulate",
        "2",
        "--save-every",
        "3",
    )
    ways = ("--compile", "--ema", "0.9", "--precision", "bf16")
    for name in ("whole", "cut"):
        ran = processes.train(
            1, *options, *ways, "--out", tmp_path / name, recipe="mralign", sets=("clip_grad=1.0",)
        )
        processes.good(ran)
    (tmp_path / "cut/checkpoints/step-00000006.pt").unlink()
    more = ("--out", tmp_path / "cut", "--resume")
    processes.good(
        processes.train(1, *options, *ways, *more, recipe="mralign", sets=("clip_grad=1.0",))
    )
    assert_undisturbed(tmp_path / "cut", tmp_path / "whole")
    assert len(metrics.read(tmp_path / "cut")) == 6


@pytest.mark.slow
def test_the_way_of_running_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    """Memory got short: the rest of the run recomputes its blocks, and nothing else changes."""
    whole = run_of(tmp_path / "whole", "--save-every", "3")
    run = run_of(tmp_path / "run", "--save-every", "3")
    (run / "checkpoints/step-00000006.pt").unlink()
    options = (
        "--cache",
        fx.cache_path(),
        *STEPS,
        "--save-every",
        "3",
        "--resume",
        "--checkpoint-activations",
    )
    fx.good(fx.train("mralign", run, *options))
    assert_undisturbed(run, whole)
