"""Options that benchmarks share; paths that they write to are checked before anything is
measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from featcache.console.option import HelpGroup, option
from featcache.console.params import Choice, LocalPath
from featcache.storage.store import STORES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
AS_EXTRACT = "As for `featcache extract`."


class OldFolder(LocalPath):
    """One option takes a folder that is there."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(super().convert(value, param, ctx))
        if not path.is_dir():
            self.fail(f"{str(path)!r} is no folder that is there; make it, or give one", param, ctx)
        return path


class WorkFolder(LocalPath):
    """One option takes a folder that is there, or can be made."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(super().convert(value, param, ctx))
        above = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
        if not above.is_dir():
            self.fail(f"{str(above)!r} is no folder; give a folder, new or there", param, ctx)
        return path


class ResultsFile(LocalPath):
    """One option takes a file that can be written, in a folder that is there."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(super().convert(value, param, ctx))
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else "lies in no folder that is there"
            self.fail(f"{str(path)!r} {what}; give a file in a folder that is there", param, ctx)
        return path


def number(
    name: str, group: HelpGroup, default: int, about: str, *, least: int = 1, param: str = ""
) -> Decorator:
    """Return an option that takes a whole number; `param` is its name in the function, if it is
    another."""
    kind = click.IntRange(least)
    names = [name, *([param] if param else [])]
    return option(*names, group=group, type=kind, default=default, show_default=True, help=about)


def text(*names: str, default: str) -> Decorator:
    """Return an option of `featcache extract` that takes a text, with a default of its own."""
    return option(
        *names, group=HelpGroup.INPUT, default=default, show_default=True, help=AS_EXTRACT
    )


def reps(default: int) -> Decorator:
    """Return the option --reps."""
    return number("--reps", HelpGroup.RUNNING, default, "Repetitions; medians are shown.")


def batch_size(default: int, *, least: int = 1) -> Decorator:
    """Return the option --batch-size."""
    return number("--batch-size", HelpGroup.RUNNING, default, "Pictures a batch.", least=least)


store = option(
    "--store",
    "store_name",
    group=HelpGroup.STORAGE,
    type=Choice(list(STORES)),
    default="zarr",
    show_default=True,
    help=AS_EXTRACT,
)
levels = option(
    "--levels", group=HelpGroup.STORAGE, default="last:5", show_default=True, help=AS_EXTRACT
)
workers = option(
    "--workers",
    group=HelpGroup.RUNNING,
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    help="Decoding threads. [default: cores]",
)
device = option(
    "--device", group=HelpGroup.RUNNING, help="cpu, cuda, ... [default: cuda where there is one]"
)
folder = option(
    "--folder",
    group=HelpGroup.REPORT,
    type=OldFolder(),
    help="Where files are written while it runs. [default: the system's for temporary files]",
)
json_file = option(
    "--json",
    "json_path",
    group=HelpGroup.REPORT,
    type=ResultsFile(),
    help="Write all numbers there.",
)
