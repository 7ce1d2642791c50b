"""A Python call is compared with the command that it stands for, option by option."""

from __future__ import annotations

import contextlib
import inspect
import logging
import signal
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from featcache.console import keywords
from featcache.runtime import signals

# of a call alone
CALLS_OWN = {"progress"}


def differences(
    call: Callable[..., Any], parameters: Sequence[click.Parameter], others: Sequence[str] = ()
) -> list[str]:
    """What a call and a command do not share: names, defaults, choices and kinds."""
    found = keywords.keywords(parameters)
    signature = inspect.signature(call).parameters
    named = {
        name
        for name, each in signature.items()
        if each.kind is not inspect.Parameter.VAR_KEYWORD and name not in CALLS_OWN | set(others)
    }
    told = [f"{name} is missing" for name in found.keys() - named]
    told += [f"{name} is no option" for name in named - found.keys()]
    hints = typing.get_type_hints(call)
    for name in named & found.keys():
        told += _of_one(name, signature[name], hints[name], found[name])
    return sorted(told)


def _of_one(name: str, here: inspect.Parameter, hint: Any, param: click.Parameter) -> list[str]:
    told = []
    required = here.default is inspect.Parameter.empty
    if required != param.required or (not required and here.default != keywords.default(param)):
        told.append(f"{name}={here.default!r}, {keywords.default(param)!r} by the option")
    kinds = [*typing.get_args(hint), hint]
    literals = {v for kind in kinds for v in typing.get_args(kind) if isinstance(v, str)}
    choices = set(param.type.choices) if isinstance(param.type, click.Choice) else set()
    if literals != choices:
        told.append(f"{name}: {literals} and {choices}")
    kind = _kind(param)
    if kind is not None and kind not in kinds:
        told.append(f"{name} is {hint}, {kind} by the option")
    return told


def _kind(param: click.Parameter) -> type | None:
    match param.type:
        case click.types.BoolParamType():
            return bool
        case click.types.IntParamType():
            return int
        case click.types.FloatParamType():
            return float
    return None if isinstance(param.type, click.Choice) else str


def silence() -> None:
    """Take away the handlers of logs that a command set up."""
    for name in ("featcache", "student"):
        logging.getLogger(name).handlers = [logging.NullHandler()]


@contextlib.contextmanager
def own_program(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[None]:
    """Logs and signals as in a program that never ran a command of ours, and afterwards as
    before."""
    for name in ("featcache", "student"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.NullHandler()])
    monkeypatch.setenv("FEATCACHE_HOME", str(home))
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)
    plain: dict[int, Any] = dict.fromkeys(signals.NOTICES, signal.SIG_DFL)
    plain[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals._received.clear()
