"""The entry point of both commands: a user's mistake is one line and an exit status, a signal is
one line too."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import click

from featcache.errors import COMMAND_WRONG, WORK_FAILED, UserError
from featcache.runtime import signals

AGAIN = "stopped; run the same command again"


def entry(command: click.Command, stopped_status: int = WORK_FAILED) -> None:
    """Run a command: a user's mistake is one line on stderr and exit status 1 or 2, never a
    traceback; SIGTERM and Ctrl-C are one line as well."""
    signals.install_handlers()
    _notes()
    # on odd but readable pictures; unreadable ones are quarantined
    warnings.filterwarnings("ignore", module="PIL")
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
        sys.exit(
            _fail(
                f"{error.filename or 'system'}: {error.strerror}; mend this and run the same "
                "command again",
                1,
            )
        )
    except MemoryError:
        sys.exit(
            _fail(
                "out of memory; give a smaller --batch-size or --workers, or more memory",
                WORK_FAILED,
            )
        )
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        sys.exit(
            _fail(
                "this process may start no more threads; raise the limit (`ulimit -u`) and run "
                "again",
                1,
            )
        )
    except Exception:  # what a library made of a signal while it was imported
        if not signals.was_signalled():
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


class CommandFolder(click.Group):
    """A group whose commands are the files of a package; each has a click command named `command`.

    `stopped`: what a command says that was interrupted, where starting it again is not all there is
    to it.
    """

    def __init__(
        self,
        *args: Any,
        package: ModuleType,
        stopped: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.package, self.stopped = package, stopped

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(self.package.__path__))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if self.stopped is None:
                raise
            raise UserError(self.stopped.get(ctx.invoked_subcommand or "", AGAIN)) from None

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{self.package.__name__}.{name}").command
        assert isinstance(command, click.Command)
        return command
