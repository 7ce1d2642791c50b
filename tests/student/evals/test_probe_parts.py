"""The head of a probe, its loss and LARS are tested together: three steps of training against
numpy's float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featcache import rng
from featcache.errors import UsageError
from student.evals import linear
from student.training.optim import lars
from student.training.probe import Head, check_parts, parse_tokens
from tests.student import toy_task as toys

F64 = np.ndarray
EPS = 1e-6


def batch_norm(x: F64) -> tuple[F64, F64]:
    """Normalised features by the batch's biased variance, and 1 / sqrt(variance + eps)."""
    centred = x - x.mean(0)
    scale = 1 / np.sqrt((centred**2).mean(0) + EPS)
    return centred * scale, scale


def back_through(normed: F64, scale: F64, gradient: F64) -> F64:
    """The gradient in the features: what moves a column's mean or its length is taken out."""
    own = gradient - gradient.mean(0) - normed * (gradient * normed).mean(0)
    return scale * own


class Reference:
    """MAE's head and LARS in float64, with the gradient of the mean cross-entropy by hand."""

    def __init__(self, weight: F64, classes: int) -> None:
        self.weight, self.bias = weight.astype(np.float64), np.zeros(classes)
        self.momentum_w, self.momentum_b = np.zeros_like(self.weight), np.zeros(classes)
        self.mean, self.var = np.zeros(weight.shape[1]), np.ones(weight.shape[1])

    def step(self, x: F64, labels: F64, lr: float) -> tuple[float, F64, F64, F64]:
        """Train a step; return the loss and its gradients in weight, bias and features."""
        n = len(x)
        normed, scale = batch_norm(x)
        logits = normed @ self.weight.T + self.bias
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(p[np.arange(n), labels]).mean()
        d_logits = (p - np.eye(len(self.bias))[labels]) / n
        d_weight, d_bias = d_logits.T @ normed, d_logits.sum(0)
        d_x = back_through(normed, scale, d_logits @ self.weight)

        q = 0.001 * np.sqrt((self.weight**2).sum() / (d_weight**2).sum())
        self.momentum_w = 0.9 * self.momentum_w + q * d_weight
        self.momentum_b = 0.9 * self.momentum_b + d_bias
        self.weight = self.weight - lr * self.momentum_w
        self.bias = self.bias - lr * self.momentum_b
        # running statistics: a tenth of the new ones, whose variance is unbiased
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.var = 0.9 * self.var + 0.1 * x.var(0) * n / (n - 1)
        return float(loss), d_weight, d_bias, d_x

    def scores(self, x: F64) -> F64:
        return (x - self.mean) / np.sqrt(self.var + EPS) @ self.weight.T + self.bias


def test_three_steps_of_the_head_are_those_of_float64() -> None:
    draw = np.random.default_rng(0)
    n, width, classes = 12, 5, 3
    head = Head(width, classes, seed=0).double()
    optimizer = lars(head)
    mine = Reference(head.linear.weight.detach().numpy(), classes)
    head.train()
    for step, lr in enumerate((3.0, 40.0, 20.0)):
        x, labels = draw.normal(2 * step, 1.0 + step, (n, width)), draw.integers(0, classes, n)
        given = torch.from_numpy(x).requires_grad_()
        loss = F.cross_entropy(head(given), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        want_loss, d_weight, d_bias, d_x = mine.step(x, labels, lr)
        assert loss.item() == pytest.approx(want_loss, rel=1e-9)
        for got, want in (
            (head.linear.weight.grad, d_weight),
            (head.linear.bias.grad, d_bias),
            (given.grad, d_x),
            (head.linear.weight.detach(), mine.weight),
            (head.linear.bias.detach(), mine.bias),
            (head.norm.running_mean, mine.mean),
            (head.norm.running_var, mine.var),
        ):
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-11, err_msg=f"step {step}")
    head.eval()
    x = draw.normal(size=(7, width))
    np.testing.assert_allclose(head(torch.from_numpy(x)).detach(), mine.scores(x), rtol=1e-8)


def test_a_whole_linear_probe_is_that_of_float64() -> None:
    """100 pictures in two batches of 50, three epochs: learning rates 0 and half the peak of 8,
    then a half cosine over four steps."""
    task = toys.toy_task(gap=0.5, classes=3, width=4, seed=7)
    outcome = linear.evaluate(
        task, epochs=3, blr="40.96", batch_size=50, warmup_epochs=1, train_views=0
    )
    (rows,), labels = task.pooled(task.train, stage="train")
    x, y = rows.double().numpy(), labels.numpy()
    mine = Reference(Head(4, 3, seed=7).linear.weight.detach().numpy(), 3)
    rates = [0.0, 4.0, 8.0, 4 + 4 * math.cos(math.pi / 4), 4.0, 4 - 4 * math.cos(math.pi / 4)]
    losses = []
    for epoch in range(3):
        for i, batch in enumerate(np.split(rng.permutation(100, 7, epoch), 2)):
            losses.append(mine.step(x[batch], y[batch], rates[2 * epoch + i])[0])
    assert outcome.facts["train_loss"] == pytest.approx(np.mean(losses[-2:]), rel=1e-5)
    assert outcome.head is not None
    np.testing.assert_allclose(outcome.head["linear.weight"], mine.weight, rtol=1e-4, atol=1e-6)
    (rows,), _ = task.pooled(task.tests[0], stage="test")
    want = mine.scores(rows.double().numpy())
    np.testing.assert_allclose(outcome.scored[0].scores, want, rtol=1e-4, atol=1e-5)


def test_numbers_by_hand() -> None:
    """Two features of one column, 1 and 3, become -1 and 1; at weights 0 the logits are 0, p = 1/2,
    and for the labels 0 and 1 the weights' gradient is (1/2, -1/2) and the bias' 0."""
    head = Head(1, 2, seed=0).double()
    with torch.no_grad():
        head.linear.weight.zero_()
    loss = F.cross_entropy(
        head(torch.tensor([[1.0], [3.0]], dtype=torch.float64)), torch.tensor([0, 1])
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.69314718056)
    np.testing.assert_allclose(head.linear.weight.grad, [[0.5], [-0.5]], atol=1e-6)
    np.testing.assert_allclose(head.linear.bias.grad, [0.0, 0.0], atol=1e-12)
    # a tenth of the mean 2, and of the unbiased variance 2 beside 0.9
    assert head.norm.running_mean.tolist() == pytest.approx([0.2])
    assert head.norm.running_var.tolist() == pytest.approx([1.1])


def test_parts_of_a_width() -> None:
    for parts in (1, 2, 3, 4, 6, 12):
        check_parts("heads", parts, 12)
    for parts in (5, 0, -1, 24):
        with pytest.raises(UsageError, match=r"--heads; give one of 1, 2, 3, 4, 6, 12$"):
            check_parts("heads", parts, 12)


def test_names_of_tokens() -> None:
    assert (parse_tokens("all"), parse_tokens("patches")) == (False, True)
    with pytest.raises(UsageError, match=r"unknown tokens 'patch'.*patches"):
        parse_tokens("patch")
