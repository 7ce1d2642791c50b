"""Signals stop a program wherever they come."""

from __future__ import annotations

import os

import pytest

from featcache.runtime import signals
from tests.conftest import python

IN_CALLBACK = """
import ctypes, os, signal, time
from featcache.runtime import signals

signals.install_handlers()

@ctypes.CFUNCTYPE(None)
def callback():
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)

try:
    callback()
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped", signals.was_signalled())
else:
    print("went on")
"""


def test_a_signal_in_a_librarys_callback_is_not_lost() -> None:
    """Python ignores what is raised there, and prints it."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        ran = python(IN_CALLBACK.format(name=name))
        assert ran.stdout == "stopped True\n"
        assert ran.stderr == ""


def test_a_process_knows_that_its_launcher_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the parent's number, which changes; a program that no launcher started has none."""
    signals.install_handlers()
    parent = os.getppid()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not signals.launcher_has_ended()
    monkeypatch.setattr(os, "getppid", lambda: 1 if parent != 1 else 2)
    assert signals.launcher_has_ended()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # by hand, which is no launcher
    assert not signals.launcher_has_ended()
