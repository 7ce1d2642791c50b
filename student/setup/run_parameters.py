"""Options that `student train` and `student eval finetune` share: how a run is made and run."""

from __future__ import annotations

import click

from featcache.console.params import BATCH, COUNT, THREADS

EPOCHS = click.Option(
    ["--epochs"], type=COUNT, help="Passes over the pictures. [default: the recipe's]"
)
ACCUMULATE = click.Option(
    ["--accumulate"],
    type=BATCH,
    default=1,
    show_default=True,
    help="Batches summed up in a step.",
)
PRECISION = click.Option(
    ["--precision"], default="auto", show_default=True, help="auto, fp32, bf16 or fp16."
)
DEVICE = click.Option(
    ["--device"], help="cpu keeps off the GPU. [default: cuda where there is one]"
)
WORKERS = click.Option(
    ["--workers"], type=THREADS, default=2, show_default=True, help="Decoding threads."
)
SAVE_EVERY = click.Option(
    ["--save-every"],
    type=click.IntRange(1, 10**12),
    help="Steps between checkpoints. [default: an epoch]",
)
CHECKPOINT_ACTIVATIONS = click.Option(
    ["--checkpoint-activations"],
    is_flag=True,
    help="Compute blocks again in the backward pass: less memory, more time.",
)
DETERMINISTIC = click.Option(
    ["--deterministic"],
    is_flag=True,
    help="The same bits again on a GPU too, by slower kernels.",
)
SKIP_NONFINITE = click.Option(
    ["--skip-nonfinite"],
    type=click.IntRange(0),
    metavar="N",
    help="Leave out up to N steps whose loss is not finite. [default: the first one stops]",
)
