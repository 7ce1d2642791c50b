"""Both commands enter here: a user's mistake is one line and an exit status, and a signal is one
line too."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import click

from featcache.console.command import CommandList
from featcache.console.text import echo
from featcache.errors import (
    COMMAND_WRONG,
    STOPPED,
    WORK_FAILED,
    StoppedError,
    UserError,
    one_line,
    printable,
)
from featcache.runtime import compiler, imports, signals, streams, user_file

AGAIN = "stopped; run the same command again"


def entry(command: click.Command) -> None:
    """Run a command: a user's mistake is one line on stderr and exit status 1 or 2, never a
    traceback; SIGTERM and Ctrl-C are one line as well, and status 75."""
    streams.prepare()
    signals.install_handlers()
    _print_libraries_safely()
    # on odd but readable pictures; unreadable ones are quarantined
    warnings.filterwarnings("ignore", module="PIL")
    try:
        command.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as asked:
        echo(asked.ctx.get_help() if asked.ctx else "", err=True)
        sys.exit(COMMAND_WRONG)
    except BaseException as caught:
        error = caught.error if isinstance(caught, _PipeError) else caught
        if isinstance(error, BrokenPipeError) and streams.is_broken(sys.stdout):
            streams.silence(sys.stdout)  # its reader went away, as with `| head`
            return
        failure = _failure_of(error)
        if failure is None:
            raise
        echo(f"{'' if failure.in_order else 'error: '}{one_line(failure.message)}", err=True)
        sys.exit(failure.status)


class _PipeError(Exception):
    """Holds a broken pipe, of which click would make a silent exit, whatever pipe it was."""

    def __init__(self, error: BrokenPipeError) -> None:
        super().__init__(str(error))
        self.error = error


class _Formatter(logging.Formatter):
    """Writes log records, whose text may be a stranger's, as `printable` does."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Notes(logging.Handler):
    """Prints a module's warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(one_line(f"note: {self.format(record)}"), err=True)


def _print_libraries_safely() -> None:
    """Let a module's warnings, which stop nothing, be notes on stderr; those of libraries, and
    tracebacks, are printable too."""
    for name in ("featcache", "student"):
        logging.getLogger(name).handlers = [_Notes()]
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter("%(message)s"))
    warnings.formatwarning = _format_warning
    sys.excepthook = _print_traceback


_plain_warning = warnings.formatwarning


def _format_warning(*args: Any, **options: Any) -> str:
    return printable(_plain_warning(*args, **options))


def _print_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    echo("".join(traceback.format_exception(kind, error, where)), err=True, nl=False)


class _Failure(NamedTuple):
    message: str
    status: int
    in_order: bool = False  # it was asked to stop and did so, which is no error


def _failure_of(error: BaseException) -> _Failure | None:
    """The line and the exit status of what a user or the machine can cause; None for a defect of
    ours, which keeps its traceback."""
    match error:
        case UserError():
            return _Failure(str(error), error.exit_status, isinstance(error, StoppedError))
        case click.UsageError():
            where = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
            return _Failure(" ".join(error.format_message().split()) + where, COMMAND_WRONG)
        case click.ClickException():
            return _Failure(error.format_message(), WORK_FAILED)
        case click.Abort() | KeyboardInterrupt():
            return _Failure(AGAIN, STOPPED, in_order=True)
        case OSError() | MemoryError() | RuntimeError() if machine := _machine_failure(error):
            return machine
        case Exception() if signals.was_signalled():
            # what a library made of a signal while it was imported
            return _Failure(AGAIN, STOPPED, in_order=True)
        case Exception() | SystemExit() if line := user_file.failure(error):
            return _Failure(line, WORK_FAILED)
        case Exception() if told := compiler.failure(error) or imports.failure(error):
            return _Failure(told, WORK_FAILED)
    return None


def _machine_failure(error: Exception) -> _Failure | None:
    """The machine has no memory, threads or disk left, or does not give a file."""
    match error:
        case OSError() if error.errno is not None:
            what = f"{error.filename or 'system'}: {error.strerror}"
            return _Failure(f"{what}; fix this and run the same command again", WORK_FAILED)
        case MemoryError() | RuntimeError() if _is_out_of_memory(error):
            advice = "give a smaller --batch-size or --workers, or more memory"
            return _Failure(f"out of memory; {advice}", WORK_FAILED)
        case RuntimeError() if _is_thread_limit(error):
            advice = "raise the limit (`ulimit -u`) and run again"
            return _Failure(f"this process may start no more threads; {advice}", WORK_FAILED)
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory could not be had. By its text: PyTorch raises a bare RuntimeError on a CPU."""
    told = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(text in str(error) for text in told)


def _is_thread_limit(error: RuntimeError) -> bool:
    """Whether no further thread may be started. By its text: Python raises a bare RuntimeError
    without an errno here (`threading.Thread.start`), and nothing else tells it from others."""
    return "can't start new thread" in str(error)


class CommandFolder(CommandList):
    """A group finds its commands in the files of a package; each has a click command named
    `command`.

    `stopped` gives the line of a command that was interrupted, where starting it again is not all
    there is to it.
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
            raise StoppedError(self.stopped.get(ctx.invoked_subcommand or "", AGAIN)) from None
        except BrokenPipeError as error:
            raise _PipeError(error) from error

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"{self.package.__name__}.{name}").command
        assert isinstance(command, click.Command)
        return command
