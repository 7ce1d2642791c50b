"""A process of a run that is gone, killed or out of memory, is one line in the others.

What they meet is an error of the connection to it, in whatever they wait for together next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate.state import PartialState

from featcache.errors import UserError, one_line

# gloo raises a bare RuntimeError: only its source file, in the text, tells it from a defect of ours
_GLOO = "/gloo/transport/"


@contextlib.contextmanager
def lost_process_told() -> Iterator[None]:
    """Turn a lost connection to another process of the run into one line for the user."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        state = PartialState()
        raise UserError(
            f"process {state.process_index + 1} of {state.num_processes} has lost another one, "
            f"which has ended or cannot be reached: {_reason(error)}; see what that one said last "
            "and whether the machine's memory was full, and go on with --resume"
        ) from None


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or _GLOO in str(error)


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of torch's message, without the place in its source."""
    first = one_line(str(error).strip().partition("\n")[0]).partition(". ")[0]
    return first.rpartition("] ")[2] if first.startswith("[") else first
