"""The options of `--engine` are checked together: those that contradict each other are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featcache.console.extract_options import ExtractOptions
from featcache.errors import UsageError
from featcache.runtime.numbers import parse_range

if TYPE_CHECKING:
    from featcache.extraction.engine import EngineOptions

LOCAL = "local"
_DEVICES = ("cpu", "cuda")  # the cluster says which one of several


def check_engine(options: ExtractOptions) -> None:
    """Raise UsageError for options of another engine than the one that is asked for."""
    if options.engine == LOCAL:
        _refuse_without_engine(options)
        return
    engine = f"--engine {options.engine}"
    for option, value in (("--devices", options.devices), ("--shard", options.share)):
        if value is not None:
            raise UsageError(
                f"{option} {value} and {engine}: the cluster decides who makes which shards; "
                "leave one out"
            )
    if options.device not in (None, *_DEVICES):
        raise UsageError(
            f"--device {options.device!r} and {engine}: {' or '.join(_DEVICES)} is allowed, since "
            "the cluster decides which one each actor gets"
        )
    if options.device == "cpu" and options.gpus_per_actor is not None:
        raise UsageError(
            f"--device cpu and --gpus-per-actor {options.gpus_per_actor:g}: actors on a CPU need "
            "no GPU; leave one out"
        )


def _refuse_without_engine(options: ExtractOptions) -> None:
    given = {
        "--address": options.address,
        "--actors": options.actors,
        "--gpus-per-actor": options.gpus_per_actor,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} {value} is an option of a cluster: give --engine ray with it, or leave "
                "it out"
            )


def engine_options(options: ExtractOptions) -> EngineOptions:
    """Return what the engine is asked for."""
    from featcache.extraction.engine import EngineOptions

    return EngineOptions(
        address=options.address,
        actors=None if options.actors is None else parse_range(options.actors),
        gpus_per_actor=options.gpus_per_actor,
        device=options.device,
    )
