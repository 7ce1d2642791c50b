"""Other formats store and read the same records, each as fast as its documented interface allows.

A `Layout` is files of one format, and the readers of them. No format is asked for more than ours:
no compression, no checksums where it can do without, threads where they help. A training step needs
a batch in one buffer, which is used again for the next: a library that only returns rows in memory
of its own has them copied there. Streams are exempt from that.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.comparison import F16, FEW, I64, Batches, Reader, Task, read_each_row
from benchmarks.zarr_peers import tensorstore_readers, write_zarr, zarr_readers
from featcache.errors import UsageError, near

ReadInto = Callable[[int, F16], None]  # a row's number, and its destination

_NPY_HEADER = 128  # bytes before the numbers, where a shape is short


@dataclass(frozen=True)
class Layout:
    """One format: `write(folder, source, task)`, and for each peer that can read it a function
    (folder, task) -> readers."""

    name: str
    write: Callable[[Path, F16, Task], None]
    readers: Mapping[str, Callable[[Path, Task], list[Reader]]]


# ------------------------------------------------------------ webdataset


def _write_tars(folder: Path, source: F16, task: Task) -> None:
    from webdataset import TarWriter

    for number, first in enumerate(range(0, task.rows, task.file_rows)):
        with TarWriter(str(folder / f"{number:06d}.tar")) as tar:
            for row in range(first, min(first + task.file_rows, task.rows)):
                tar.write({"__key__": f"{row:09d}", "npy": source[row]})


@dataclass(frozen=True)
class _Parse:
    """Parses a tar's array without a copy, the fastest way. A class, since it must be pickled for
    workers."""

    item: tuple[int, ...]

    def __call__(self, data: bytes) -> F16:
        return np.frombuffer(data, np.float16, offset=_NPY_HEADER).reshape(self.item)


def _webdataset_readers(folder: Path, task: Task) -> list[Reader]:
    import webdataset as wds

    tars = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decoded() -> Any:
        dataset = wds.WebDataset(tars, shardshuffle=False, empty_check=False)
        return dataset.decode().to_tuple("__key__", "npy")

    def bare() -> Any:
        dataset = wds.WebDataset(tars, shardshuffle=False, empty_check=False).to_tuple(
            "__key__", "npy"
        )
        return dataset.map_tuple(str, _Parse(task.item))

    def in_process(make: Callable[[], Any]) -> Callable[[I64], Batches]:
        return lambda order: ((int(key), values) for key, values in make())

    def loaded(dataset: Any, workers: int, batch: int | None = None) -> Callable[[I64], Batches]:
        def read(order: I64) -> Batches:
            loader = wds.WebLoader(
                dataset, batch_size=batch, num_workers=workers, worker_init_fn=_quiet
            )
            for keys, values in loader:
                yield (
                    [int(key) for key in ([keys] if isinstance(keys, str) else keys)],
                    values.numpy(),
                )

        return read

    few = min(FEW, task.file_rows)
    return [
        Reader("webdataset in process, decode()", "stream", in_process(decoded)),
        Reader("webdataset in process, frombuffer", "stream", in_process(bare)),
        *(
            Reader(
                f"webdataset DataLoader, {workers} worker{'s' * (workers > 1)}, {how}",
                "stream",
                loaded(*case),
            )
            for workers in (1, 2)
            for how, case in {
                "one by one": (decoded(), workers),
                f"batched({FEW})": (bare().batched(few), workers),
                f"batch_size={FEW}": (bare(), workers, few),
            }.items()
        ),
    ]


def _quiet(worker: int) -> None:
    """Silence torch about bytes of a tar that cannot be written to; nothing writes to them."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


# ------------------------------------------------------------ one file a sample


def _write_npy(folder: Path, source: F16, task: Task) -> None:
    for row in range(task.rows):
        np.save(folder / f"{row:09d}.npy", source[row])


def _npy_readers(folder: Path, task: Task) -> list[Reader]:
    paths = [str(folder / f"{row:09d}.npy") for row in range(task.rows)]
    pool = ThreadPoolExecutor(task.threads)

    def load(row: int, out: F16) -> None:
        out[:] = np.load(paths[row])

    def fromfile(row: int, out: F16) -> None:
        out.reshape(-1)[:] = np.fromfile(paths[row], np.float16, offset=_NPY_HEADER)

    def readinto(row: int, out: F16) -> None:
        with open(paths[row], "rb", buffering=0) as file:  # noqa: PTH123 (a Path object costs what is measured here)
            file.seek(_NPY_HEADER)
            file.readinto(out.reshape(-1).view(np.uint8).data)

    return [
        Reader(
            f"npy, {name}{how}", "rows", read_each_row(task, one, threads), by_hand=one is readinto
        )
        for how, threads in (("", None), (", threads", pool))
        for name, one in (("np.load", load), ("np.fromfile", fromfile), ("readinto", readinto))
    ]


# ------------------------------------------------------------ HDF5 and safetensors


