"""These tests check which levels are aligned with which weight, the start of W, and the gradients
of the head."""

from __future__ import annotations

import pytest
import torch

from featcache.errors import UsageError
from student.models import alignment
from student.models.alignment_levels import aligned_levels


@pytest.mark.parametrize(
    ("weights", "levels", "depth", "expected"),
    [
        ("top:5", "auto", 12, {8: 0.2, 9: 0.2, 10: 0.2, 11: 0.2, 12: 0.2}),
        ("top:5", "auto", 24, {20: 0.2, 21: 0.2, 22: 0.2, 23: 0.2, 24: 0.2}),
        ("top:3", "auto", 3, {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}),
        ("last", "auto", 12, {12: 1.0}),
        ("mean", "auto", 4, {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        # level 1 has weight 0 and is not aligned
        ("linear-decay", "auto", 4, {2: 1 / 6, 3: 2 / 6, 4: 3 / 6}),
        ("mean", "last:2", 12, {11: 0.5, 12: 0.5}),
        ("mean", "12, 4,8", 12, {4: 1 / 3, 8: 1 / 3, 12: 1 / 3}),
        ("linear-decay", "4,8,12", 12, {8: 1 / 3, 12: 2 / 3}),
        ("top:1", "4,8", 12, {8: 1.0}),
        ("last", "7", 12, {7: 1.0}),
    ],
)
def test_levels(weights: str, levels: str, depth: int, expected: dict[int, float]) -> None:
    got = aligned_levels(weights, levels, depth)
    assert list(got) == list(expected)  # ascending
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "levels", "depth", "message"),
    [
        ("top:13", "auto", 12, "needs 13 levels; allowed: the teacher's 12"),
        ("mean", "last:13", 12, "needs 13 levels; allowed: the teacher's 12"),
        ("mean", "8,13", 12, "needs 13 levels; allowed: the teacher's 12"),
        ("top:3", "8,12", 12, "top:3 needs 3 levels, 2 are aligned"),
        ("mean", "0,1", 12, "cannot read align_levels='0,1'; allowed: auto, last:K"),
        ("mean", "last:0", 12, "cannot read align_levels='last:0'"),
        ("mean", "", 12, "cannot read align_levels=''"),
    ],
)
def test_levels_that_cannot_be(weights: str, levels: str, depth: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        aligned_levels(weights, levels, depth)


def test_mix_starts_on_the_block_of_the_same_number() -> None:
    """Levels 2 and 4 of 4 on 4 student blocks: [L, S]."""
    head = alignment.AlignmentHead(4, 6, 4, 5, {2: 0.5, 4: 0.5})
    expected = [[0.01, 1.01, 0.01, 0.01], [0.01, 0.01, 0.01, 1.01]]
    torch.testing.assert_close(head.mix.detach(), torch.tensor(expected))


def test_mix_is_even_where_depths_differ() -> None:
    head = alignment.AlignmentHead(4, 6, 8, 5, {6: 0.5, 8: 0.5})
    torch.testing.assert_close(head.mix.detach(), torch.full((2, 4), 0.25))


def test_adaptors_are_named_by_level_and_start_as_xavier() -> None:
    head = alignment.AlignmentHead(2, 60, 12, 40, {8: 0.5, 12: 0.5})
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert shapes == {
        "mix": (2, 2),
        "adaptors.8.weight": (40, 60),
        "adaptors.8.bias": (40,),
        "adaptors.12.weight": (40, 60),
        "adaptors.12.bias": (40,),
    }
    weight = dict(head.named_parameters())["adaptors.8.weight"]
    assert 0.99 < weight.abs().max() / (6 / 100) ** 0.5 <= 1
    assert not dict(head.named_parameters())["adaptors.12.bias"].any()


def test_loss_by_hand() -> None:
    """One block, width 1, W = 2, adaptor 3 x + 1; CLS and patch 1 visible.

    x = (1, 0) -> 2 x = (2, 0) -> q = (7, 1); h = (6.5, 4) -> e = (0.5, -3) -> (0.25 + 5) / 2 =
    2.625; weight 1.
    """
    head = alignment.AlignmentHead(1, 1, 1, 1, {1: 1.0})
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), (2.0, 3.0, 1.0), strict=True):
            parameter.fill_(value)
    features = torch.tensor([6.5, 100.0, 4.0]).view(1, 1, 3, 1)
    loss, parts = head([torch.tensor([1.0, 0.0]).view(1, 2, 1)], features, torch.tensor([[1]]))
    assert loss.item() == 2.625
    assert {name: part.item() for name, part in parts.items()} == {"level_1": 2.625}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        # h = (-1, 1) with mean 4 and divisor 3: y = (1, 7).
        ("none", (1.0, 7.0)),
        ("l2", (1 / 50**0.5, 7 / 50**0.5)),
        # the level's mean 2 and variance 3
        ("bn", ((1 - 2) / 3.000001**0.5, (7 - 2) / 3.000001**0.5)),
    ],
)
def test_target_norms_by_hand(norm: str, expected: tuple[float, float]) -> None:
    h, stats = torch.tensor([[[-1.0, 1.0]]]).half(), torch.tensor([[[4.0, 3.0]]])
    found = alignment.normalise_target(norm, h, stats, torch.tensor([2.0, 3.0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[expected]]))


