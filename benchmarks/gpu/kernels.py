"""The student's step is looked at by PyTorch's profiler, and measured against the device's peak.

The peak is the rate of a large matrix product in the same run, not the one of the data sheet.
Operations of a step are counted by PyTorch's own counter on the model as it is not compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training_steps as steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import WARM_STEPS, settings
from student.training import train

TOP = 12
PROFILED = 3  # steps
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kernels(bench: Bench, recipe: str = "maskalign", teacher: str = "clip-b16") -> None:
    """Give the share of the peak that the step uses, of the time that kernels run, and the kernels
    that take most."""
    sizes = bench.sizes
    sets = (f"encoder={sizes.students['base']}", *settings(bench, recipe))
    config = bench.config(sets=sets)
    peak = matmul_rate(bench)
    bench.row("matrix product, the peak", peak / 1e12, "TFLOP/s")
    with ExitStack() as stack:
        run, loader, acc = steps.build(config, recipe, bench.cache(teacher))
        state = train.build_state(run, loader, acc)
        feed = steps.make_feed(run, loader, state, acc, stack)
        batch = feed.take().batch
        flops = count_flops(run, acc, batch)
        made = steps.make_step(run, loader, state, steps.BatchesInMemory([batch]))
        steps.seconds_of(made, WARM_STEPS, bench.device)
        seconds = steps.seconds_of(made, sizes.steps, bench.device)
        events, busy_s = profiled(made, bench)
    bench.row("step in memory", config.batch_size / seconds, "images/s")
    bench.row(
        "share of the peak",
        flops / seconds / peak,
        note=f"{flops / config.batch_size / 2e9:.3g} GMAC a picture, forward and backward",
    )
    if busy_s is not None:
        note = "1 less this: the device waits for the host, which launches kernels"
        bench.row("share of a step in which kernels run", busy_s / seconds, note=note)
    for name, share in events:
        bench.row(f"kernel {name}", 100 * share, "% of kernels' time")


def matmul_rate(bench: Bench) -> float:
    """Return operations a second of a large product in the step's arithmetic."""
    n, dtype = bench.sizes.matmul, DTYPES[bench.sizes.precision]
    a, b = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in range(2))
    product: Callable[[], Any] = lambda: torch.mm(a, b)  # noqa: E731 - one expression
    steps.seconds_of(product, 3, bench.device)
    return 2 * n**3 / min(steps.seconds_of(product, 10, bench.device) for _ in range(3))


def count_flops(run: Any, acc: Any, batch: dict[str, torch.Tensor]) -> int:
    """Count the operations of one forward and backward of the recipe's model, twice the
    multiply-accumulates."""
    model = run.recipe.Model(run.config).to(acc.device).train()
    with FlopCounterMode(display=False) as counter:
        with acc.autocast():
            loss = model(batch)["loss"]
        loss.backward()
    return int(counter.get_total_flops())


def profiled(step: steps.Step, bench: Bench) -> tuple[list[tuple[str, float]], float | None]:
    """Return the top kernels with their share of all kernels' time, and on a GPU the seconds of a
    step in which kernels run."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    start = time.perf_counter()
    with profile(activities=kinds) as found:
        for _ in range(PROFILED):
            step()
        steps.wait(bench.device)
    print(f"profiled {PROFILED} steps in {time.perf_counter() - start:.1f} s", flush=True)
    spent = {event.key: _device_us(event, bench.on_gpu) for event in found.key_averages()}
    total = sum(spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1])[:TOP]
    shares = [(name[:90], us / total) for name, us in top if us]
    return shares, total / 1e6 / PROFILED if bench.on_gpu else None


def _device_us(event: Any, on_gpu: bool) -> float:
    """Return an event's own microseconds: of a kernel on a GPU, of an operator on a CPU."""
    if not on_gpu:
        return float(event.self_cpu_time_total)
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    # a range that a library names, such as the optimizer's step, spans kernels that are there too
    is_range = getattr(event, "is_user_annotation", False)
    return float(event.self_device_time_total) if on_device and not is_range else 0.0
