"""Pictures are made, not fetched: noise whose spectrum falls as that of photographs does, so that
JPEGs of ImageNet's median size in pixels have about its size in bytes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIDES = (500, 375)  # of ImageNet's pictures, the median
QUALITY = 90
SLOPE = -1.2  # of the logarithm of the spectrum; photographs have about -1
SPREAD = 55  # levels: the standard deviation of a photograph's pixels
CLASSES = 10


def write(folder: Path, count: int) -> None:
    """Write `count` JPEGs in class folders; picture i is a function of i."""
    spectrum = _spectrum()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda i: _write(folder, i, spectrum), range(count)))


def _spectrum() -> np.ndarray:
    width, height = SIDES
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    distance = np.hypot(rows, columns)
    distance[0, 0] = 1.0
    amplitude: np.ndarray = distance**SLOPE
    amplitude[0, 0] = 0.0
    return amplitude


def _write(folder: Path, number: int, spectrum: np.ndarray) -> None:
    random = np.random.default_rng(number)
    noise = random.standard_normal((3, SIDES[1], SIDES[0]), np.float32)
    # three colours that mostly go together
    noise = noise.mean(0, keepdims=True) * 3 + noise * 0.5
    planes = np.fft.irfft2(np.fft.rfft2(noise) * spectrum, s=noise.shape[1:])
    planes *= SPREAD / planes.std()
    pixels = (planes + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    path = folder / f"class{number % CLASSES}" / f"{number:06d}.jpg"
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=QUALITY)
