"""Temporary files and leases name their writer, HOST-PID-NONCE, so that others can tell whether it
still runs."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from functools import lru_cache
from pathlib import Path


def writer_id() -> str:
    """Who writes a temporary file: HOST-PID-NONCE; the nonce begins with the process's start time,
    so that another process that gets the same number later is not taken for it."""
    return f"{_host()}-{os.getpid()}-{_started(os.getpid()) or 0:x}x{secrets.token_hex(4)}"


def is_own(name: str) -> bool:
    """Whether HOST-PID-NONCE is a name of this very process."""
    return name.rpartition("x")[0] == writer_id().rpartition("x")[0]


@lru_cache(1)
def _host() -> str:
    """This machine, or this container of it: process numbers mean the same only within one."""
    try:
        space = hashlib.blake2b(
            os.readlink("/proc/self/ns/pid").encode(),  # noqa: PTH115
            digest_size=2,
        ).hexdigest()
    except OSError:
        space = "0"
    return f"{socket.gethostname().replace('.', '_')}+{space}"


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where it has ended (zombies have), or
    no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def is_here(owner: str) -> bool:
    """Whether the writer HOST-PID-NONCE ran where we run."""
    return owner.rpartition("-")[0].rpartition("-")[0] == _host()


def is_alive(owner: str) -> bool:
    """Whether the writer HOST-PID-NONCE may still run: another host's is taken to be alive."""
    if not is_here(owner):
        return True
    rest, _, nonce = owner.rpartition("-")
    try:
        pid = int(rest.rpartition("-")[2])
        os.kill(pid, 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return f"{_started(pid) or 0:x}" == nonce.partition("x")[0]
