"""The regressor equals plain matrix code; start values and what may depend on what are checked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from student.models import latent_regressor, vit
from tests.student.models.test_vit import Weights, layer_norm, linear
from tests.student.recipes.test_recipes import wave


def reference_regress(
    w: Weights,
    x: Tensor,
    visible: Tensor,
    pos_x: Tensor,
    pos_visible: Tensor,
    heads: int = 2,
    depth: int = 2,
) -> Tensor:
    """Let x (B,M,W) attend to [visible; x], positions in queries and keys of every block; no final
    norm."""
    d = x.shape[-1] // heads

    def norm(values: Tensor, name: str) -> Tensor:
        return layer_norm(values, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in range(depth):
        name = f"regressor_blocks.{i}"
        seen, positions = torch.cat([visible, x], 1), torch.cat([pos_visible, pos_x], 1)
        attn = f"{name}.cross_attn"
        q = norm(x + pos_x, f"{name}.norm1_q") @ w[f"{attn}.q.weight"].T + w[f"{attn}.q_bias"]
        k = norm(seen + positions, f"{name}.norm1_k") @ w[f"{attn}.k.weight"].T
        v = norm(seen, f"{name}.norm1_v") @ w[f"{attn}.v.weight"].T + w[f"{attn}.v_bias"]
        mixed = []
        for head in range(heads):
            at = slice(head * d, (head + 1) * d)
            mixed.append(
                (q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(d)).softmax(-1) @ v[..., at]
            )
        x = x + w[f"{name}.gamma_1_cross"] * linear(torch.cat(mixed, -1), w, f"{attn}.proj")
        x = norm(x, f"{name}.norm2_cross")
        hidden = linear(x, w, f"{name}.mlp_cross.fc1")
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + w[f"{name}.gamma_2_cross"] * linear(gelu, w, f"{name}.mlp_cross.fc2")
    return x


def randomised(
    width: int = 8, depth: int = 2, *, final_norm: bool = False
) -> latent_regressor.LatentRegressor:
    torch.manual_seed(0)
    model = latent_regressor.LatentRegressor(width, depth, 2, 0.0, final_norm=final_norm).double()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return model


# x and the visible, then their positions
INPUTS = [wave(2, n, 8, phase=p) for n, p in ((3, 0.1), (5, 0.7), (3, 1.1), (5, 2.0))]


def test_equals_plain_matrix_code() -> None:
    model = randomised()
    expected = reference_regress(model.state_dict(), *INPUTS)
    torch.testing.assert_close(model(*INPUTS), expected, rtol=1e-10, atol=1e-12)
    normed = randomised(final_norm=True)
    w = normed.state_dict()
    expected = layer_norm(reference_regress(w, *INPUTS), w["norm.weight"], w["norm.bias"])
    torch.testing.assert_close(normed(*INPUTS), expected, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    model = randomised(width=4, depth=1)
    inputs = [
        wave(1, n, 4, phase=p).requires_grad_() for n, p in ((2, 0.1), (2, 0.7), (2, 1.1), (2, 2.0))
    ]
    assert torch.autograd.gradcheck(model, inputs)


def test_positions_never_reach_the_values() -> None:
    """With one token to look at, attention is 1 whatever the keys: the output then depends on x's
    content only."""
    model = randomised(depth=1)
    block = model.regressor_blocks[0]
    x, one = INPUTS[0][:, :1], INPUTS[1][:, :0]
    before = block(x, one, INPUTS[2][:, :1], INPUTS[3][:, :0])
    assert torch.equal(block(x, one, INPUTS[2][:, :1] + 1, INPUTS[3][:, :0]), before)


def test_names_and_start_values() -> None:
    torch.manual_seed(0)
    model = latent_regressor.LatentRegressor(96, 2, 12, 0.1, final_norm=True)
    block = (
        "norm1_q",
        "norm1_k",
        "norm1_v",
        "norm2_cross",
        "cross_attn.proj",
        "mlp_cross.fc1",
        "mlp_cross.fc2",
    )
    names = {
        f"regressor_blocks.{i}.{name}.{kind}"
        for i in (0, 1)
        for name in block
        for kind in ("weight", "bias")
    }
    alone = ("cross_attn.q.weight", "cross_attn.k.weight", "cross_attn.v.weight",
             "cross_attn.q_bias", "cross_attn.v_bias", "gamma_1_cross",
             "gamma_2_cross")  # fmt: skip
    names |= {f"regressor_blocks.{i}.{name}" for i in (0, 1) for name in alone} | {
        "norm.weight",
        "norm.bias",
    }
    assert set(model.state_dict()) == names
    q = model.get_parameter("regressor_blocks.1.cross_attn.q.weight")
    # a matrix of its own, not a third of a fused one
    assert 0.98 < q.abs().max() / math.sqrt(6 / (2 * 96)) <= 1
    assert torch.equal(
        model.get_parameter("regressor_blocks.1.gamma_1_cross"), torch.full((96,), 0.1)
    )
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.regressor_blocks]
    assert rates == pytest.approx([0, 0.1])
    beits = latent_regressor.LatentRegressor(96, 2, 12, 0.0, final_norm=True, xavier=False)
    # 0.02 / sqrt(2 * 2)
    assert beits.get_parameter("regressor_blocks.1.mlp_cross.fc2.weight").abs().max() <= 0.01


def test_bridge_positions_and_mask_token() -> None:
    assert [type(part) for part in latent_regressor.width_projection(8, 8)] == [
        torch.nn.Identity
    ] * 2
    linear_, norm = latent_regressor.width_projection(192, 96)
    assert (
        sum(x.numel() for part in (linear_, norm) for x in part.parameters())
        == 192 * 96 + 96 + 2 * 96
    )
    table, token = latent_regressor.fixed_positions(8, 3), latent_regressor.build_mask_token(8)
    assert not table.requires_grad
    torch.testing.assert_close(table[0], vit.sincos(8, 3, layout="cae").float())
    assert token.requires_grad
    assert 0 < token.abs().max() <= 0.02
