"""SIGTERM is handled as orderly as Ctrl-C, from a program's first moment on: one line, never
silence and never a traceback. SIGUSR1 and SIGUSR2 mean the same, since Slurm's --signal sends them.

Only the standard library is imported here, so that `guard` can stand before everything that takes
long to import.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_AGAIN_S = 0.05  # until a callback is left
_ECHO_S = 1.0  # between what all processes hear and what their launcher hands on
_received: list[int] = []
_heard: dict[int, float] = {}  # number of a signal -> when it came, but for echoes
# what torchrun sets for its processes, and `accelerate launch` where it starts one alone
_LAUNCHED = (
    {"TORCHELASTIC_RUN_ID"},
    {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"},
)
_begun = {os.getpid(): os.getppid()}  # this process -> the one that started it

# what a scheduler sends to a job that has to end; a system without one of them lacks the name
NOTICES = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def install_handlers() -> None:
    """Let a scheduler's notice raise KeyboardInterrupt too; other threads than the first cannot set
    this, and need not."""
    _received.clear()
    _heard.clear()
    _begun.setdefault(os.getpid(), os.getppid())  # another one's after a fork
    if threading.current_thread() is threading.main_thread():
        for number in (*NOTICES, signal.SIGINT):
            # as under nohup, or in the background of a script
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _raise_again


def _stop(number: int, frame: FrameType | None) -> None:
    echo = is_echo(number)
    _received.append(number)
    if not echo:
        raise KeyboardInterrupt


def is_echo(number: int) -> bool:
    """Note a signal, and return whether it only repeats the one before: a launcher hands on what a
    terminal or a scheduler has sent to all of its processes already."""
    now = time.monotonic()
    if now - _heard.get(number, -math.inf) < _ECHO_S and (number in NOTICES or is_launched()):
        return True
    _heard[number] = now
    return False


def _raise_again(ignored: sys.UnraisableHookArgs) -> None:
    """Send a signal again that was raised in a library's callback, where Python prints an exception
    and goes on: numba compiles with such."""
    if not (isinstance(ignored.exc_value, KeyboardInterrupt) and _received):
        sys.__unraisablehook__(ignored)
        return
    # a real signal, which also ends a system call that waits
    main = threading.main_thread().ident
    _heard.clear()  # it was not heard
    again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, _received[-1]))
    again.daemon = True
    again.start()


def was_signalled() -> bool:
    """Return whether a signal came; a library that was being imported may have made another error
    of it."""
    return bool(_received)


def ignore_notices() -> None:
    """Let a scheduler's further notices do nothing to a program that is about to end: a launcher
    sends one to the others as soon as the first of them has ended, and their status would be lost.
    """
    if threading.current_thread() is threading.main_thread():
        for number in NOTICES:
            signal.signal(number, signal.SIG_IGN)


def is_launched() -> bool:
    """Return whether torchrun or `accelerate launch` started this process."""
    return any(os.environ.keys() >= names for names in _LAUNCHED)


def launcher_has_ended() -> bool:
    """Return whether torchrun, or `accelerate launch`, started this process and is no longer there:
    a signal that it does not know ends it alone, and nobody waits for its processes any more."""
    begun = _begun.get(os.getpid())
    return is_launched() and begun not in (None, os.getppid())


@contextlib.contextmanager
def guard_imports(status: int) -> Iterator[None]:
    """Guard a program's imports: stopped there, it says that nothing was begun."""
    install_handlers()
    try:
        yield
    except BaseException:
        if not was_signalled():
            raise
        print(  # noqa: T201 (imports that print may be what was stopped)
            "stopped before anything was begun; run the same command again", file=sys.stderr
        )
        sys.exit(status)
