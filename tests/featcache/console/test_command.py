"""Help that a newcomer reads: options in groups, examples that stay whole, a line for each command,
and near names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from featcache import cli as featcache_cli
from featcache.console.command import Command, CommandList, Section, examples
from featcache.console.option import HelpGroup, Option
from featcache.console.params import Choice
from pipelines import clipart, digits, overview, pack_images, quickstart, tokenizer
from pipelines.ablate import __main__ as ablate
from student import cli as student_cli

PROGRAMS: dict[str, click.Command] = {
    "featcache": featcache_cli.cli,
    "student": student_cli.cli,
    "python -m pipelines.ablate": ablate.cli,
    "python -m pipelines.clipart": clipart.cli,
    "python -m pipelines.digits": digits.cli,
    "python -m pipelines.overview": overview.command,
    "python -m pipelines.pack_images": pack_images.command,
    "python -m pipelines.quickstart": quickstart.cli,
    "python -m pipelines.tokenizer": tokenizer.cli,
}


def _below(
    command: click.Command, path: str, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Every command, with its whole name and a context to write its help in."""
    context = click.Context(command, parent, path.rpartition(" ")[2], **command.context_settings)
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _below(found, f"{path} {name}", context)


EVERY = [each for name, program in PROGRAMS.items() for each in _below(program, name)]


def _help(command: click.Command, context: click.Context, width: int) -> str:
    formatter = click.HelpFormatter(width=width - 2)
    command.format_help(context, formatter)
    return formatter.getvalue()


def test_every_option_has_a_group_and_a_text() -> None:
    bare = {"--version", "--help"}
    for path, command, _ in EVERY:
        for param in command.params:
            if isinstance(param, click.Option) and param.opts[0] not in bare:
                assert isinstance(param, Option), f"{path} {param.opts[0]} has no group"
                assert param.help, f"{path} {param.opts[0]} has no text"
                assert not param.help.startswith("[default"), f"{path} {param.opts[0]}"
    assert len(EVERY) > 40


def test_an_option_without_a_group_is_refused() -> None:
    with pytest.raises(TypeError, match="group"):
        Option(["--views"], help="Views.")  # type: ignore[call-arg]


@pytest.mark.parametrize("width", [80, 100])
def test_help_is_no_wider_than_asked_and_examples_are_whole(width: int) -> None:
    for path, command, context in EVERY:
        text = _help(command, context, width)
        assert max(map(len, text.splitlines())) <= width, path
        if command.epilog is None:
            continue
        shown = text.split("Example", 1)[1].partition("\n")[2].replace("\\\n", " ")
        lines = [line.split() for line in command.epilog.replace("\\\n", " ").splitlines()]
        said = [words for words in lines if words and not words[0].startswith("Example")]
        assert [line.split() for line in shown.splitlines() if line.strip()] == said, path
        for line in shown.strip().splitlines():
            shlex.split(line)


def test_lists_of_commands_say_a_whole_line_of_each() -> None:
    for path, command, context in EVERY:
        if not isinstance(command, click.Group):
            continue
        names = command.list_commands(context)
        lines = _help(command, context, 80).splitlines()
        for name in names:
            at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
            assert re.search(r"[^.]\.$", lines[at]), f"{path} {name}"
        heads = {line for line in lines if line.rstrip(":") in set(Section)}
        assert len(names) <= 10 or len(heads) > 1, f"{path} has a long list"


