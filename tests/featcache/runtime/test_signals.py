"""Signals stop a program wherever they come."""

from __future__ import annotations

import os
import signal

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


def test_what_a_launcher_hands_on_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and scancel reach each process, and once more by way of torchrun; a second Ctrl-C
    without a launcher is one, however soon it comes."""
    clock = iter([10.0, 10.2, 11.1, 12.2, 20.0, 20.2])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(signals, "_heard", {})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [signals.is_echo(signal.SIGINT) for _ in range(4)] == [False, True, False, False]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert [signals.is_echo(signal.SIGINT) for _ in range(2)] == [False, False]


def test_a_notice_twice_stops_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first is being heard, and may not break what cleans up."""
    monkeypatch.setattr(signals, "_heard", {})
    before = signal.getsignal(signal.SIGTERM)
    signals.install_handlers()
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.was_signalled()
    finally:
        signal.signal(signal.SIGTERM, before)
        signals._received.clear()
