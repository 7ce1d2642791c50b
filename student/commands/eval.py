"""`student eval` judges frozen features; each file of `student/evals` is a command of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

from featcache.console import config_file
from featcache.console.command import Command, CommandList, Section
from featcache.console.text import first_paragraph
from student.setup import eval_options, eval_parameters


class _Evals(CommandList):
    """Offers one command for each file in student/evals."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from student import evals

        return evals.names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        from student import evals

        return _eval_command(name, evals.load(name))


@click.group(
    "eval",
    cls=_Evals,
    section=Section.TRAIN,
    short_help="Judge frozen features, or fine-tune, on labelled pictures.",
)
def command() -> None:
    """Accuracy of frozen features on labelled pictures, by the papers' protocols.

    Each result is a line of RUN/results.jsonl and of $FEATCACHE_HOME/results.jsonl. Features are
    kept below $FEATCACHE_HOME/features, so that the next protocol reads no picture.
    """


def _eval_command(name: str, module: Any) -> click.Command:
    @click.pass_context
    def run(ctx: click.Context, as_json: bool, **given: Any) -> None:
        from student.api import evaluate
        from student.setup.console import TERMINAL

        chosen = [
            key for key in given if ctx.get_parameter_source(key) is not ParameterSource.DEFAULT
        ]
        found = evaluate.carry_out(name, given, chosen, TERMINAL, eval_options.stage_bars)
        found.print(as_json)

    command = Command(
        name,
        params=eval_parameters.parameters(module),
        callback=run,
        help=first_paragraph(module.__doc__),
        epilog=_examples(name, module),
    )
    return _accepting(module)(command)


def _accepting(module: Any) -> Callable[[click.Command], click.Command]:
    """Return what gives a protocol's command the options --config and --print-config."""
    own_code = {"teacher_spec": config_file.is_registered}
    if getattr(module, "TRAINS_ENCODER", False):
        return config_file.accepts(_settings, own_code, also_settings=("epochs",))
    return config_file.accepts(
        own_code=own_code,
        rivals={"shots": "fraction", "fraction": "shots"},
        soft=tuple(module.OPTIONS),  # a recipe's publication has others
    )


def _settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a fine-tuning, from --config and --set."""
    from student.setup.file_settings import merged_values
    from student.training.finetune import Config

    return merged_values(Config, given)


def _examples(name: str, module: Any) -> str:
    first = f"  student eval {name} runs/mralign-s0 --images train/ --test val/"
    if not getattr(module, "TRAINS_ENCODER", False):
        return f"Example:\n\n{first}"
    again = f"  student eval {name} RUN --images train/ --set img_size=384 --resume"
    return f"Examples:\n\n{first}\n\n{again}"
