"""The attentive probe is tested: its pool against CAE's formula in numpy's float64, values and
gradients, and whole probes on toys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import UsageError, UserError
from student.evals import attentive
from student.evals.attentive import AttentivePool
from student.features import scores
from student.features.task import Outcome
from student.training.probe import Head
from tests.student import toy_task as toys

F64 = np.ndarray


def layer_norm(x: F64, weight: F64, bias: F64) -> F64:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def reference(values: dict[str, F64], tokens: F64, heads: int) -> F64:
    """CAE's block as it is written: keys and values of every token, head by head."""
    batch, count, width = tokens.shape
    d = width // heads
    norms = {n: (values[f"norm_{n}.weight"], values[f"norm_{n}.bias"]) for n in "qkv"}
    q = values["q.weight"] @ layer_norm(values["query"], *norms["q"]) + values["q.bias"]
    pooled = np.zeros((batch, width))
    for b in range(batch):
        k = layer_norm(tokens[b], *norms["k"]) @ values["k.weight"].T
        v = layer_norm(tokens[b], *norms["v"]) @ values["v.weight"].T + values["v.bias"]
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            logits = np.array([q[own] @ k[t, own] for t in range(count)]) / math.sqrt(d)
            weights = np.exp(logits - logits.max())
            pooled[b, own] = weights / weights.sum() @ v[:, own]
    return pooled @ values["proj.weight"].T + values["proj.bias"]


def differences(loss: Callable[[], float], array: F64, step: float = 1e-5) -> F64:
    """Central differences of a loss in every entry of an array, which is changed and put back."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = loss()
        array[index] = kept - step
        gradient[index] = (above - loss()) / (2 * step)
        array[index] = kept
    return gradient


def random_pool(width: int, heads: int) -> tuple[AttentivePool, dict[str, F64]]:
    """A pool whose every parameter is drawn anew, and the values as numpy's float64."""
    draw = np.random.default_rng(0)
    pool = AttentivePool(width, heads, seed=0).double()
    for parameter in pool.parameters():
        parameter.data = torch.from_numpy(draw.normal(0.3, 0.7, tuple(parameter.shape)))
    return pool, {name: p.detach().numpy().copy() for name, p in pool.named_parameters()}


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(8, 2), (6, 1), (6, 6)])
def test_values_and_gradients_are_those_of_caes_formula(width: int, heads: int) -> None:
    """For the loss <direction, pool(tokens)>, by central differences of the formula."""
    pool, values = random_pool(width, heads)
    draw = np.random.default_rng(1)
    tokens, direction = draw.normal(0.5, 2.0, (3, 5, width)), draw.normal(size=(3, width))
    given = torch.from_numpy(tokens.copy()).requires_grad_()
    out = pool(given)
    np.testing.assert_allclose(out.detach(), reference(values, tokens, heads), rtol=1e-12)

    (out * torch.from_numpy(direction)).sum().backward()

    def loss() -> float:
        return float((reference(values, tokens, heads) * direction).sum())

    assert set(values) == {
        "query", "q.weight", "q.bias", "k.weight", "v.weight", "v.bias", "proj.weight", "proj.bias",
        *(f"norm_{n}.{part}" for n in "qkv" for part in ("weight", "bias")),
    }  # fmt: skip
    for name, parameter in pool.named_parameters():
        want = differences(loss, values[name])
        np.testing.assert_allclose(parameter.grad, want, rtol=1e-6, atol=1e-7, err_msg=name)
        if name != "norm_k.bias":  # the same for every token
            assert np.abs(want).max() > 1e-3, name
    np.testing.assert_allclose(given.grad, differences(loss, tokens), rtol=1e-6, atol=1e-7)


def test_numbers_by_hand() -> None:
    """Norms turn the tokens (3, 1) and (0, 4) into (1, -1) and (-1, 1), the query (5, 3) into (1,
    -1); the logits are 2 / sqrt 2 and -2 / sqrt 2, so that the values have the weight of
    tanh(sqrt 2) = 0.888386 together."""
    pool = AttentivePool(2, 1, seed=0)
    with torch.no_grad():
        pool.query.copy_(torch.tensor([5.0, 3.0]))
        for linear in (pool.q, pool.k, pool.v):
            linear.weight.copy_(torch.eye(2))
        pool.proj.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        pool.proj.bias.copy_(torch.tensor([0.5, -0.5]))
    out = pool(torch.tensor([[[3.0, 1.0], [0.0, 4.0]]]))
    np.testing.assert_allclose(out.detach(), [[2.276771, -3.165157]], atol=5e-6)