def _write_hdf5(chunked: bool) -> Callable[[Path, F16, Task], None]:
    def write(folder: Path, source: F16, task: Task) -> None:
        import h5py  # type: ignore[import-untyped]

        with h5py.File(folder / "rows.h5", "w", libver="latest") as file:
            chunks = (1, *task.item) if chunked else None
            dataset = file.create_dataset("features", source.shape, "<f2", chunks=chunks)
            for row in range(task.rows):
                dataset.write_direct(source, np.s_[row], np.s_[row])

    return write


def _hdf5_readers(folder: Path, task: Task) -> list[Reader]:
    import h5py

    # rows beyond the chunk cache's 1 MiB pass it by
    dataset = h5py.File(folder / "rows.h5", "r")["features"]

    def direct(order: I64) -> Batches:
        out = task.memory()
        for rows in task.batches(order):
            for i, row in enumerate(rows):
                dataset.read_direct(out, np.s_[row], np.s_[i])
            yield rows, out[: len(rows)]

    def by_block(order: I64) -> Batches:
        out = task.memory(task.block)
        for low, high in task.blocks(order):
            dataset.read_direct(out, np.s_[low:high], np.s_[: high - low])
            yield range(low, high), out[: high - low]

    how = "by row" if dataset.chunks else "contiguous"
    return [
        Reader(f"h5py {how}, read_direct", "rows", direct),
        Reader(f"h5py {how}, read_direct of blocks", "block", by_block),
    ]


def _write_safetensors(folder: Path, source: F16, task: Task) -> None:
    from safetensors.numpy import save_file

    for number, low in enumerate(range(0, task.rows, task.file_rows)):
        save_file(
            {"features": source[low : low + task.file_rows]}, folder / f"{number:06d}.safetensors"
        )


def _safetensors_readers(folder: Path, task: Task) -> list[Reader]:
    from safetensors import safe_open

    paths = sorted(folder.glob("*.safetensors"))
    slices = {
        kind: [safe_open(str(path), framework=kind).get_slice("features") for path in paths]
        for kind in ("np", "pt")
    }
    maps = []
    for path in paths:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        maps.append(np.memmap(path, np.float16, "r", start).reshape(-1, *task.item))
    pool = ThreadPoolExecutor(task.threads)

    def sliced(kind: str) -> ReadInto:
        def read(row: int, out: F16) -> None:
            number, at = divmod(row, task.file_rows)
            np.copyto(out, np.asarray(slices[kind][number][at : at + 1])[0])

        return read

    def mapped(row: int, out: F16) -> None:
        number, at = divmod(row, task.file_rows)
        np.copyto(out, maps[number][at])

    return [
        Reader(
            f"safetensors, {name}{how}",
            "rows",
            read_each_row(task, one, threads),
            by_hand=one is mapped,
        )
        for how, threads in (("", None), (", threads", pool))
        for name, one in (
            ("get_slice to numpy", sliced("np")),
            ("get_slice to torch", sliced("pt")),
            ("memory map", mapped),
        )
    ]


LAYOUTS = (
    Layout(
        "Zarr, a chunk for each row",
        write_zarr(1),
        {
            "zarr": zarr_readers("zarr", "row oindex"),
            "zarrs": zarr_readers("zarrs", "row oindex block"),
            "tensorstore": tensorstore_readers("rows"),
        },
    ),
    Layout(
        f"Zarr, chunks of {FEW} rows",
        write_zarr(FEW),
        {
            "zarr": zarr_readers("zarr", "block"),
            "zarrs": zarr_readers("zarrs", "block"),
            "tensorstore": tensorstore_readers("block"),
        },
    ),
    Layout(
        "Zarr, rows in shards",
        write_zarr(1, sharded=True),
        {
            "zarr": zarr_readers("zarr", "row block"),
            "zarrs": zarr_readers("zarrs", "row block"),
            "tensorstore": tensorstore_readers("rows shard"),
        },
    ),
    Layout("webdataset tars", _write_tars, {"webdataset": _webdataset_readers}),
    Layout("a .npy for each row", _write_npy, {"npy": _npy_readers}),
    Layout("HDF5, contiguous", _write_hdf5(False), {"h5py": _hdf5_readers}),
    Layout("HDF5, a chunk for each row", _write_hdf5(True), {"h5py": _hdf5_readers}),
    Layout("safetensors", _write_safetensors, {"safetensors": _safetensors_readers}),
)
PEERS = tuple(dict.fromkeys(peer for layout in LAYOUTS for peer in layout.readers))


def missing(peer: str) -> bool:
    """Return whether a peer's library is not installed."""
    return peer != "npy" and importlib.util.find_spec(peer) is None


def parse_peers(text: str) -> tuple[str, ...]:
    """Parse 'all', 'none' or names; libraries that are not installed are left out, with a note."""
    given: dict[str, tuple[str, ...]] = {"all": PEERS, "none": ()}
    names = given[text] if text in given else tuple(text.split(","))
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--peers: unknown {name!r}; {near(name, PEERS)}")
    absent = [name for name in names if missing(name)]
    if absent:
        click.echo(
            f"not installed, left out: {', '.join(absent)}; pip install {' '.join(absent)}",
            err=True,
        )
    return tuple(name for name in names if name not in absent)