def test_groups_stand_in_their_order_and_required_options_first() -> None:
    command = Command(
        "fill",
        params=[
            Option([f"--{name}"], group=group, required=required, help=f"A {name}.")
            for name, group, required in (
                ("json", HelpGroup.REPORT, False), ("views", HelpGroup.VIEWS, False),
                ("size", HelpGroup.VIEWS, False), ("out", HelpGroup.REPORT, True),
                ("a", HelpGroup.INPUT, False), ("b", HelpGroup.INPUT, False),
            )
        ],
    )  # fmt: skip
    text = _help(command, click.Context(command), 80)
    assert (
        text.split("\n\n", 1)[1]
        == """\
Required:
  --out TEXT    A out.

Input and output:
  --a TEXT      A a.
  --b TEXT      A b.

Views:
  --views TEXT  A views.
  --size TEXT   A size.

Reports:
  --json TEXT   A json.

Help:
  --help        Show this message and exit.
"""
    )


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Option(["--n"], group=HelpGroup.VIEWS, type=click.IntRange(1, 64), help="How many. "
                "[default: all]"), "How many. [default: all; 1 to 64]"),
        (Option(["--n"], group=HelpGroup.VIEWS, type=click.IntRange(0, 2**63 - 1), default=0,
                show_default=True, help="Seed."), "Seed. [default: 0]"),
        (Option(["--n"], group=HelpGroup.VIEWS, type=click.FloatRange(0, 1), default=1 / 16,
                show_default="1/16", help="Share."), "Share. [default: 1/16; 0 to 1]"),
        (Option(["--n"], group=HelpGroup.VIEWS, type=click.FloatRange(0, 1, min_open=True),
                required=True, help="Share."), "Share. [above 0, at most 1]"),
    ],
)  # fmt: skip
def test_what_holds_without_an_option_stands_in_one_bracket(option: Option, text: str) -> None:
    record = option.get_help_record(click.Context(click.Command("fill")))
    assert record is not None
    assert record[1] == text


def test_an_example_breaks_before_an_option_and_a_shell_takes_it() -> None:
    line = "  tool run --first 'a b' --second value --third other"
    broken = examples(f"Example:\n\n{line}", 30)
    assert broken == (
        "Example:\n  tool run --first 'a b' \\\n    --second value \\\n    --third other"
    )
    assert shlex.split(broken.partition("\n")[2].replace("\\\n", "")) == shlex.split(line)


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("featcache", ["extrac"], "unknown command 'extrac': did you mean extract? known: convert"),
        ("student", ["eval", "liner"], "unknown command 'liner': did you mean linear?"),
        ("featcache", ["extract", "--vews", "1"], "unknown option '--vews': did you mean --views"),
        ("student", ["eval", "knn", "--iamges", "x"], "'--iamges': did you mean --images"),
        ("featcache", ["extract", "--tokens", "rankd"], "'rankd' given; did you mean ranked?"),
        ("featcache", ["extract", "--precision", "bf61"], "'bf61' given; did you mean bf16?"),
        ("featcache", ["derive", "a", "b", "--codec", "q88"], "'q88' given; did you mean q8?"),
        ("student", ["train", "--precision", "fp61"], "'fp61' given; did you mean fp16?"),
        ("student", ["train", "--tracker", "wanbd"], "'wanbd' given; did you mean wandb?"),
        ("student", ["eval", "linear", "--pool", "men"], "'men' given; did you mean mean?"),
        ("student", ["export", "a", "--format", "tim"], "'tim' given; did you mean timm?"),
    ],
)
def test_near_names_are_proposed(program: str, words: list[str], said: str) -> None:
    with pytest.raises(click.UsageError) as failed:
        PROGRAMS[program].main(words, standalone_mode=False)
    assert said in failed.value.format_message()


def test_closed_sets_are_choices_with_near_names() -> None:
    for path, command, _ in EVERY:
        for param in command.params:
            if isinstance(param.type, click.Choice):
                assert isinstance(param.type, Choice), f"{path} {param.name}"


def test_a_list_of_commands_takes_options_of_its_own() -> None:
    group = CommandList("group", commands={"one": click.Command("one")})
    assert CliRunner().invoke(group, ["--help"]).exit_code == 0
    told = CliRunner().invoke(group, ["--hlp"]).output
    assert "unknown option '--hlp': did you mean --help?" in told


def test_closed_sets_are_those_of_the_modules_that_use_them() -> None:
    from featcache.console import params
    from featcache.extraction.plan import TOKENS
    from featcache.models import precision
    from featcache.targets.attention import ORDERS
    from student.features.frozen import POOLS
    from student.setup import eval_options, run_parameters
    from student.training import accelerator

    assert params.MASK_ORDERS == ORDERS
    assert set(params.TOKEN_ORDERS) == set(TOKENS)
    assert set(params.PRECISIONS) == set(precision.PRECISIONS)
    assert run_parameters.PRECISIONS == accelerator.PRECISIONS
    pool = next(each for each in eval_options.parameters() if each.name == "pool")
    assert isinstance(pool.type, Choice)
    assert tuple(pool.type.choices) == POOLS
