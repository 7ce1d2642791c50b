"""The `student` command finds each of its commands in a file of `commands/`, by name."""

from __future__ import annotations

import click

from featcache.console.entry import CommandFolder, entry
from student import commands


@click.group(
    cls=CommandFolder,
    package=commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="featcache")
def cli() -> None:
    """Train and evaluate students from a featcache cache, with no teacher in memory."""


def main() -> None:
    """Run the command line."""
    entry(cli)
