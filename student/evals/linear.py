"""Train a linear probe of frozen features by MAE's protocol.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.1, as in the
released code: CLS after the encoder's final norm, BatchNorm without affine, one Linear layer, LARS
without weight decay at lr = blr * batch / 256, 10 warm-up epochs and a half cosine to 0 over 90,
batch 16384; training views are crops of (0.08, 1) by the released code's one-try sampler and flip,
test views the centre crop. MaskAlign takes blr 0.025, MILAN 0.05 over 100 epochs, MAE and CAE 0.1.

    student eval linear RUN --images LABELLED --blr 0.025

The backbone is frozen, so pictures are embedded first and the head is trained on the rows. Cost:
with fresh views (default) one forward of every training picture an epoch; `--train-views 4` pays
for 4 epochs and uses those views in turn; `--train-views 0` pays once and trains on the centre
crop. Stored views are kept for the next evaluation, fresh ones are not.

`--pool mean` averages the patches in place of [CLS]; `--blocks 4` takes that of the last four
blocks, one after the other, each after the final norm (as DINO's linear protocol does for small
models); `--blr 0.03,0.1,0.3` trains several heads in one pass.

The protocol is made for a million pictures. LARS moves the weight by 0.001 * lr of its own length a
step, so with few pictures the default base learning rate hardly leaves the start (1,437 digits:
42 % at --blr 0.1, 86 % at 1, 90 % at 3, whatever the batch size): the result then carries a `note`
that names a base learning rate to try.

What differs: every picture has its own counter, so a probe is repeatable; BatchNorm sees the whole
batch, the released code each process's share of it; the score is that of the last epoch, not the
best epoch on the test pictures; batches larger than the training set are cut to it.

C classes, D width of the features.
"""

from __future__ import annotations

from typing import Any

from student.features.task import Outcome, Task
from student.training import probe
from student.training.optim import lars
from student.training.probe import Head, Probe, ProbeOptions

OPTIONS = probe.OPTIONS
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("maskalign", None): {"blr": "0.025"},
    ("mralign", None): {"blr": "0.025"},  # none was published: that of its nearest parent
    ("milan", None): {"blr": "0.05", "epochs": 100},
    ("milan", "large"): {"blr": "0.02", "epochs": 100},
    ("kd", None): {"blr": "0.05", "epochs": 100},  # nor for kd: MILAN's
    ("kd", "large"): {"blr": "0.02", "epochs": 100},
    ("caev2", "small"): {"batch_size": 8192},
    ("caev2", "base"): {"batch_size": 8192},
}


def evaluate(task: Task, **options: Any) -> Outcome:
    """Train a head on pooled features of the training pictures, and score the test pictures."""
    chosen = ProbeOptions("linear", len(task.train), **options)
    made = Probe(chosen, lambda width, classes: Head(width, classes, task.seed), lars, tokens=False)
    trained, scored = probe.run_probe(task, made)
    facts = probe.facts(made, trained)
    return Outcome(scored, facts, trained.head.state_dict())
