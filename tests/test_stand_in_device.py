"""The stand-in for a GPU counts each kind of wait, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.runtime import device as devices
from student.targets import buffers
from tests import stand_in_device as stand_in
from tests import student_fixtures as fx
from tests.stand_in_device import DEVICE


def there(values: Any) -> Tensor:
    """Copy to the device as the trainer does, from page-locked memory without waiting."""
    return torch.as_tensor(values).pin_memory().to(DEVICE, non_blocking=True)


WAITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x[0].item(), "_local_scalar_dense"),
    "float": (lambda x: float(x[0]), "_local_scalar_dense"),
    "int": (lambda x: int(x[0]), "_local_scalar_dense"),
    "bool": (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
    "if": (lambda x: 1 if (x > 0).any() else 0, "_local_scalar_dense"),
    "a number as an index": (lambda x: x[x.argmax()], "_local_scalar_dense"),
    "equal": (lambda x: torch.equal(x, x * 1), "equal"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "asarray": (np.asarray, "__array__"),
    "cpu": (lambda x: x.cpu(), "copy to the host"),
    "to cpu": (lambda x: x.to("cpu"), "copy to the host"),
    "copy_ to the host": (lambda x: torch.empty(3).copy_(x), "copy to the host"),
    "mask": (lambda x: x[x > 0], "boolean index"),
    "assignment by a mask": (
        lambda x: x.index_put_((x > 0,), torch.zeros(2).pin_memory().to(DEVICE, non_blocking=True)),
        "boolean index",
    ),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "repeat_interleave": (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
    "to": (lambda x: torch.ones(3).pin_memory().to(DEVICE), "blocking copy"),
    "to, pageable": (
        lambda x: torch.ones(3).to(DEVICE, non_blocking=True),
        "copy from pageable memory",
    ),
    "to, of numpy": (
        lambda x: torch.from_numpy(np.ones(3)).to(DEVICE, non_blocking=True),
        "copy from pageable memory",
    ),
    "copy_": (lambda x: x.copy_(torch.ones(3).pin_memory()), "blocking copy"),
    "copy_, pageable": (
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        "copy from pageable memory",
    ),
    "tensor": (lambda x: torch.tensor([1.0], device=DEVICE), "tensor of numbers"),
    "tensor of a number": (lambda x: torch.tensor(1.0, device=x.device), "tensor of numbers"),
    "as_tensor": (lambda x: torch.as_tensor((1.0, 2.0), device=DEVICE), "tensor of numbers"),
    "index from the host": (lambda x: x[torch.tensor([1, 0])], "index from the host"),
}


@pytest.mark.parametrize("name", sorted(WAITS))
def test_each_kind_of_wait_is_counted(name: str) -> None:
    wait, kind = WAITS[name]
    with stand_in.installed() as queue:
        x = there([1.0, 0.0, 2.0])
        assert queue.syncs == []
        wait(x)
        assert queue.syncs == [kind]


def step(x: Tensor) -> Tensor:
    """Forward, backward and an optimiser step of what recipes are made of."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU()).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    order = x.argsort(dim=1, stable=True)
    y = model(x.gather(1, order)) + torch.zeros(3, device=DEVICE) + torch.full_like(x, 0.5)
    loss = y.masked_fill(y > 0, 0).square().mean() / 2
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def test_work_on_the_device_is_no_wait_and_gives_a_cpus_numbers() -> None:
    with stand_in.installed() as queue:
        torch.manual_seed(0)
        loss = step(there(torch.arange(6.0).view(2, 3)))
        assert queue.syncs == []
        assert queue.kernels > 30
        found = loss.item()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_stand_in_device.DEVICE", torch.device("cpu"))
        torch.manual_seed(0)
        assert found == step(torch.arange(6.0).view(2, 3)).item()


def test_a_copy_to_the_host_is_read_after_a_mark_behind_it() -> None:
    with stand_in.installed() as queue:
        x, side = there([1.0, 2.0]), torch.cuda.Stream()
        before, behind, beside = (torch.cuda.Event() for _ in range(3))
        before.record(torch.cuda.current_stream())
        copied = (x * 2).to("cpu", non_blocking=True)
        behind.record(torch.cuda.current_stream())
        beside.record(side)
        for event in (before, beside):  # neither is behind the copy in its queue
            event.synchronize()
            with pytest.raises(AssertionError, match="before the device came to the copy"):
                copied.tolist()
        _ = x + 1
        behind.synchronize()
        assert copied.tolist() == [2.0, 4.0]
        assert copied.sum().item() == 6.0
        assert queue.syncs == []
        who = "test_a_copy_to_the_host_is_read_after_a_mark_behind_it"
        assert queue.waits[-1] == (who, 1)


def test_times_are_known_when_both_marks_were_waited_for() -> None:
    with stand_in.installed():
        begun, ended = torch.cuda.Event(), torch.cuda.Event()
        begun.record(torch.cuda.current_stream())
        _ = there([1.0]) + 1
        ended.record(torch.cuda.current_stream())
        with pytest.raises(AssertionError, match="not known yet"):
            begun.elapsed_time(ended)
        ended.synchronize()
        begun.elapsed_time(ended)  # is known


def test_tensors_of_two_devices_do_not_mix() -> None:
    with stand_in.installed():
        x = there([1.0, 2.0])
        with pytest.raises(AssertionError, match="tensors of two devices"):
            x + torch.ones(2)
        assert (x + torch.tensor(1.0)).cpu().tolist() == [2.0, 3.0]  # a number goes with the kernel


def patched() -> tuple[Any, ...]:
    cuda = (torch.cuda.Event, torch.cuda.Stream, torch.cuda.stream, torch.cuda.current_stream)
    return (*cuda, Tensor.pin_memory, Tensor.record_stream, nn.Module.to, buffers._array)


RUN = """
import sys
from pathlib import Path
from tests import student_fixtures as fx
from tests.student.training import test_no_host_sync as runs
out = Path(sys.argv[1])
if sys.argv[2:]:
    runs.run_on_device("mae", out / "device")
fx.good(fx.train("mae", out / "after", *runs.given("mae", ())))
print(fx.losses(out / "after"))
"""


@pytest.mark.slow
def test_a_run_on_it_leaves_no_trace(tmp_path: Path) -> None:
    """In a process that had used nothing of torch before: what follows it is what a run alone
    gives."""
    given = ((tmp_path / "a",), (tmp_path / "b", "first"))
    ran = [
        subprocess.run(
            [sys.executable, "-c", RUN, *map(str, args)],
            env=fx.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        for args in given
    ]
    assert ran[0].stdout == ran[1].stdout
    assert len(json.loads(ran[0].stdout)) == 6


def test_nothing_is_left_behind() -> None:
    before = patched()
    with stand_in.installed():
        assert devices.is_gpu(DEVICE)
        assert not devices.is_gpu(torch.device("cpu"))
    assert before == patched()
    assert not devices.is_gpu(DEVICE)
    assert devices.is_gpu(torch.device("cuda"))
