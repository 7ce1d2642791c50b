"""The `featcache` command finds each of its commands in a file of `commands/`, by name.

The file is imported when it is called, so that `featcache info` never waits for torch.
"""

from __future__ import annotations

import click

from featcache import commands
from featcache.console.entry import CommandFolder, entry

_CONTINUES = "stopped; what was complete is kept, the same command continues"
# What a command says that was stopped, where starting it again is not all there is to it.
STOPPED = {
    **dict.fromkeys(("extract", "convert", "copy", "repair"), _CONTINUES),
    "rm": "stopped; the same command removes what is left, `featcache gc` what was half removed",
}


@click.group(
    cls=CommandFolder,
    package=commands,
    stopped=STOPPED,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="featcache")
def cli() -> None:
    """Run a frozen teacher once over replayable augmented views; keep what students learn from in
    open formats."""


def main() -> None:
    """Run the command line."""
    entry(cli)
