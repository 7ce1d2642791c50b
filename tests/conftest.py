"""Small deterministic inputs and a way to run the command, shared by the tests.

Pictures are made from a formula, not drawn: no generator's version can change them. Every colour mode a dataset has is
among them. S synthetic teacher's pixels are 28, so a whole extraction takes a fraction of a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

# One thread, here and in every process a test starts: bit-equality is promised for one number of threads, and two
# threads of two processes on shared cores mostly wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("featcache", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("featcache")

SYNTHETIC = "synthetic:levels=3,tokens=4,width=8,size=28"  # L 3, P 4, D 8, S 28


def waves(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """(height, width, 3) uint8: smooth and different in every channel, quadrant and phase."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    parts = [np.sin(x / (5 + c) + phase) + np.cos(y / (7 - c) - 2 * phase) for c in range(3)]
    return np.clip(np.round(np.stack(parts, -1) * 60 + 128), 0, 255).astype(np.uint8)


def make_photos(root: Path) -> Path:
    """Eleven pictures of every common mode, in one flat folder."""
    root.mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate([(48, 64), (70, 40), (33, 90)]):
        Image.fromarray(waves(height, width, i)).save(root / f"photo{i}.jpg", quality=92)
    rgb = Image.fromarray(waves(50, 60, 3.0))
    alpha = Image.fromarray(waves(50, 60, 4.0)[..., 0])
    rgb.save(root / "rgb.png")
    rgb.convert("L").save(root / "grey.png")
    rgb.convert("1").save(root / "bits.png")
    Image.merge("LA", (rgb.convert("L"), alpha)).save(root / "grey_alpha.png")
    rgb.quantize(32).save(root / "palette.png")
    Image.merge("RGBA", (*rgb.split(), alpha)).save(root / "rgba.png")
    rgb.convert("CMYK").save(root / "cmyk.jpg", quality=92)
    Image.fromarray(waves(50, 60, 5.0)[..., 0].astype(np.uint16) * 257).save(root / "grey16.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eleven readable pictures; do not write into it."""
    return make_photos(tmp_path_factory.mktemp("photos"))


@dataclass(frozen=True)
class Ran:
    """A finished command: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that begins with `error:`."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture
def featcache_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Ran]:
    """Run `featcache ARGS` in this process, caches below a folder of the test's own."""
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)

    def run(*args: object) -> Ran:
        from featcache.cli import main

        monkeypatch.setattr(sys, "argv", ["featcache", *map(str, args)])
        capfd.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capfd.readouterr()
        return Ran(status, captured.out, captured.err)

    return run


def python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python in a process of its own, one thread, without the network's proxies."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
