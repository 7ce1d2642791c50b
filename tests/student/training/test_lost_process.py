"""A process that is gone is one line in the others; what is no lost connection keeps its error."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from featcache.errors import UserError
from student.training.lost_process import lost_process_told
from tests import student_fixtures as fx

# as gloo says it on a CPU
GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by "
    "peer [127.0.0.1]:4992. This is typically caused by a remote worker crashing. Check its logs."
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(GLOO), "Connection closed by peer [127.0.0.1]:4992"),
        (torch.distributed.DistNetworkError("timed out\nmore"), "timed out"),
    ],
    ids=["gloo", "torch"],
)
def test_a_lost_connection_is_one_line(error: RuntimeError, reason: str) -> None:
    fx.fresh_state()
    Accelerator(cpu=True)
    with pytest.raises(UserError) as caught, lost_process_told():
        raise error
    assert str(caught.value) == (
        "process 1 of 1 has lost another one, which has ended or cannot be reached: "
        f"{reason}; see what that one said last and whether the machine's memory was full, and go "
        "on with --resume"
    )


def test_another_error_stays_what_it_is() -> None:
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as caught, lost_process_told():
        raise error
    assert caught.value is error
