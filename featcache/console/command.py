"""Commands, and lists of them, have help that a newcomer reads: options in headed groups, examples
that a shell takes as they stand, one line a command, and near names for a mistyped one."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import click

from featcache.console import picture_options
from featcache.console.option import HelpGroup, group_of
from featcache.errors import near, short

FEW = 6  # options that need no groups
_INDENT = "  "
_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class Section(enum.StrEnum):
    """Name the headings that a list of commands has, in the order in which they stand there."""

    COMMANDS = "Commands"
    MAKE = "Make a cache"
    TRAIN = "Train students, and judge them"
    LOOK = "Look at what is there"
    KEEP = "Keep caches sound"


WORDS = "featcache.console.words"  # of a command line, as they were given; in a context's `meta`


class _KnowsOptions(click.Command):
    """Answers a mistyped option with near ones; all that are known stand in the help, which click's
    error names. `unknown` may say what else a name is."""

    def __init__(
        self, *args: Any, unknown: Callable[[str], str] = lambda name: "", **attrs: Any
    ) -> None:
        super().__init__(*args, **attrs)
        self.unknown = unknown

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            close = ", ".join(error.possibilities or ())
            hint = f"did you mean {close}?" if close else ""
            hint = self.unknown(error.option_name) or hint
            name = short(error.option_name)
            raise click.UsageError(f"unknown option {name}{': ' * bool(hint)}{hint}", ctx) from None


class Command(_KnowsOptions):
    """A command whose help has its options in groups; `section` is its heading in the list of
    commands."""

    def __init__(self, *args: Any, section: Section = Section.COMMANDS, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section
        if self.callback is not None:
            self.callback = picture_options.wrapped(self.callback, self.params)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of options below its heading."""
        records = {
            heading: [record for param in params if (record := param.get_help_record(ctx))]
            for heading, params in option_groups(self, ctx).items()
        }
        # one column for all groups, as far as their names allow
        names = [len(name) for each in records.values() for name, _ in each]
        column = min(max(names, default=0), _column(formatter))
        for heading, rows in records.items():
            with formatter.section(heading):
                _write_rows(formatter, rows, column)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples so that no line of theirs is wider than the help."""
        if self.epilog:
            formatter.write(f"\n{examples(self.epilog, formatter.width)}\n")


def _column(formatter: click.HelpFormatter) -> int:
    """Return the width of options' names that leaves room for their texts."""
    return max(20, formatter.width // 3)


def _write_rows(formatter: click.HelpFormatter, rows: list[tuple[str, str]], column: int) -> None:
    """Write options and their texts, whose lines break between words: a hyphen belongs to the name
    of an option, of a file or of a part of the pictures' text."""
    start = len(formatter.buffer)
    whole = [(name.ljust(column), text.replace("-", _HYPHEN)) for name, text in rows]
    formatter.write_dl(whole, col_max=column)
    formatter.buffer[start:] = [each.replace(_HYPHEN, "-") for each in formatter.buffer[start:]]


def option_groups(command: click.Command, ctx: click.Context) -> dict[str, list[click.Parameter]]:
    """Return a command's options by the headings of its help, those that are required first."""
    options: list[click.Parameter] = [
        each
        for each in command.get_params(ctx)
        if isinstance(each, click.Option) and not each.hidden
    ]
    grouped: dict[str, list[click.Parameter]] = {
        str(heading): found
        for heading in HelpGroup
        if (found := [each for each in options if group_of(each) is heading])
    }
    if len(grouped.get(HelpGroup.FILE, ())) == 1:  # click's own --help
        grouped[HelpGroup.HELP] = grouped.pop(HelpGroup.FILE)
    if len(options) > FEW:
        return grouped
    return {"Options": [each for found in grouped.values() for each in found]}


# --- examples -------------------------------------------------------------------------------------


def examples(epilog: str, width: int) -> str:
    r"""Return an epilog of examples, each line at most so wide; a command goes on in the next line
    after a backslash, as a shell takes it.

    >>> print(examples("Example:\n\n  featcache pack photos packed --shard-size 1000", 40))
    Example:
      featcache pack photos packed \
        --shard-size 1000
    """
    plain = epilog.strip("\n").replace("\\\n", "")
    lines = [line for line in plain.splitlines() if line.strip()]
    return "\n".join(
        part
        for line in lines
        for part in (_broken(line.split(), width) if line.startswith(_INDENT) else [line])
    )


def _broken(words: list[str], width: int) -> Iterator[str]:
    """Break a command line, if it is too wide, before its options; an option keeps its value."""
    line = _INDENT
    for unit in _units(words):
        joined = f"{line} {unit}" if line.strip() else f"{line}{unit}"
        if line.strip() and len(joined) > width - 2:
            yield f"{line} \\"
            joined = f"{_INDENT * 2}{unit}"
        line = joined
    yield line


def _units(words: list[str]) -> list[str]:
    """Join each option with its value, and what is quoted."""
    units: list[str] = []
    for before, word in pairwise(["", *words]):
        is_value = before.startswith("-") and not word.startswith("-")
        if units and (is_value or _is_open(units[-1])):
            units[-1] += f" {word}"
        else:
            units.append(word)
    return units


def _is_open(text: str) -> bool:
    """Tell whether a quotation goes on."""
    try:
        shlex.split(text)
    except ValueError:
        return True
    return False


# --- lists of commands ----------------------------------------------------------------------------


class CommandList(_KnowsOptions, click.Group):
    """A group lists its commands by their sections, and knows near names of them; it has a section
    itself in the list above it."""

    def __init__(self, *args: Any, section: Section = Section.COMMANDS, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.section = section

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        names = self.list_commands(ctx)
        if name not in names and not name.startswith("-"):
            raise click.UsageError(f"unknown command {name!r}: {near(name, names)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line for each command."""
        sections: dict[Section, list[tuple[str, str]]] = {section: [] for section in Section}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            assert command is not None, name
            section = getattr(command, "section", Section.COMMANDS)
            sections[section].append((name, command.get_short_help_str(limit=200)))
        for section, rows in sections.items():
            if not rows:
                continue
            with formatter.section(section):
                formatter.write_dl(rows)
