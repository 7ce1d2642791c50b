"""Train CAE's attentive probe of frozen tokens.

Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", IJCV 2023, table 1
(CAE-B after 300 epochs 73.8 on ImageNet-1k where the linear probe has 64.1, after 1,600 epochs 77.1
and 70.4), as in the released code (Atten4Vis/CAE models/modeling_finetune.py at 1016f85,
tools/run_attentive.py and scripts/cae_base_800e.sh at 9227485): a learned query looks at all tokens
after the encoder's final norm, [CLS] among them, by one cross-attention with 12 heads (16 in ViT-L)
and LayerNorms of eps 1e-6; then BatchNorm without affine (eps 1e-5) and one Linear layer from N(0,
0.01). SGD with Nesterov's momentum of 0.9, no weight decay, lr 0.4 at batch 8192 (blr 0.0125), 10
warm-up epochs and a half cosine to 1e-6 over 90; crops of (0.08, 1) and flips, no smoothing.

    student eval attentive RUN --images LABELLED --train-views 0

The paper's text has the patches alone attended to: `--tokens patches`. Cost: as the linear probe's,
but of all tokens, 2 T D bytes a picture and view (300 kB for ViT-B/16), on disk for stored views
and in memory for fresh ones.

The query starts at 0, whose norm divides by sqrt(1e-6): the first gradients of the query are 1,000
times as steep as later ones, as in the released code.

What differs: the released code calls its block with arguments that it does not take, which are left
out; it tests with the BatchNorm of the test batch, here running statistics do; the score is that of
the last epoch, not the best one on the test pictures; tokens are kept in float16 and pooled in
float32; crops come of MAE's one-try sampler; the learning rate is MAE's function of the step (the
released one is at its peak for two steps); batches larger than the training set are cut to it.
Numbers of heads other than CAE's: see `default_heads`.

B batch, T tokens, D width, H heads, d = D / H, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache import rng
from student.features.task import Outcome, Task
from student.training import probe
from student.training.probe import Head, Probe, ProbeOptions

POOLS = False  # it pools tokens itself
OPTIONS: dict[str, tuple[Any, str]] = {
    **probe.OPTIONS,
    "blr": ("0.0125", probe.OPTIONS["blr"][1]),
    "batch_size": (8192, probe.OPTIONS["batch_size"][1]),
    "heads": (None, "heads of the attention [default: 12, and 16 from a width of 1024 on]"),
    "tokens": ("all", "what the query attends to: all tokens, or patches alone"),
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {}
MIN_LR = 1e-6
EPS = 1e-6  # of the LayerNorms


# ------------------------------------------------------------ the pool


class AttentivePool(nn.Module):
    """Pools tokens by one cross-attention from a learned query, without residual or MLP.

    CAE's block is proj(softmax(q k / sqrt(d)) v) for q = W_q LN_q(query) + b_q, k = W_k LN_k(x) and
    v = W_v LN_v(x) + b_v. There is one query, so that the matrices move out of the sums over tokens
    (u is x normalised, g and c the weight and bias of a norm, the weights a of a head sum to 1):

        q_h . W_kh (g_k u_t + c_k)                = (W_kh^T q_h) . (g_k u_t + c_k)
        sum_t a_ht (W_vh (g_v u_t + c_v) + b_vh)  = W_vh (g_v sum_t a_ht u_t + c_v) + b_vh

    That takes 2 T H D + D^2 multiplications a picture in place of 2 T D^2 + 2 T D, a 55th for
    ViT-B.
    """

    def __init__(self, width: int, heads: int, seed: int) -> None:
        super().__init__()
        probe.check_parts("heads", heads, width)
        self.heads = heads
        # exactly 0, so that the probe starts as a mean over tokens
        self.query = nn.Parameter(torch.zeros(width))
        self.norm_q = nn.LayerNorm(width, eps=EPS)
        self.norm_k = nn.LayerNorm(width, eps=EPS)
        self.norm_v = nn.LayerNorm(width, eps=EPS)
        # skip_init: a layer's usual start would draw from (and move) torch's global generator
        self.q = nn.utils.skip_init(nn.Linear, width, width)
        self.k = nn.utils.skip_init(nn.Linear, width, width, bias=False)
        self.v = nn.utils.skip_init(nn.Linear, width, width)
        self.proj = nn.utils.skip_init(nn.Linear, width, width)
        generator = torch.Generator().manual_seed(int(rng.stream("attentive-pool", seed) >> 1))
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens (B,T,D) to (B,D); every token is attended to."""
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)  # u (B,T,D)
        values = self._weights(normed) @ normed  # (B,H,D)
        values = values * self.norm_v.weight + self.norm_v.bias
        heads = torch.einsum("bhc,hdc->bhd", values, self._by_head(self.v.weight))  # (B,H,d)
        return self.proj(heads.flatten(1) + self.v.bias)

    def _weights(self, normed: Tensor) -> Tensor:
        """Return the attention (B,H,T) of the query to normalised tokens (B,T,D)."""
        q = self.q(self.norm_q(self.query)).unflatten(0, (self.heads, -1))  # (H,d)
        q = q * q.shape[1] ** -0.5
        query = torch.einsum("hd,hdc->hc", q, self._by_head(self.k.weight))  # W_kh^T q_h (H,D)
        # the second term is the same for every token: the bias of norm_k has no gradient
        logits = (query * self.norm_k.weight) @ normed.mT + (query @ self.norm_k.bias)[:, None]
        return logits.softmax(-1)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.heads, -1))  # (H,d,D)


# ------------------------------------------------------------ its training


def evaluate(
    task: Task, *, heads: int | None = None, tokens: str = "all", **options: Any
) -> Outcome:
    """Train the pool and a head on the training pictures' tokens, and score the test pictures."""
    chosen = ProbeOptions("attentive", len(task.train), min_lr=MIN_LR, **options)
    patches_only = probe.parse_tokens(tokens)

    def make(width: int, classes: int) -> Head:
        pool = AttentivePool(width, default_heads(width) if heads is None else heads, task.seed)
        return Head(
            width, classes, task.seed, name="attentive", eps=1e-5, truncated=False, pool=pool
        )

    made = Probe(chosen, make, nesterov, tokens=True, patches_only=patches_only)
    trained, scored = probe.run_probe(task, made)
    pool = trained.head.pool
    assert isinstance(pool, AttentivePool)
    own = {"pool": "attentive", "heads": pool.heads, "tokens": tokens}
    facts = probe.facts(made, trained) | own
    return Outcome(scored, facts, trained.head.state_dict())


def default_heads(width: int) -> int:
    """Return CAE's number of heads, or the next below it that divides the width.

    >>> [default_heads(width) for width in (192, 384, 768, 1024, 64)]
    [12, 12, 12, 16, 8]
    """
    most = 12 if width < 1024 else 16
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def nesterov(head: Head) -> torch.optim.SGD:
    """Build SGD as CAE has it: m <- 0.9 m + g, w <- w - lr (g + 0.9 m)."""
    return torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9, nesterov=True)
