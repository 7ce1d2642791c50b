"""A `Bench` is what measurements share: the device, the sizes, and pictures and caches that the
first who needs them makes."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import featcache.cli
from benchmarks import training_steps
from benchmarks.gpu import pictures
from benchmarks.gpu.worker import WorkerOptions
from featcache.models import precision
from featcache.runtime.device import pick_device

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "accelerate",
    "transformers",
    "open_clip_torch",
    "numpy",
    "zarr",
)
_MADE = "made"  # a file in a folder that is whole


class Bench:
    """The device, the sizes, and what lies in the folder that measurements share."""

    def __init__(self, options: WorkerOptions, emit: Callable[[dict[str, Any]], None]) -> None:
        self.sizes, self.folder, self.workers = options.sizes, options.folder, options.workers
        self.device = pick_device(options.device)
        self._emit = emit
        precision.keep_freed_memory()  # as the commands do

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def row(self, label: str, value: float | None, unit: str = "", **more: Any) -> None:
        """Give a row of the measurement that runs: more is at_least, at_most, note, facts."""
        self._emit({"label": label, "value": value, "unit": unit, **more})

    def forget(self) -> None:
        """Give back what a measurement took of the device."""
        torch._dynamo.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # ---- what measurements share ---------------------------------------------------------------

    def pictures(self) -> Path:
        """Return a folder of pictures."""
        number = self.sizes.pictures
        folder = self._made("pictures", lambda out: pictures.write(out / "jpeg", number))
        return folder / "jpeg"

    def tars(self) -> str:
        """Return the same pictures as a pattern of tars."""
        from featcache.maintenance import pack_tars
        from featcache.pictures.open_source import open_source

        def pack(out: Path) -> None:
            pack_tars.pack(open_source(str(self.pictures())), out / "tars", 512, seed=0)

        return str(self._made("packed", pack) / "tars" / "*.tar")

    def cache(self, teacher: str) -> Path:
        """Return a cache of this teacher, with the pixels of its views."""
        config = self.config(extract_options=("--pixels", "raw", *self._teacher_precision()))

        def extract(out: Path) -> None:
            training_steps.extract(config, self.sizes.teachers[teacher], out / "cache")

        return self._made(f"cache-{teacher}", extract) / "cache"

    def token_cache(self, teacher: str) -> Path:
        """Return the same cache with token ids of dVAE's tokenizer added."""

        def add(out: Path) -> None:
            cache = self.cache(teacher)
            options = ("--images", str(self.pictures()), "--out", str(cache), "--add")
            options += ("--teacher", "dvae", "--weights", "random:0", "--device", self.device)
            featcache.cli.cli.main(["extract", *options], standalone_mode=False)

        self._made(f"tokens-{teacher}", add)
        return self.cache(teacher)

    def config(self, **changes: Any) -> training_steps.StepConfig:
        """Return the options of training steps at these sizes."""
        sizes = self.sizes
        given = {
            "pictures": self.pictures(),
            "batch_size": sizes.batch_size,
            "device": self.device,
            "precision": sizes.precision,
            "compiled": sizes.compiled,
            "workers": self.workers,
            "levels": sizes.levels,
        }
        return training_steps.StepConfig(**{**given, **changes})

    def _teacher_precision(self) -> tuple[str, ...]:
        wanted = self.sizes.precision if self.on_gpu else "fp32"
        return ("--precision", wanted)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Make a folder of these sizes once; one that was not made to its end stays, and is made
        again beside it."""
        key = hashlib.sha256(f"{self.sizes} {self.on_gpu}".encode()).hexdigest()[:8]
        names = (f"{name}-{key}-{number}" for number in count())
        tried = (self.folder / each for each in names)
        folder = next(each for each in tried if (each / _MADE).is_file() or not each.exists())
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        start = time.perf_counter()
        make(folder)
        (folder / _MADE).touch()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        return folder


# ------------------------------------------------------------ the machine


def open_bench(
    options: WorkerOptions, emit: Callable[[dict[str, Any]], None]
) -> tuple[Bench, dict[str, Any]]:
    """Open the device of a process, and tell what machine it is on."""
    # tqdm's own lock is a semaphore, which a process that is killed leaves behind
    tqdm.set_lock(threading.RLock())
    bench = Bench(options, emit)
    return bench, machine_facts(bench.device)


def machine_facts(device: str) -> dict[str, Any]:
    """Return the hardware, its driver, and the versions of what a step runs through."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        **(_gpu_facts(device) if device.startswith("cuda") else {}),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    }
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"machine": machine, "versions": versions}


def _gpu_facts(device: str) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(device)
    return {
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "GPU memory GiB": facts.total_memory / 2**30,
    }


def _driver() -> str | None:
    """Return the driver's version as nvidia-smi tells it; None where it is not installed."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
