"""What a device has computed is read later on a GPU, and at once on a CPU; times are those of its
queue."""

from __future__ import annotations

import time

import pytest
import torch

from featcache.errors import UserError
from featcache.runtime.device_clock import Seconds, StepClock
from student.data.device_queue import LateChecks, LateNumbers, Rate, lag

CPU = torch.device("cpu")


def told() -> None:
    raise UserError("the flag is up")


def test_on_a_cpu_numbers_are_there() -> None:
    assert lag(CPU) == 0
    numbers = LateNumbers(torch.tensor([0.5, float("nan"), 2.0]))
    assert [numbers.number(i).item() for i in (0, 2)] == [0.5, 2.0]
    assert numbers.read().isnan().tolist() == [False, True, False]


def test_flags_are_looked_at_when_they_have_come_of_age() -> None:
    up, down = torch.tensor(True), torch.tensor(False)
    checks = LateChecks(2)
    for raised in (down, up, down):
        checks.add(raised, told)
    with pytest.raises(UserError, match="the flag is up"):
        checks.add(down, told)
    checks.look()  # it was told; the others are down
    checks.add(up, told)
    with pytest.raises(UserError):
        checks.look()
    with pytest.raises(UserError):
        LateChecks(0).add(up, told)


def test_rates_and_times() -> None:
    assert Rate(64, Seconds(0.25)).item() == 256.0
    clock = StepClock(CPU)
    time.sleep(0.02)
    seconds = clock.seconds()
    assert 0.02 <= seconds.item() < 2
    assert seconds.item() == seconds.item()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_newest_work() -> None:
    """Numbers of before are read while long work is still in the queue."""
    device = torch.device("cuda")
    busy = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    clock = StepClock(device)
    numbers = LateNumbers(torch.full((2,), 3.0, device=device))
    done = torch.cuda.Event()
    for _ in range(40):
        busy = torch.nn.functional.normalize(busy @ busy)
    done.record()
    assert numbers.number(1).item() == 3.0
    assert not done.query()
    seconds = clock.seconds().item()
    assert done.query()
    assert seconds > 0
