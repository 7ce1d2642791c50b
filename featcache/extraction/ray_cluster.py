"""A Ray cluster is joined where there is one, or started on this machine for as long as the work
takes.

Ray is imported here alone. It sets handlers of signals and an exception hook of its own, ends the
program where a cluster does not answer for two minutes, and reports its use over the network: none
of this is left to it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil

from featcache.errors import UsageError, UserError, counted, short
from featcache.runtime import signals

INSTALL = "pip install 'featcache[ray]'"
CONNECT_S = 5.0  # until an address must answer
ENDS_S = 15.0  # until processes that were told to end must have done so
STORE_BYTES = 78_643_200  # of Ray's object store, the least it takes: nothing large goes through it
_FORM = "auto, HOST:PORT or ray://HOST:PORT"
# Of Ray's, unless the user set them: it reports no use, and prints no lines of its own on stdout.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "^"}


def ray_module() -> Any:
    """Import Ray; UsageError where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError(f"--engine ray needs the package ray; run `{INSTALL}`")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _own_hooks():
        import ray
    _silence_loggers()
    return ray


def _silence_loggers() -> None:
    """Let Ray log nothing here; Ray Client sets the level again as it connects."""
    for name in ("ray", "ray.client_builder", "ray.util.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _own_hooks() -> Iterator[None]:
    """Keep the handlers of signals and the exception hook that are there."""
    hook, numbers = sys.excepthook, (*signals.NOTICES, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        sys.excepthook = hook
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)


class Node(NamedTuple):
    """Says of a node that is alive what Ray does."""

    id: str
    name: str
    resources: dict[str, float]


def alive_nodes(ray: Any) -> list[Node]:
    """Return the nodes of the cluster."""
    return [
        Node(each["NodeID"], _name(each), dict(each["Resources"]))
        for each in ray.nodes()
        if each["Alive"]
    ]


def _name(node: dict[str, Any]) -> str:
    host, address = str(node["NodeManagerHostname"]), str(node["NodeManagerAddress"])
    return f"{host} ({address})"


@contextlib.contextmanager
def connected(address: str | None, say: Callable[[str], None]) -> Iterator[Any]:
    """Yield Ray, connected to the cluster at `address`, or $RAY_ADDRESS, or to one that is started
    here and ends with the work. A program that is connected already stays so."""
    ray = ray_module()
    if ray.is_initialized():
        if address is not None:
            raise UsageError(
                f"--address {address!r}: this program is connected to a Ray cluster already; "
                "leave it out, or call ray.shutdown() before"
            )
        yield ray
        return
    found = find_address(address)
    if found is None:
        with _own_cluster(ray, say):
            yield ray
        return
    check_answers(*found)
    try:
        _connect(ray, address=found[1])
        nodes = alive_nodes(ray)
        say(f"note: joined the Ray cluster at {found[1]}: {counted(len(nodes), 'node')}")
        yield ray
    finally:
        with _own_hooks():
            ray.shutdown()


def find_address(given: str | None) -> tuple[str, str] | None:
    """Return how the cluster was named, and its address; None where one is to be started here.
    Raises UsageError for what is no address, UserError where `auto` finds none."""
    variable = os.environ.get("RAY_ADDRESS") or None
    named = "RAY_ADDRESS" if given in (None, "auto") and variable else "--address"
    address = variable if given in (None, "auto") and variable else given
    if address is None or (address == "local" and named == "RAY_ADDRESS"):
        return None
    if address == "auto":
        address = _found_here()
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        raise UsageError(f"{named} {short(address)}: {_FORM} is needed")
    return named, address


def _found_here() -> str:
    """Return the address of a cluster that this machine is a node of."""
    from ray._private import services

    try:
        found: str = services.canonicalize_bootstrap_address_or_die("auto")
    except (ConnectionError, ValueError) as error:
        raise UserError(
            "--address auto: this machine is no node of a running Ray cluster, or of several; "
            f"name one, HOST:PORT or ray://HOST:PORT ({str(error).partition('.')[0]})"
        ) from error
    return found


def check_answers(named: str, address: str) -> None:
    """Raise UserError where nobody answers at an address within some seconds, or no such server as
    Ray has: Ray itself would try for two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
            pass
    except OSError as error:
        raise _no_answer(named, address, error.strerror or str(error)) from error
    if os.environ.get("RAY_USE_TLS") in (None, "0"):
        _check_grpc(named, address)


def _check_grpc(named: str, address: str) -> None:
    try:
        import grpc
    except ImportError as error:
        raise UsageError(f"--engine ray needs the package grpcio; run `{INSTALL}`") from error
    channel = grpc.insecure_channel(
        address.removeprefix("ray://"), options=[("grpc.enable_http_proxy", 0)]
    )
    try:
        grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
    except grpc.FutureTimeoutError as error:
        raise _no_answer(named, address, "what listens there is no Ray") from error
    finally:
        channel.close()


def _no_answer(named: str, address: str, why: str) -> UserError:
    return UserError(
        f"{named} {short(address)}: no Ray cluster answers there: {why}; see that its head runs "
        f"(`ray status`) and that this machine reaches it; {_FORM} is allowed"
    )


def _connect(ray: Any, *, address: str, **options: Any) -> None:
    """Connect; what Ray makes of a wrong cluster is one line."""
    quiet = {} if address.startswith("ray://") else {"configure_logging": False}
    try:
        with _own_hooks():
            ray.init(address=address, log_to_driver=False, **quiet, **options)
    except SystemExit as error:  # Ray's own handler, set meanwhile, makes this of SIGTERM
        raise KeyboardInterrupt from error
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        # Ray Client sends a traceback, whose last line says what it is
        lines = str(error).strip().splitlines() or [type(error).__name__]
        is_trace = any(line.startswith("Traceback") for line in lines)
        reason = " ".join((lines[-1] if is_trace else str(error)).split())[:300]
        raise UserError(
            f"the Ray cluster at {address!r} cannot be used: {reason}; its nodes and this machine "
            "need the same versions of Ray and Python"
        ) from error
    _silence_loggers()


@contextlib.contextmanager
def _own_cluster(ray: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Start a cluster of this machine alone, and end all of its processes."""
    before = set(psutil.Process().children())
    daemons: list[psutil.Process] = []
    try:
        _connect(ray, address="local", include_dashboard=False, object_store_memory=STORE_BYTES)
        daemons = [each for each in psutil.Process().children() if each not in before]
        say("note: started Ray on this machine alone; --address joins a cluster")
        yield
    finally:
        started = daemons or [each for each in psutil.Process().children() if each not in before]
        below = [each for daemon in started for each in _below(daemon)]
        with _own_hooks():
            ray.shutdown()
        end_all([*started, *below] if daemons else [])


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def end_all(processes: list[psutil.Process]) -> None:
    """Wait for processes that were told to end, and kill those that do not."""
    _, alive = psutil.wait_procs(processes, ENDS_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, ENDS_S)
