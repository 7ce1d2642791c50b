"""Options of `student eval finetune` beside those that it shares with the other protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import (
    BATCH,
    COUNT,
    CROP_SHARE,
    SEED,
    Choice,
    FiniteRange,
    LocalPath,
    LocalText,
)
from student.setup import run_parameters


def parameters() -> list[click.Parameter]:
    """Return the parameters: what is fine-tuned, how, and how it is run."""
    return [*_subject(), *_training(), *_running()]


def _subject() -> list[click.Parameter]:
    return [
        click.Argument(["run"], required=False, type=LocalPath()),
        Option(
            ["--checkpoint"],
            group=HelpGroup.INPUT,
            type=click.IntRange(0, 10**12),
            metavar="STEP",
            help="Begin with that checkpoint of RUN. [default: the newest]",
        ),
        Option(
            ["--ema"],
            group=HelpGroup.INPUT,
            is_flag=True,
            help="Begin with the average of RUN's weights.",
        ),
        Option(
            ["--teacher", "teacher_spec"],
            group=HelpGroup.INPUT,
            type=LocalText(),
            help="Fine-tune a teacher in place of RUN.",
        ),
        Option(
            ["--weights"], group=HelpGroup.INPUT, type=LocalText(), help="The teacher's weights."
        ),
        Option(
            ["--out"],
            group=HelpGroup.INPUT,
            type=LocalPath(),
            help="Run folder of the fine-tuning. [default: runs/finetune-RUN-sSEED]",
        ),
    ]


def _training() -> list[click.Parameter]:
    return [
        Option(
            ["--set", "settings"],
            group=HelpGroup.TRAINING,
            multiple=True,
            metavar="KEY=VALUE",
            help="One setting, such as img_size=384, pool=cls or layer_decay=0.75; --show lists "
            "them with the recipe's own values.",
        ),
        Option(
            ["--show"], group=HelpGroup.REPORT, is_flag=True, help="Print the settings and stop."
        ),
        run_parameters.EPOCHS,
        Option(
            ["--batch-size"],
            group=HelpGroup.TRAINING,
            type=BATCH,
            help="Pictures, per process. [default: 64, or all if fewer]",
        ),
        run_parameters.ACCUMULATE,
        Option(
            ["--seed"],
            group=HelpGroup.TRAINING,
            type=SEED,
            default=0,
            show_default=True,
            help="Of splits, views, order and head.",
        ),
        Option(
            ["--eval-every"],
            group=HelpGroup.REPORT,
            type=COUNT,
            default=1,
            show_default=True,
            help="Epochs between scores of the test pictures.",
        ),
        Option(
            ["--crop-pct"],
            group=HelpGroup.FEATURES,
            type=CROP_SHARE,
            help="Share of the shorter side that a test picture's centre crop has. [default: "
            "0.875; 1 above 224 pixels]",
        ),
        Option(
            ["--embed-batch"],
            group=HelpGroup.FEATURES,
            type=BATCH,
            default=64,
            show_default=True,
            help="Test pictures at once.",
        ),
        Option(
            ["--skip-bad"],
            group=HelpGroup.FEATURES,
            type=click.IntRange(0, 10**9),
            default=0,
            show_default=True,
            help="Test pictures that may be left out because they cannot be decoded.",
        ),
    ]


def _running() -> list[click.Parameter]:
    return [
        Option(
            ["--resume"],
            group=HelpGroup.CHECKPOINTS,
            is_flag=True,
            help="Go on from the newest checkpoint of --out; start where there is none yet.",
        ),
        run_parameters.SAVE_EVERY,
        Option(
            ["--keep-ema"],
            group=HelpGroup.TRAINING,
            type=FiniteRange(0, 1, min_open=True, max_open=True),
            metavar="DECAY",
            help="Keep and score an average of the weights as well, of this decay, such as 0.9999.",
        ),
        run_parameters.PRECISION,
        run_parameters.DEVICE,
        run_parameters.WORKERS,
        Option(
            ["--compile", "compiled"],
            group=HelpGroup.RUNNING,
            is_flag=True,
            help="torch.compile the model.",
        ),
        run_parameters.CHECKPOINT_ACTIVATIONS,
        run_parameters.DETERMINISTIC,
        run_parameters.SKIP_NONFINITE,
        Option(
            ["--tracker", "trackers"],
            group=HelpGroup.REPORT,
            type=Choice(["json", "tensorboard", "wandb"]),
            multiple=True,
            default=("json",),
            show_default=True,
            help="Show metrics there as well. May be given twice.",
        ),
        Option(
            ["--dry-run"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Say what would be trained, with memory and time; write nothing.",
        ),
        Option(
            ["--json", "as_json"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Print the result as JSON.",
        ),
    ]


def option_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those that a run depends on, by name."""
    from student.setup.finetune_inputs import FinetuneOptions

    return {name: given[name] for name in FinetuneOptions.__dataclass_fields__ if name in given}
