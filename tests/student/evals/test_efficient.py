"""The efficient probe is tested: its pool against the paper's formula in numpy's float64, values
and gradients, and whole probes on toys."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import UsageError
from student.evals import efficient
from student.evals.efficient import EfficientPool
from student.features import scores
from student.features.task import Outcome
from student.training.optim import lars
from tests.student import toy_task as toys

F64 = np.ndarray


def reference(queries: F64, weight: F64, tokens: F64) -> tuple[F64, F64]:
    """The pooled tokens (B,D) and the attention (B,M,T), picture by picture."""
    pooled, attention = [], []
    for x in tokens:
        logits = queries @ x.T / math.sqrt(x.shape[1])
        a = np.exp(logits - logits.max(1, keepdims=True))
        a /= a.sum(1, keepdims=True)
        parts = np.split(x @ weight.T, len(queries), axis=1)
        pooled.append(np.concatenate([a_m @ v_m for a_m, v_m in zip(a, parts, strict=True)]))
        attention.append(a)
    return np.stack(pooled), np.stack(attention)


def gradients(queries: F64, weight: F64, tokens: F64, direction: F64) -> tuple[F64, F64, F64]:
    """Of <direction, pooled> by hand. With g the part of the direction of query m and z = V_m g:
    dL/da = z, dL/dlogits = a * (z - a.z), and x takes part as key, through q, and as value."""
    _, attention = reference(queries, weight, tokens)
    d_queries, d_weight, d_tokens = (np.zeros_like(each) for each in (queries, weight, tokens))
    scale, d = 1 / math.sqrt(tokens.shape[2]), tokens.shape[2] // len(queries)
    for b, x in enumerate(tokens):
        for m, query in enumerate(queries):
            own = slice(m * d, (m + 1) * d)
            g, a, w = direction[b, own], attention[b, m], weight[own]
            z = x @ w.T @ g
            d_logits = a * (z - a @ z)
            d_queries[m] += scale * d_logits @ x
            d_weight[own] += np.outer(g, a @ x)
            d_tokens[b] += scale * np.outer(d_logits, query) + np.outer(a, g @ w)
    return d_queries, d_weight, d_tokens


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "queries"), [(8, 4), (6, 1), (6, 6)])
def test_values_and_gradients_are_those_of_the_formula(width: int, queries: int) -> None:
    draw = np.random.default_rng(0)
    pool = EfficientPool(width, queries, seed=0).double()
    for parameter in pool.parameters():
        parameter.data = torch.from_numpy(draw.normal(0.2, 1.5, tuple(parameter.shape)))
    assert {name for name, _ in pool.named_parameters()} == {"queries", "v.weight"}
    values = pool.queries.detach().numpy(), pool.v.weight.detach().numpy()
    tokens, direction = draw.normal(0.5, 1.0, (3, 7, width)), draw.normal(size=(3, width))
    given = torch.from_numpy(tokens).requires_grad_()
    out = pool(given)
    np.testing.assert_allclose(out.detach(), reference(*values, tokens)[0], rtol=1e-12)
    (out * torch.from_numpy(direction)).sum().backward()
    got = pool.queries.grad, pool.v.weight.grad, given.grad
    for mine, want in zip(got, gradients(*values, tokens, direction), strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-10, atol=1e-12)


def test_numbers_by_hand() -> None:
    """Two tokens, (1, 0) and (0, 1), have the values (1, 3) and (2, 4). The first query looks at
    them by 3 to 1 and takes the first of a value: 0.75 * 1 + 0.25 * 2; the other looks at both
    alike and takes the second: 0.5 * 3 + 0.5 * 4."""
    pool = EfficientPool(2, 2, seed=0)
    with torch.no_grad():
        pool.queries.copy_(torch.tensor([[math.sqrt(2) * math.log(3), 0.0], [0.0, 0.0]]))
        pool.v.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    out = pool(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    np.testing.assert_allclose(out.detach(), [[1.25, 3.5]], rtol=1e-6)


def test_single_precision_is_near() -> None:
    draw = np.random.default_rng(1)
    pool = EfficientPool(64, 32, seed=0)
    tokens = draw.normal(0, 3, (4, 50, 64)).astype(np.float32)
    values = (p.detach().numpy().astype(np.float64) for p in pool.parameters())
    want, _ = reference(*values, tokens.astype(np.float64))
    got = pool(torch.from_numpy(tokens)).detach().numpy()
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_the_start_comes_from_the_seed_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, same, other = (EfficientPool(64, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert one.queries.std().item() == pytest.approx(0.02, rel=0.05)
    # uniform within 1 / sqrt(64), whose standard deviation is that / sqrt(3)
    assert one.v.weight.abs().max().item() == pytest.approx(0.125, rel=0.01)
    assert one.v.weight.std().item() == pytest.approx(0.125 / math.sqrt(3), rel=0.02)


def test_queries_that_do_not_share_the_width_are_refused() -> None:
    for queries in (5, 0, -1, 24):
        with pytest.raises(
            UsageError, match=r"into -?\d+ equal parts, .* --queries; give one of 1"
        ):
            EfficientPool(12, queries, 0)


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(RuntimeError):
        EfficientPool(12, 3, 0)(torch.zeros(2, 5, 8))
    with pytest.raises(RuntimeError):
        EfficientPool(12, 3, 0)(torch.zeros(2, 5, 1))


# --- whole probes ---------------------------------------------------------------------------------


def probed(task: toys.ToyTask, **options: Any) -> Outcome:
    settings = {
        "epochs": 40, "warmup_epochs": 4, "batch_size": 10, "blr": "128", "train_views": 0,
        "queries": 4,
    }  # fmt: skip
    return efficient.evaluate(task, **{**settings, **options})


@pytest.mark.slow
def test_classes_that_one_patch_tells_are_separated() -> None:
    outcome = probed(toys.toy_task())
    assert scores.of_test(outcome.scored[0])["top1"] == 100.0
    facts = dict(outcome.facts)
    assert facts.pop("train_loss") < 0.5  # ln 5 = 1.61 at the start
    assert json.loads(json.dumps(facts)) == {
        "pool": "efficient", "queries": 4, "tokens": "patches", "epochs": 40, "lr": 5.0,
        "blr": 128.0, "batch_size": 10, "warmup_epochs": 4, "train_views": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_tokens_without_classes_stay_at_chance() -> None:
    outcome = probed(toys.toy_task(gap=0.0))
    assert scores.of_test(outcome.scored[0])["top1"] < 45


def test_cls_is_attended_to_when_asked_for() -> None:
    task = toys.toy_task()
    patches, every = (probed(task, tokens=name, epochs=5) for name in ("patches", "all"))
    assert not torch.equal(patches.scored[0].scores, every.scored[0].scores)
    assert every.facts["tokens"] == "all"
    # the same head on tokens of which the first is left out by hand
    head = efficient.efficient_head(12, 5, 4, task.seed)
    assert patches.head is not None
    head.load_state_dict(dict(patches.head))
    (tokens,), _ = task.tokens(task.tests[0], stage="test")
    want = head.eval()(torch.from_numpy(tokens[:, 1:]).float())
    torch.testing.assert_close(patches.scored[0].scores, want.detach())


def test_the_same_seed_gives_the_same_bits() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))  # the global generator has no say
        runs.append(probed(toys.toy_task(gap=0.5, seed=seed), epochs=5))
    assert runs[0].facts == runs[1].facts
    heads = [run.head for run in runs]
    assert heads[0] is not None
    assert heads[1] is not None
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert torch.equal(runs[0].scored[0].scores, runs[1].scored[0].scores)
    assert not torch.equal(runs[0].scored[0].scores, runs[2].scored[0].scores)


def test_the_head_starts_as_torchs_linear_layer_does() -> None:
    state = torch.get_rng_state()
    head = efficient.efficient_head(256, 1000, 32, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    # uniform within 1 / sqrt(256), whose standard deviation is that / sqrt(3)
    for parameter in (head.linear.weight, head.linear.bias):
        assert parameter.abs().max().item() == pytest.approx(0.0625, rel=0.01)
        assert parameter.std().item() == pytest.approx(0.0625 / math.sqrt(3), rel=0.05)
    assert (head.norm.eps, head.norm.affine, head.norm.momentum) == (1e-6, False, 0.1)
    # MAE-B's released log: 1,383,400 parameters for ViT-B and 1,000 classes
    whole = efficient.efficient_head(768, 1000, 32, seed=0)
    assert sum(parameter.numel() for parameter in whole.parameters()) == 1_383_400


def test_a_step_moves_each_matrix_by_a_share_of_its_length() -> None:
    """0.001 * lr of its length whatever the gradient's; the bias by lr times its gradient."""
    head = efficient.efficient_head(8, 3, 4, seed=0)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    assert set(before) == {"pool.queries", "pool.v.weight", "linear.weight", "linear.bias"}
    for scale, parameter in enumerate(head.parameters()):
        parameter.grad = torch.full_like(parameter, 10.0**scale)
    optimizer = lars(head)
    for group in optimizer.param_groups:
        group["lr"] = 3.0
    optimizer.step()
    for name, parameter in head.named_parameters():
        moved = before[name] - parameter.detach()
        want = 3 * parameter.grad if name == "linear.bias" else 0.003 * before[name].norm()
        if name == "linear.bias":
            torch.testing.assert_close(moved, want)
        else:
            torch.testing.assert_close(moved.norm(), want, rtol=1e-4, atol=0)
            assert moved.min() > 0


def test_a_rate_too_small_for_few_pictures_is_told() -> None:
    options = {"epochs": 2, "warmup_epochs": 0, "batch_size": 100}
    note = probed(toys.toy_task(), **options, blr="0.256").facts["note"]
    assert note.startswith("the head could move only 0.0015 of its own length: --blr 0.256")
    assert "note" not in probed(toys.toy_task(), **options, blr="512").facts


def test_defaults_are_the_released_ones() -> None:
    assert {name: default for name, (default, _) in efficient.OPTIONS.items()} == {
        "epochs": 90, "blr": "0.1", "batch_size": 4096, "warmup_epochs": 10, "train_views": None,
        "queries": 32, "tokens": "patches",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 32}, "width 12 into 32 equal parts, one for each of --queries; give one of 1"),
        ({"tokens": "cls"}, "unknown tokens 'cls'"),
        ({"batch_size": 1}, "cannot train the efficient probe with batches of 1"),
        ({"blr": "0"}, "base learning rate of 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probed(toys.toy_task(), **options)
