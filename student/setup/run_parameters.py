"""Options that `student train` and `student eval finetune` share: how a run is made and run."""

from __future__ import annotations

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import BATCH, COUNT, THREADS, Choice

PRECISIONS = ("auto", "fp32", "bf16", "fp16")  # of accelerator, which imports torch

EPOCHS = Option(
    ["--epochs"],
    group=HelpGroup.TRAINING,
    type=COUNT,
    help="Passes over the pictures. [default: the recipe's]",
)
ACCUMULATE = Option(
    ["--accumulate"],
    group=HelpGroup.TRAINING,
    type=BATCH,
    default=1,
    show_default=True,
    help="Batches whose gradients are summed in one step.",
)
PRECISION = Option(
    ["--precision"],
    group=HelpGroup.RUNNING,
    type=Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Of the arithmetic; auto: bf16 on a GPU that has it, fp32 on a CPU.",
)
DEVICE = Option(
    ["--device"],
    group=HelpGroup.RUNNING,
    help="cpu keeps off the GPU. [default: cuda where there is one]",
)
WORKERS = Option(
    ["--workers"],
    group=HelpGroup.RUNNING,
    type=THREADS,
    default=2,
    show_default=True,
    help="Decoding threads.",
)
SAVE_EVERY = Option(
    ["--save-every"],
    group=HelpGroup.CHECKPOINTS,
    type=click.IntRange(1, 10**12),
    help="Steps between checkpoints. [default: an epoch]",
)
CHECKPOINT_ACTIVATIONS = Option(
    ["--checkpoint-activations"],
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="Compute blocks again in the backward pass: less memory, more time.",
)
DETERMINISTIC = Option(
    ["--deterministic"],
    group=HelpGroup.RUNNING,
    is_flag=True,
    help="The same bits again on a GPU too, by slower kernels.",
)
SKIP_NONFINITE = Option(
    ["--skip-nonfinite"],
    group=HelpGroup.RUNNING,
    type=click.IntRange(0),
    metavar="N",
    help="Leave out up to N steps whose loss is not finite. [default: the first one stops]",
)
