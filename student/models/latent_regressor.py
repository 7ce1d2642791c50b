"""The latent contextual regressor of CAE and CAE v2 predicts masked latents: mask tokens attend to
the visible tokens and each other.

    q = LNq(x + pos_x)   k = LNk([visible; x] + [pos_visible; pos_x])   v = LNv([visible; x])
    x = x + DP(g1 * Attn(q, k, v));   x = LN2(x);   x = x + DP(g2 * MLP(x))

The residual of the second branch goes on from the normed x. Positions enter queries and keys of
every block, never values; the visible tokens are not updated. Parameters bear the names of the
released code (`regresser`, as there; Atten4Vis/CAE models/modeling_cae_helper.py:59-186, 319-375).

Shapes: B batch, V visible, M masked, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from student.models import beit, vit
from student.models.drop_path import branch

# of the regressor and the decoder at every size: the released option for it reaches no module
LAYER_SCALE = 0.1


class CrossAttention(nn.Module):
    """Attend with separate projections of queries, keys and values; no bias on the keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q (B,M,D), k and v (B,N,D) -> (B,M,D)."""
        q, k, v = (
            F.linear(q, self.q.weight, self.q_bias),
            self.k(k),
            F.linear(v, self.v.weight, self.v_bias),
        )
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    """Compute one block of the formulas above."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (
            vit.NORM(width) for _ in range(4)
        )
        self.cross_attn = CrossAttention(width, heads)
        self.mlp_cross = Mlp(width, 4 * width)
        self.gamma_1_cross, self.gamma_2_cross = (
            nn.Parameter(torch.full((width,), LAYER_SCALE)) for _ in range(2)
        )
        self.drop_path1, self.drop_path2 = (branch(drop_path) for _ in range(2))

    def forward(self, x: Tensor, visible: Tensor, pos_x: Tensor, pos_visible: Tensor) -> Tensor:
        """Map x, pos_x (B,M,D), visible, pos_visible (B,V,D) -> (B,M,D)."""
        both, pos_both = torch.cat([visible, x], dim=1), torch.cat([pos_visible, pos_x], dim=1)
        attended = self.cross_attn(
            self.norm1_q(x + pos_x), self.norm1_k(both + pos_both), self.norm1_v(both)
        )
        x = self.norm2_cross(x + self.drop_path1(self.gamma_1_cross * attended))
        return x + self.drop_path2(self.gamma_2_cross * self.mlp_cross(x))


class LatentRegressor(nn.Module):
    """Stack blocks with drop path rising from 0, and CAE's final norm, which CAE v2 skips."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        drop_path: float,
        *,
        final_norm: bool,
        xavier: bool = True,
    ) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.regressor_blocks = nn.ModuleList(RegressorBlock(width, heads, rate) for rate in rates)
        self.norm = vit.NORM(width) if final_norm else nn.Identity()
        initialise(self, self.regressor_blocks, ("cross_attn.proj", "mlp_cross.fc2"), xavier=xavier)

    def forward(self, x: Tensor, visible: Tensor, pos_x: Tensor, pos_visible: Tensor) -> Tensor:
        """Predict the masked latents (B,M,D) from x, pos_x (B,M,D), visible, pos_visible (B,V,D),
        no CLS."""
        for block in self.regressor_blocks:
            x = block(x, visible, pos_x, pos_visible)
        return self.norm(x)


def fixed_positions(width: int, grid: int) -> nn.Parameter:
    """Return fixed positions (1,1+P,width) of the regressor and CAE's decoder, in CAE's layout."""
    table = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
    vit.init_fixed_positions(table, grid, layout="cae")
    return table


def initialise(
    module: nn.Module, blocks: nn.Module, ends: tuple[str, str], *, xavier: bool
) -> None:
    """Set the start values of a regressor or a decoder: Xavier's, or BEiT's, where `ends` close the
    two branches of a block."""
    if xavier:
        module.apply(vit.init_linear_and_norm)
    else:
        beit.init_weights(module)
        beit.rescale_by_depth(blocks, *ends)


def width_projection(
    width_in: int, width: int, *, xavier: bool = True
) -> tuple[nn.Module, nn.Module]:
    """Return a Linear and a norm from the encoder's width to another; nothing where they agree.

    Without Xavier's, the Linear keeps the framework's start, as in the released code.
    """
    if width_in == width:
        return nn.Identity(), nn.Identity()
    linear, norm = nn.Linear(width_in, width), vit.NORM(width)
    if xavier:
        vit.init_linear_and_norm(linear)
    return linear, norm


def build_mask_token(width: int) -> nn.Parameter:
    """Return the latent (1,1,width) that every masked patch starts from."""
    token = nn.Parameter(torch.zeros(1, 1, width))
    beit.init_truncated_normal(token)
    return token
