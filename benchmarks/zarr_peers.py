"""Zarr arrays are written by zarr-python, and read by zarr-python, zarrs and tensorstore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison import F16, FEW, I64, Batches, Reader, Task, read_each_row


def write_zarr(chunk: int, sharded: bool = False) -> Callable[[Path, F16, Task], None]:
    """Return a function that writes records in chunks of so many rows, or in shards of such."""

    def write(folder: Path, source: F16, task: Task) -> None:
        import zarr

        shards = (task.file_rows, *task.item) if sharded else None
        array = zarr.create_array(
            str(folder),
            shape=source.shape,
            chunks=(min(chunk, task.file_rows), *task.item),
            shards=shards,
            dtype="<f2",
            compressors=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
        step = task.file_rows if sharded else chunk
        for low in range(0, task.rows, step):
            array[low : low + step] = source[low : low + step]

    return write


def zarr_readers(library: str, cases: str) -> Callable[[Path, Task], list[Reader]]:
    """Return a function that opens the readers of zarr-python; `cases`: row, oindex, block."""

    def readers(folder: Path, task: Task) -> list[Reader]:
        import zarr

        pipelines = {
            "zarrs": "zarrs.ZarrsCodecPipeline",
            "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
        }
        zarr.config.set({"async.concurrency": 64})  # the default of later versions
        # it is chosen when an array is opened
        with zarr.config.set({"codec_pipeline.path": pipelines[library]}):
            array: Any = zarr.open_array(str(folder), mode="r")

        def one_row(row: int, out: F16) -> None:
            out[:] = array[row]

        def orthogonal(order: I64) -> Batches:
            out = task.memory()
            for rows in task.batches(order, FEW):
                array.get_orthogonal_selection((rows,), out=_buffer(out[: len(rows)]))
                yield rows, out[: len(rows)]

        def by_block(order: I64) -> Batches:
            out = task.memory(FEW)
            for low, high in task.blocks(order, FEW):
                array.get_basic_selection((slice(low, high),), out=_buffer(out[: high - low]))
                yield range(low, high), out[: high - low]

        name = {"zarr": "zarr-python", "zarrs": "zarr-python with zarrs"}[library]
        known = {
            "row": Reader(f"{name}, array[row]", "rows", read_each_row(task, one_row)),
            "oindex": Reader(f"{name}, orthogonal selection", "rows", orthogonal),
            "block": Reader(f"{name}, {FEW}-row blocks", "block", by_block),
        }
        return [known[case] for case in cases.split()]

    return readers


def _buffer(out: F16) -> Any:
    """Our buffer as one that zarr-python reads into."""
    from zarr.core.buffer import default_buffer_prototype

    return default_buffer_prototype().nd_buffer.from_ndarray_like(out)  # type: ignore[arg-type]


def tensorstore_readers(cases: str) -> Callable[[Path, Task], list[Reader]]:
    """Return a function that opens the readers of tensorstore; `cases`: rows, block, shard."""

    def readers(folder: Path, task: Task) -> list[Reader]:
        import tensorstore as ts

        def opened(**context: Any) -> Any:
            limits = {
                "file_io_concurrency": {"limit": max(task.threads, 4)},
                "data_copy_concurrency": {"limit": task.threads},
            }
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(folder)},
                "recheck_cached_data": False,
            }
            return ts.open({**spec, "context": {**limits, **context}}, read=True).result()

        plain, mapped = opened(), opened(file_io_mode={"mode": "memmap"})

        def futures(store: Any) -> Callable[[I64], Batches]:
            def read(order: I64) -> Batches:
                out = task.memory(FEW)
                for rows in task.batches(order, FEW):
                    with ts.Batch() as batch:
                        waiting = [store[row].read(batch=batch) for row in rows]
                    for destination, future in zip(out, waiting, strict=False):
                        destination[:] = future.result()
                    yield rows, out[: len(rows)]

            return read

        def into(store: Any) -> Callable[[I64], Batches]:
            def read(order: I64) -> Batches:
                out = task.memory()
                for rows in task.batches(order):
                    ts.array(out[: len(rows)], copy=False).write(store[rows]).result()
                    yield rows, out[: len(rows)]

            return read

        def by_block(step: int) -> Callable[[I64], Batches]:
            def read(order: I64) -> Batches:
                out = task.memory(step)
                for low, high in task.blocks(order, step):
                    ts.array(out[: high - low], copy=False).write(plain[low:high]).result()
                    yield range(low, high), out[: high - low]

            return read

        known = {
            "rows": [
                Reader("tensorstore, futures", "rows", futures(plain)),
                Reader("tensorstore, futures, memmap", "rows", futures(mapped)),
                Reader("tensorstore, copied into our memory", "rows", into(plain)),
                Reader("tensorstore, copied into our memory, memmap", "rows", into(mapped)),
            ],
            "block": [Reader(f"tensorstore, {FEW}-row blocks", "block", by_block(FEW))],
            "shard": [Reader("tensorstore, whole shards", "block", by_block(task.file_rows))],
        }
        return [reader for case in cases.split() for reader in known[case]]

    return readers
