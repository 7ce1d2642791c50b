"""Train an efficient probe of frozen tokens.

Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
ICLR 2026, arXiv 2506.10178 (MAE-B on ImageNet-1k: 75.5 where the linear probe has 67.8), as in the
released code (billpsomas/efficient-probing poolings/ep.py at 3a87bff, main_linprobe.py at 04bb316):
32 learned queries look at the patches with neither key projection nor bias, each sums its own 32nd
of the values, and what they sum is put side by side; then BatchNorm without affine (eps 1e-6) and
one Linear layer with torch's own start. MAE's LARS for all of them at blr 0.1, batch 4096, no
weight decay, 10 warm-up epochs and a half cosine to 0 over 90; crops of (0.08, 1) by MAE's one-try
sampler and flip.

    student eval efficient RUN --images LABELLED --train-views 0

The released code reads [CLS] too (`ep_all`) for encoders whose training has an objective on it:
`--tokens all`. Cost: as the linear probe's, but of all tokens, 2 T D bytes a picture and view (300
kB for ViT-B/16), on disk for stored views and in memory for fresh ones. With few pictures the
default base learning rate is too small, as the linear probe's is: a `note` then names one.

What differs: the released ViT gives tokens before its final norm, here they are those after it, as
for every protocol; BatchNorm sees the whole batch, not each process's share; the score is that of
the last epoch, not the best one on the test pictures; tokens are kept in float16 and pooled in
float32; batches larger than the training set are cut to it.

B batch, T tokens, D width, M queries, d = D / M, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featcache import rng
from student.features.task import Outcome, Task
from student.training import probe
from student.training.optim import lars
from student.training.probe import Head, Probe, ProbeOptions

POOLS = False  # it pools tokens itself
OPTIONS: dict[str, tuple[Any, str]] = {
    **probe.OPTIONS,
    "batch_size": (4096, probe.OPTIONS["batch_size"][1]),
    "queries": (32, "learned queries; the width is cut into so many parts"),
    "tokens": ("patches", "what the queries attend to: patches alone, or all tokens"),
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {}


# ------------------------------------------------------------ the pool


class EfficientPool(nn.Module):
    """Pools tokens by M learned queries, each for its own M-th of the values.

    The released code forms V = X W_v and sums a_m^T V_m. Here the sum comes first,
    a_m^T (X W_vm) = (a_m^T X) W_vm, which takes T M D + D^2 multiplications in place of T D^2 +
    T D beside the T M D of the attention: a twelfth of all for ViT-B.
    """

    def __init__(self, width: int, queries: int, seed: int) -> None:
        super().__init__()
        probe.check_parts("queries", queries, width)
        generator = torch.Generator().manual_seed(int(rng.stream("efficient-pool", seed) >> 1))
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width, generator=generator))
        # skip_init: the layer's usual start would draw from (and move) torch's global generator
        self.v = nn.utils.skip_init(nn.Linear, width, width, bias=False)
        nn.init.uniform_(self.v.weight, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens (B,T,D) to (B,D): the parts of all queries, in their order."""
        width = tokens.shape[-1]
        attention = ((self.queries * width**-0.5) @ tokens.mT).softmax(-1)  # a (B,M,T)
        pooled = attention @ tokens  # (B,M,D)
        parts = self.v.weight.unflatten(0, (len(self.queries), -1))  # W_vm (M,d,D)
        return torch.einsum("bmc,mdc->bmd", pooled, parts).flatten(1)


# ------------------------------------------------------------ its training


def evaluate(task: Task, *, queries: int = 32, tokens: str = "patches", **options: Any) -> Outcome:
    """Train the pool and a head on the training pictures' tokens, and score the test pictures."""
    chosen = ProbeOptions("efficient", len(task.train), **options)
    patches_only = probe.parse_tokens(tokens)

    def make(width: int, classes: int) -> Head:
        return efficient_head(width, classes, queries, task.seed)

    made = Probe(chosen, make, lars, tokens=True, patches_only=patches_only)
    trained, scored = probe.run_probe(task, made)
    own = {"pool": "efficient", "queries": queries, "tokens": tokens}
    facts = probe.facts(made, trained) | own
    return Outcome(scored, facts, trained.head.state_dict())


def efficient_head(width: int, classes: int, queries: int, seed: int) -> Head:
    """Build the pool and its head, whose Linear layer starts as torch's do: uniform within 1 /
    sqrt(width). LARS moves a matrix by shares of its own length, so that the start matters."""
    head = Head(width, classes, seed, pool=EfficientPool(width, queries, seed))
    generator = torch.Generator().manual_seed(int(rng.stream("efficient-head", seed) >> 1))
    for parameter in (head.linear.weight, head.linear.bias):
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return head
