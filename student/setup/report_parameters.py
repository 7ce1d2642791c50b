"""Options of `student train` that say what is measured and told."""

from __future__ import annotations

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import COUNT, Choice, PicturesText


def parameters() -> list[click.Parameter]:
    """Return the options of what is measured and told."""
    return [
        Option(
            ["--tracker", "trackers"],
            group=HelpGroup.REPORT,
            type=Choice(["json", "tensorboard", "wandb"]),
            multiple=True,
            default=("json",),
            show_default=True,
            help="Where metrics are shown as well; RUN/metrics.jsonl (json) is always written. May "
            "be given twice.",
        ),
        Option(
            ["--probe"],
            group=HelpGroup.REPORT,
            type=PicturesText(),
            help="Labelled pictures: their k-NN, linear probe, RankMe and cosine with the teacher "
            "are measured as the run goes on; the run's own numbers stay the same.",
        ),
        Option(
            ["--probe-every"],
            group=HelpGroup.REPORT,
            type=COUNT,
            help="Epochs between probes. [default: 3 % of the time]",
        ),
        Option(
            ["--dry-run"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Say what would be trained, with memory, time and disk; write nothing.",
        ),
        Option(
            ["--json", "as_json"],
            group=HelpGroup.REPORT,
            is_flag=True,
            help="Print the summary as JSON.",
        ),
    ]