def test_orders_of_mixing_and_adapting_by_hand() -> None:
    """Two blocks of width 1 with x = (2, 3) at CLS and (5, 7) at patch 0, level 2 of 2, targets 0
    and 1.

    adapt_then_mix: A_1 = 10 x + 1, A_2 = x - 1, W = (2, 3): CLS 2 * 21 + 3 * 2 = 48, patch 2 * 51 +
    3 * 6 = 120; layer_wise: A_2 alone: 2 and 6. The loss is l1, with CLS (48 + 119) / 2 and (2 + 5)
    / 2, without it 119 and 5.
    """
    outputs = [torch.tensor(x).view(1, 2, 1) for x in ([2.0, 5.0], [3.0, 7.0])]
    features, ids_keep = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([[0]])

    def loss(cls_loss: bool, kind: str) -> float:
        head = alignment.AlignmentHead(
            2,
            1,
            2,
            1,
            {2: 1.0},
            alignment.AlignmentOptions(alignment=kind, loss="l1", cls_loss=cls_loss),
        )
        named = dict(head.named_parameters())
        values = {
            "adaptors.1.weight": 10.0,
            "adaptors.1.bias": 1.0,
            "adaptors.2.weight": 1.0,
            "adaptors.2.bias": -1.0,
        }
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(
                    torch.tensor([[2.0, 3.0]]) if name == "mix" else torch.tensor(values[name])
                )
        assert (
            set(named) == {*values, "mix"}
            if kind == "adapt_then_mix"
            else {"adaptors.2.weight", "adaptors.2.bias"}
        )
        return head(outputs, features, ids_keep)[0].item()

    assert [loss(cls, "adapt_then_mix") for cls in (True, False)] == [83.5, 119]
    assert [loss(cls, "layer_wise") for cls in (True, False)] == [3.5, 5]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "ways",
    [
        alignment.AlignmentOptions(),
        alignment.AlignmentOptions(
            alignment="adapt_then_mix", adaptor="mlp", loss="l2", target_norm="bn", cls_loss=False
        ),
        alignment.AlignmentOptions(alignment="layer_wise", adaptor="norm_linear", target_norm="l2"),
        alignment.AlignmentOptions(adaptor="mlp2", target_norm="none"),
    ],
)
def test_gradients(ways: alignment.AlignmentOptions) -> None:
    torch.manual_seed(0)
    head = alignment.AlignmentHead(2, 4, 2, 3, {1: 0.25, 2: 0.75}, ways).double()
    features, stats = (
        torch.randn(2, 2, 5, 3, dtype=torch.float64),
        torch.rand(2, 2, 5, 2, dtype=torch.float64) + 0.5,
    )
    moments = torch.rand(2, 2, dtype=torch.float64)
    ids_keep = torch.tensor([[0, 2], [3, 1]])
    x = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given = (features, ids_keep, stats, moments)
    assert torch.autograd.gradcheck(
        lambda a, b, *_: head([a, b], *given)[0], (*x, *head.parameters())
    )