def test_single_precision_is_near() -> None:
    pool, values = random_pool(32, 4)
    tokens = np.random.default_rng(2).normal(size=(4, 50, 32))
    out = pool.float()(torch.from_numpy(tokens).float())
    want = reference(values, tokens, 4)
    assert np.abs(out.detach().numpy() - want).max() < 1e-5 * np.abs(want).max()


def test_it_starts_as_a_mean_of_the_tokens_with_a_steep_query() -> None:
    """A query of 0 has variance 0: its norm divides by sqrt(1e-6), a gradient 1,000 times over."""
    pool = AttentivePool(16, 4, seed=0).double()
    draw = np.random.default_rng(3)
    tokens, direction = draw.normal(size=(2, 9, 16)), torch.from_numpy(draw.normal(size=(2, 16)))
    values = {name: p.detach().numpy() for name, p in pool.named_parameters()}
    normed = layer_norm(tokens, np.ones(16), np.zeros(16)).mean(1)
    out = pool(torch.from_numpy(tokens))
    want = normed @ values["v.weight"].T @ values["proj.weight"].T
    np.testing.assert_allclose(out.detach(), want, rtol=1e-12, atol=1e-15)
    (out * direction).sum().backward()
    inner = pool.norm_q.bias.grad
    assert inner is not None
    assert inner.abs().max() > 0
    torch.testing.assert_close(pool.query.grad, 1000 * (inner - inner.mean()))


