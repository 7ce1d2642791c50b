"""The `featcache` command. Each command is a file in `commands/`, found by its name there and imported when it is
called, so that `featcache info` never waits for torch.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from typing import Any

import click

from featcache import commands
from featcache.errors import COMMAND_WRONG, WORK_FAILED, UserError
from featcache.runtime import signals as stopping

AGAIN = "stopped; run the same command again"
_CONTINUES = "stopped; what was complete is kept, the same command continues"
# What a command says that was stopped, where starting it again is not all there is to it.
STOPPED = {
    **dict.fromkeys(("extract", "convert", "copy", "repair"), _CONTINUES),
    "rm": "stopped; the same command removes what is left, `featcache gc` what was half removed",
}


def entry(command: click.Command, stopped_status: int = WORK_FAILED) -> None:
    """Run a command: a user's mistake is one line on stderr and exit status 1 or 2, never a traceback; SIGTERM and
    Ctrl-C are one line as well."""
    stopping.orderly()
    _notes()
    warnings.filterwarnings("ignore", module="PIL")  # on odd but readable pictures; unreadable ones are quarantined
    try:
        command.main(standalone_mode=False)
    except UserError as error:
        sys.exit(_fail(str(error), error.exit_status))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(COMMAND_WRONG)
    except click.UsageError as error:
        where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        sys.exit(_fail(" ".join(error.format_message().split()) + where, COMMAND_WRONG))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message(), WORK_FAILED))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail(AGAIN, stopped_status))
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(_fail(f"{error.filename or 'system'}: {error.strerror}; mend this and run the same command again", 1))
    except MemoryError:
        sys.exit(_fail("out of memory; give a smaller --batch-size or --workers, or more memory", WORK_FAILED))
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        sys.exit(_fail("this process may start no more threads; raise the limit (`ulimit -u`) and run again", 1))
    except Exception:  # what a library made of a signal while it was imported
        if not stopping.was_stopped():
            raise
        sys.exit(_fail(AGAIN, stopped_status))


def _notes() -> None:
    """What a module has to say without stopping is a note on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logging.getLogger("featcache").handlers = [handler]


def _fail(message: str, status: int) -> int:
    click.echo(f"error: {message}", err=True)
    return status


class _Commands(click.Group):
    """The files of `commands/`; each has a click command named `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise UserError(STOPPED.get(ctx.invoked_subcommand or "", AGAIN)) from None

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{commands.__name__}.{name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="featcache")
def cli() -> None:
    """Run a frozen teacher once over replayable augmented views; keep what students learn from in open formats."""


def main() -> None:
    entry(cli)
