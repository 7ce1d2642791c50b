"""Drop path is drawn for every sample of a step, and taken from the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm.layers
import torch
from torch import nn
from torch._dynamo.utils import counters

from featcache import rng
from student.models import beit, conv_vit, drop_path, vit
from student.models.latent_regressor import LatentRegressor
from student.training import activation_checkpointing
from tests.student.recipes.test_recipes import TINY_SETTINGS, tiny_batch, tiny_model

RATES = (0.25, 0.5, 0.75)


def test_draws_are_halves_of_philox_words_of_seed_step_and_position() -> None:
    """Kept where the high half (first encoding) or the low one (second) is not below the rate."""
    kept = drop_path.draw(RATES, 5, 7, np.array([3, 11]))
    assert (kept.shape, kept.dtype) == ((2, 3, 2), np.bool_)
    for row, position in enumerate((3, 11)):
        words = rng.words(
            rng.key_digests(["drop_path"]), rng.stream("drop_path", 5), 3, view=position, epoch=7
        )[0]
        for n, word in enumerate(words.tolist()):
            assert kept[row, n, 0] == ((word >> 32) / 2**32 >= RATES[n])
            assert kept[row, n, 1] == ((word & 0xFFFFFFFF) / 2**32 >= RATES[n])


def test_draws_of_a_sample_know_nothing_of_the_others() -> None:
    whole = drop_path.draw(RATES, 0, 4, np.arange(16))
    for first in (0, 8):
        part = drop_path.draw(RATES, 0, 4, np.arange(first, first + 8))
        np.testing.assert_array_equal(part, whole[first : first + 8])
    others = [drop_path.draw(RATES, seed, step, np.arange(16)) for seed, step in ((1, 4), (0, 5))]
    assert all((other != whole).any() for other in others)


def test_shares_are_those_of_the_rates_and_branches_are_independent() -> None:
    """20,000 samples: within four standard errors (0.0035 at a half)."""
    kept = drop_path.draw((0.1, 0.5, 0.5, 0.9), 0, 0, np.arange(20_000))
    np.testing.assert_allclose(
        kept.mean(0), [[0.9] * 2, [0.5] * 2, [0.5] * 2, [0.1] * 2], atol=0.015
    )
    flat = kept.reshape(len(kept), -1).astype(float)
    correlation = np.corrcoef(flat, rowvar=False) - np.eye(8)
    assert np.abs(correlation).max() < 0.03


def test_kept_samples_are_divided_by_the_keep_probability_and_dropped_ones_are_zero() -> None:
    model = nn.Sequential(drop_path.branch(0.75), drop_path.branch(0.5))
    assert drop_path.attach(Whole(model)) == (0.75, 0.5)
    draws = model[0].draws
    draws.kept = torch.tensor([[[1, 0], [1, 0]], [[0, 1], [1, 0]], [[1, 0], [0, 1]]]).bool()
    x = torch.arange(1.0, 7.0).view(3, 2, 1)
    assert model(x).flatten().tolist() == [8, 16, 0, 0, 0, 0]  # x / 0.25 / 0.5
    assert model[0](x.double()).dtype == torch.float64
    drop_path.use_encoding(model, 1)
    assert model[1](x).flatten().tolist() == [0, 0, 0, 0, 10, 12]
    assert torch.equal(model.eval()(x), x)


def test_a_batch_of_timms_draws_gives_timms_numbers() -> None:
    """The same decisions, taken from timm's own: equal to the bit in every precision."""
    ours, theirs = drop_path.DropPath(0.3), timm.layers.DropPath(0.3)
    ours.draws = drop_path.Draws()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            expected = theirs(x)
        kept = expected.flatten(1).any(1)
        assert 0 < kept.sum() < 64
        ours.draws.kept = kept[:, None, None]
        assert torch.equal(ours(x), expected)