def test_the_start_comes_from_the_seed_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, same, other = (AttentivePool(64, 4, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (_, b), (_, c) in zip(
        one.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b)
        linear = name in ("q.weight", "k.weight", "v.weight", "proj.weight")
        assert torch.equal(a, c) != linear
        if linear:
            assert a.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (a == (1.0 if name.endswith("weight") else 0.0)).all()
    assert not torch.equal(one.k.weight, one.v.weight)


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    for heads in (5, 0, -1, 24):
        with pytest.raises(UsageError, match=r"into -?\d+ equal parts, .* --heads; give one of 1"):
            AttentivePool(12, heads, 0)


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(RuntimeError):
        AttentivePool(12, 3, 0)(torch.zeros(2, 5, 8))
    with pytest.raises(RuntimeError):
        AttentivePool(12, 3, 0)(torch.zeros(2, 5, 1))


# --- whole probes ---------------------------------------------------------------------------------


def probed(task: toys.ToyTask, **options: Any) -> Outcome:
    settings = {
        "epochs": 40, "warmup_epochs": 4, "batch_size": 20, "blr": "1.28", "train_views": 0,
    }  # fmt: skip
    return attentive.evaluate(task, **{**settings, **options})


def test_classes_that_one_patch_tells_are_separated() -> None:
    outcome = probed(toys.toy_task())
    assert scores.of_test(outcome.scored[0])["top1"] > 90  # of 40 pictures in 5 classes
    facts = dict(outcome.facts)
    assert facts.pop("train_loss") < 0.1  # ln 5 = 1.61 at the start
    assert json.loads(json.dumps(facts)) == {
        "pool": "attentive", "heads": 12, "tokens": "all", "epochs": 40, "lr": 0.1, "blr": 1.28,
        "batch_size": 20, "warmup_epochs": 4, "train_views": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_the_attention_finds_the_patch() -> None:
    """Classes are told by patch 1 alone, token 2 of four."""
    task = toys.toy_task(gap=6.0)
    outcome = probed(task, heads=2, epochs=100)
    assert outcome.head is not None
    assert outcome.facts["heads"] == 2
    pool = AttentivePool(12, 2, seed=0)
    names = dict(pool.named_parameters())
    pool.load_state_dict({name: outcome.head[f"pool.{name}"] for name in names})
    (tokens,), _ = task.tokens(task.tests[0], stage="test")
    given = torch.from_numpy(tokens).float()
    weights = pool._weights(torch.nn.functional.layer_norm(given, (12,), eps=1e-6))
    share = weights.mean((0, 1))
    assert share.argmax() == 2
    assert share[2] > 0.4  # a quarter at the start


def test_tokens_without_classes_stay_at_chance() -> None:
    outcome = probed(toys.toy_task(gap=0.0))
    assert scores.of_test(outcome.scored[0])["top1"] < 45


def test_patches_alone_are_attended_to() -> None:
    """A [CLS] that is not finite reaches the probe of all tokens only."""

    class Broken(toys.ToyTask):
        def tokens(self, *given: Any, **options: Any) -> Any:
            tokens, labels = super().tokens(*given, **options)
            for each in tokens:
                each[:, 0] = np.nan
            return tokens, labels

    whole = toys.toy_task()
    broken = Broken(whole.frozen, whole.train, whole.tests, whole.names, centres=whole.centres)
    alone = probed(whole, tokens="patches", epochs=5)
    same = probed(broken, tokens="patches", epochs=5)
    assert torch.equal(alone.scored[0].scores, same.scored[0].scores)
    assert alone.facts["tokens"] == "patches"
    all_tokens = probed(whole, epochs=5)
    assert not torch.equal(alone.scored[0].scores, all_tokens.scored[0].scores)
    with pytest.raises(UserError, match="the attentive probe diverged: loss in epoch 0 is nan"):
        probed(broken, epochs=5)


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


def test_the_head_and_its_steps_are_caes() -> None:
    """BatchNorm eps 1e-5, a Linear layer from N(0, 0.01), m <- 0.9 m + g and w <- w - lr (g + 0.9
    m): with a gradient of 1 at each step, m is 1, 1.9, 2.71 and the step 1.9, 2.71, 3.439 of lr."""
    seen: list[Head] = []

    def kept(head: Head) -> torch.optim.SGD:
        seen.append(head)
        return made(head)

    made, attentive.nesterov = attentive.nesterov, kept
    try:
        probed(toys.toy_task(width=384, classes=40), epochs=1, warmup_epochs=0, blr="1e-9")
    finally:
        attentive.nesterov = made
    (head,) = seen
    assert (head.norm.eps, head.norm.affine, head.norm.momentum) == (1e-5, False, 0.1)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.03)
    optimizer = made(head)
    before = [parameter.detach().clone() for parameter in head.parameters()]
    moved = 0.0
    for lr, step in ((0.5, 1.9), (0.25, 2.71), (1.0, 3.439)):
        moved += lr * step
        for parameter in head.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for parameter, start in zip(head.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), start - moved)


def test_the_rate_ends_at_a_millionth(monkeypatch: pytest.MonkeyPatch) -> None:
    """lr 0.4 at CAE's batch of 8,192; 100 pictures in one batch, three epochs without warm-up: the
    peak 0.0125 * 100 / 256, three quarters and a quarter of the way to 1e-6."""
    rates: list[float] = []
    made = attentive.nesterov

    def recorded(head: Head) -> torch.optim.SGD:
        optimizer = made(head)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(attentive, "nesterov", recorded)
    defaults = {name: default for name, (default, _) in attentive.OPTIONS.items()}
    assert 8192 / 256 * float(defaults["blr"]) == pytest.approx(0.4)
    assert (defaults["epochs"], defaults["warmup_epochs"]) == (90, 10)
    options = {**defaults, "epochs": 3, "warmup_epochs": 0, "train_views": 0}
    attentive.evaluate(toys.toy_task(), **options)
    peak = 0.0125 * 100 / 256
    want = [peak, 1e-6 + (peak - 1e-6) * 0.75, 1e-6 + (peak - 1e-6) * 0.25]
    assert rates == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "width 12 into 5 equal parts, one for each of --heads"),
        ({"tokens": "cls"}, "unknown tokens 'cls'"),
        ({"batch_size": 1}, "cannot train the attentive probe with batches of 1"),
        ({"epochs": 0}, "0 epochs with 4 of warm-up"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        probed(toys.toy_task(), **options)
