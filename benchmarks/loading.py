"""Pictures and targets are written for loaders, and read by the loaders that ours is compared with.

Every loader gives batches of B crops of 224 pixels and B records of features, shuffled, without
end; the pictures are photographs of about ImageNet's size in pixels and bytes. B batch, L levels, T
tokens, D width.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featcache.reading.cache import Cache

Batches = Iterator[int]  # how many samples each batch has
SIDES = (500, 375)  # of ImageNet's pictures, the median


def write_pictures(folder: Path, count: int) -> Path:
    """Write JPEGs of scikit-image's photographs, each cropped and rotated differently, of SIDES
    pixels and quality 90."""
    from skimage import data

    random = np.random.default_rng(0)
    photographs = [
        Image.fromarray(getattr(data, name)()).convert("RGB")
        for name in ("astronaut", "coffee", "rocket")
    ]
    for i in range(count):
        picture = photographs[i % 3].rotate(
            float(random.uniform(-10, 10)), Image.Resampling.BICUBIC
        )
        left, top = (int(random.integers(20, 60)) for _ in range(2))
        cut = picture.crop((left, top, picture.width - left, picture.height - top))
        path = folder / f"c{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut.resize(SIDES, Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def write_tars(folder: Path, pictures: Path, features: np.ndarray) -> list[str]:
    """Write KEY.jpg beside KEY.npy, as one would store targets for webdataset without featcache."""
    folder.mkdir()
    files, tars = sorted(pictures.rglob("*.jpg")), []
    per_tar = min(256, -(-len(files) // 4))
    for first in range(0, len(files), per_tar):
        tars.append(str(folder / f"{first // per_tar:04d}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for row, path in enumerate(files[first : first + per_tar], first):
                memory = io.BytesIO()
                np.save(memory, features[row])
                for suffix, data in (("jpg", path.read_bytes()), ("npy", memory.getvalue())):
                    member = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tars


def crop_of(size: int) -> Any:
    """Return MAE's crop as torchvision has it, to a uint8 tensor."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


class _Sample:
    """Maps (picture, array) to tensors. A class, since it must be pickled for workers."""

    def __init__(self, size: int) -> None:
        self.crop = crop_of(size)

    def __call__(self, sample: tuple[Image.Image, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        picture, features = sample
        return self.crop(picture), torch.from_numpy(features)


def webdataset_batches(tars: list[str], size: int, batch: int, workers: int) -> Batches:
    """Yield batches of a plain webdataset pipeline: Pillow, torchvision's crop, npy, a loader of so
    many worker processes."""
    import webdataset as wds

    data = wds.WebDataset(tars, shardshuffle=False, empty_check=False).shuffle(256, initial=64)
    data = (
        data.decode("pil")
        .to_tuple("jpg", "npy")
        .map(_Sample(size))
        .repeat()
        .batched(batch, partial=False)
    )
    for pixels, features in wds.WebLoader(
        data, batch_size=None, num_workers=workers, worker_init_fn=_one_thread
    ):
        assert len(pixels) == len(features) == batch
        yield batch


class _Files(torch.utils.data.Dataset[Any]):
    """Reads a picture file and an .npy file a sample."""

    def __init__(self, pictures: list[Path], arrays: Path, size: int) -> None:
        self.pictures, self.arrays, self.crop = pictures, arrays, crop_of(size)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.pictures[row]) as picture:
            pixels = self.crop(picture.convert("RGB"))
        return pixels, torch.from_numpy(np.load(self.arrays / f"{row:06d}.npy"))


def torchvision_batches(
    pictures: Path, arrays: Path, size: int, batch: int, workers: int
) -> Batches:
    """Yield batches of torch's DataLoader over single files with torchvision's crop, endlessly."""
    data = _Files(sorted(pictures.rglob("*.jpg")), arrays, size)
    loader = torch.utils.data.DataLoader(
        data,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread,
    )
    while True:
        for pixels, features in loader:
            assert len(pixels) == len(features) == batch
            yield batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def pread_batches(cache: Cache, fields: tuple[str, ...], batch: int, threads: int) -> Batches:
    """Read the same bytes of random rows by plain preads into buffers that are used again: the
    physical limit."""
    (part,) = cache._parts
    random, view = np.random.default_rng(0), 0
    arrays = [part.arrays[name] for name in fields]
    memory = [np.ones((batch, spec.item_bytes), np.uint8) for spec in arrays]
    fds: dict[str, int] = {}
    try:
        with ThreadPoolExecutor(threads) as pool:
            while True:
                rows = random.permutation(len(cache))[:batch]
                jobs = []
                for shard in np.unique(rows // 1024).tolist():
                    at = np.flatnonzero(rows // 1024 == shard)
                    for spec, buffer in zip(arrays, memory, strict=True):
                        path, offsets = part.locate(shard, spec, view, rows[at])
                        if path not in fds:
                            fds[path] = os.open(path, os.O_RDONLY)
                        jobs += [
                            (fds[path], buffer[i], offset)
                            for i, offset in zip(at.tolist(), offsets.tolist(), strict=True)
                        ]
                cut = [jobs[i::threads] for i in range(threads)]
                list(pool.map(_pread_all, cut))
                yield batch
    finally:
        for fd in fds.values():
            os.close(fd)


def _pread_all(jobs: list[tuple[int, np.ndarray, int]]) -> None:
    for fd, memory, offset in jobs:
        assert os.preadv(fd, [memory], offset) == len(memory)