class Whole(nn.Module):
    """A recipe's model: it takes a batch."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.part(batch["images"])


@pytest.mark.parametrize("given", [False, True])
def test_without_draws_torchs_generator_draws_as_for_timms_module(given: bool) -> None:
    """Outside the trainer, and with a batch that brings none, also after one that did."""
    model = Whole(drop_path.branch(0.5))
    batch = {"images": torch.ones(32, 2)}
    if given:
        drop_path.attach(model)
        model(batch | {"drop_path": torch.ones(32, 1, 2, dtype=torch.bool)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        seen = model(batch)
        torch.manual_seed(3)
        assert torch.equal(seen, timm.layers.DropPath(0.5)(batch["images"]))


def test_encoders_have_no_drop_path_of_timms_own() -> None:
    small = "depth=3,embed_dim=48,num_heads=3"
    models = [
        vit.build(f"tiny,{small}", img_size=32, drop_path=0.2),
        beit.build("tiny,depth=3", "cae", img_size=32, drop_path=0.2),
        conv_vit.build(f"tiny,{small},stage1=8,stage2=8", img_size=32, drop_path=0.2),
        LatentRegressor(96, 3, 12, 0.2, final_norm=False),
    ]
    for model, branches in zip(models, (4, 4, 12, 4), strict=True):
        kinds = [type(m) for m in model.modules() if isinstance(m, timm.layers.DropPath)]
        assert kinds == [drop_path.DropPath] * branches
        rates = drop_path.attach(model)
        assert len(rates) == branches
        assert max(rates) == pytest.approx(0.2)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("name", sorted(TINY_SETTINGS))
def test_a_recipe_is_a_function_of_weights_and_batch(name: str) -> None:
    """Torch's generator has no say, each sample's draws are its own, and blocks that are computed
    again draw alike."""
    model, _ = tiny_model(name, "drop_path=0.5")
    rates = drop_path.attach(model)
    kept = torch.from_numpy(drop_path.draw(rates, 0, 0, np.arange(2)))
    batch = tiny_batch() | {"drop_path": kept}
    losses = {}
    for way in ("plain", "other seed", "again"):
        torch.manual_seed(len(losses))
        each = copy.deepcopy(model)
        if way == "again":
            activation_checkpointing.apply(each)
        loss = each(batch)["loss"]
        loss.backward()
        gradients = [p.grad for p in each.parameters() if p.grad is not None]
        losses[way] = [loss.detach(), *gradients]
    for way in ("other seed", "again"):
        assert all(map(torch.equal, losses["plain"], losses[way]))
    flipped = kept.clone()
    flipped[1] = ~flipped[1]
    assert model(batch | {"drop_path": flipped})["loss"] != losses["plain"][0]


def test_the_second_encoding_of_cae_has_draws_of_its_own() -> None:
    model, batch = tiny_model("cae", "drop_path=0.5")[0], tiny_batch()
    rates = drop_path.attach(model)
    kept = torch.ones(2, len(rates), 2, dtype=torch.bool)
    plain = model(batch | {"drop_path": kept})
    second = kept.clone()
    second[:, :, 1] = False
    other = model(batch | {"drop_path": second})
    assert other["token"] == plain["token"]
    assert other["align"] != plain["align"]
    first = kept.clone()
    first[:, :, 0] = False
    assert model(batch | {"drop_path": first})["token"] != plain["token"]


def test_no_drop_path_no_hook() -> None:
    model = Whole(vit.build("tiny,depth=2,embed_dim=48,num_heads=3", img_size=32))
    assert drop_path.attach(model) == ()
    assert not model._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_compiled_model_is_one_graph_and_draws_alike(again: bool) -> None:
    """CAE, which encodes twice: steps differ in their draws alone, and nothing is compiled anew."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (tiny_model("cae", "drop_path=0.5")[0].float() for _ in range(2))
    rates = drop_path.attach(plain)
    assert drop_path.attach(compiled) == rates
    if again:
        activation_checkpointing.apply(compiled)
    compiled.compile(backend="aot_eager")
    batch = {name: x.float() if x.is_floating_point() else x for name, x in tiny_batch().items()}
    for step in range(3):
        kept = torch.from_numpy(drop_path.draw(rates, 0, step, np.arange(2)))
        one, two = (model(batch | {"drop_path": kept})["loss"] for model in (plain, compiled))
        one.backward()
        two.backward()
        assert one == two
    for mine, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, other.grad)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_what_draws_for_a_process_is_named() -> None:
    model = nn.Sequential(
        nn.Dropout(0.1), nn.Dropout(0.0), nn.Dropout2d(0.2), timm.layers.DropPath(0.3),
        timm.layers.DropPath(0.0), drop_path.DropPath(0.4),
    )  # fmt: skip
    assert drop_path.process_draws(model) == ["0", "2", "3"]
