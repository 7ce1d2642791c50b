"""An option of a command says where it is declared which group of the command's help it is in."""

from __future__ import annotations

import enum
import functools
import re
from typing import Any

import click

# click's own note on the range of a number, such as `; 0<=x<=1` or `x>=0` before a bracket
_RANGE = re.compile(r"(?:; )?(?<![^\[ ])(?:[-+\w.]+<=?)?x(?:[<>]=?[-+\w.]+)?(?=[;\]])")
_LARGE = 10**6  # an end of a range that nobody meets is not told


class HelpGroup(enum.StrEnum):
    """Name the groups of options that a help has, in the order in which they stand there."""

    REQUIRED = "Required"  # those that click asks for, whatever their own group is
    INPUT = "Input and output"
    PICTURES = "Labelled pictures"
    VIEWS = "Views"
    STORAGE = "What is stored"
    TEACHER = "Teacher"
    TARGETS = "Targets"
    TRAINING = "Training"
    SHOWN = "Cached views that are shown"
    FEATURES = "Features"
    PROTOCOL = "Protocol"
    READING = "Reading the cache"
    CHECKPOINTS = "Checkpoints"
    CHECKS = "Checks"
    RUNNING = "Running"
    SHARING = "Several processes"
    REPORT = "Reports"
    FILE = "Options from a file, and help"
    HELP = "Help"  # of a command that reads no file


class Option(click.Option):
    """An option of a command, with its group in the help."""

    def __init__(self, *args: Any, group: HelpGroup, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        self.group = group
        if self.metavar is None and not self.is_flag:
            self.metavar = _metavar(self.type)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its text, with one bracket of what holds without it."""
        record = super().get_help_record(ctx)
        return record and (record[0], self._told(record[1]))

    def _told(self, text: str) -> str:
        text = _RANGE.sub("", text, count=1)
        text = re.sub(r" *\[(?:; )?\]$", "", re.sub(r"; required\]$", "]", text))
        text = text.replace("]  [", "; ").replace("  [", " [")
        text = re.sub(r"default: \(([^()]*)\)", r"default: \1", text)
        if span := range_text(self.type):
            text = f"{text[:-1]}; {span}]" if text.endswith("]") else f"{text} [{span}]"
        return text.replace(" [required]", "")


option = functools.partial(click.option, cls=Option)


def group_of(param: click.Parameter) -> HelpGroup:
    """Return the group of an option: its own, unless it is required; click's are at the end."""
    if param.required:
        return HelpGroup.REQUIRED
    return param.group if isinstance(param, Option) else HelpGroup.FILE


def _metavar(kind: click.ParamType) -> str | None:
    """Return what stands for a value in help; None where click's own word says enough."""
    if isinstance(kind, click.types.IntParamType):
        return "N"
    return "NUMBER" if isinstance(kind, click.types.FloatParamType) else None


def range_text(kind: click.ParamType) -> str:
    """Return which numbers are allowed, as far as nobody would guess it.

    >>> range_text(click.IntRange(1, 64)), range_text(click.IntRange(1, 10**9))
    ('1 to 64', '')
    >>> range_text(click.FloatRange(0, 1, min_open=True, max_open=True))
    'between 0 and 1'
    >>> range_text(click.FloatRange(0, 1, min_open=True)), range_text(click.IntRange(2))
    ('above 0, at most 1', 'at least 2')
    """
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return ""
    low, high = kind.min, kind.max
    if high is None or high >= _LARGE:
        return f"at least {low:g}" if low is not None and low > 1 else ""
    if low is None:
        return f"{'below' if kind.max_open else 'at most'} {high:g}"
    if kind.min_open and kind.max_open:
        return f"between {low:g} and {high:g}"
    if kind.min_open:
        return f"above {low:g}, at most {high:g}"
    return f"{low:g} to {high:g}" if not kind.max_open else f"at least {low:g}, below {high:g}"
