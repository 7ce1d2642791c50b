"""Written by FFCV's own writer and read by FFCV's own loader, in a process of their own: what ours
is compared with.

    python -m tests.ffcv_files FOLDER

FFCV forks workers, compiles for seconds and sets the threads of torch for the whole process: none
of it is for ours. Pictures are those of `photo`; FOLDER gets the files named below, and centre.npy,
the centre squares of jpg.beton as FFCV's loader gives them at 20 pixels.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

COUNT, SIZE = 5, 20


def photo(i: int) -> np.ndarray:
    """(34 + i, 40 + 2 i, 3) uint8, smooth."""
    y, x = np.mgrid[: 34 + i, : 40 + 2 * i].astype(np.float64)
    return np.stack(
        [127 + 120 * np.sin(x / (6 + c) + i) * np.cos(y / (5 + c)) for c in range(3)], -1
    ).astype(np.uint8)


def text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode(), np.uint8)


class Rows:
    """A sample is whatever `row(i)` says; FFCV asks in its workers."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


def write(folder: Path) -> None:
    from ffcv.fields import BytesField, IntField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    class OwnField(IntField):
        """A kind that FFCV's reader does not know."""

    raw, jpg = RGBImageField(write_mode="raw"), RGBImageField(write_mode="jpg", jpeg_quality=85)
    files = {
        "raw": (
            {"image": raw, "label": IntField(), "key": BytesField()},
            lambda i: (photo(i), 7 - i, text(f"a/b{i}")),
        ),
        "jpg": ({"image": jpg, "key": JSONField()}, lambda i: (photo(i), f"a/ä{i}")),
        "nokey": ({"image": raw, "label": IntField()}, lambda i: (photo(i), i)),
        "otherkey": ({"image": raw, "label": IntField()}, lambda i: (photo(i)[::-1], i)),
        "noimage": ({"label": IntField(), "key": BytesField()}, lambda i: (i, text(f"k{i}"))),
        "twoimages": (
            {"one": raw, "two": raw, "key": BytesField()},
            lambda i: (photo(i), photo(0), text(f"k{i}")),
        ),
        "intkey": ({"image": raw, "key": IntField()}, lambda i: (photo(i), i)),
        "double": ({"image": raw, "key": BytesField()}, lambda i: (photo(i), text(f"k{i // 2}"))),
        "own": (
            {"image": raw, "key": BytesField(), "x": OwnField()},
            lambda i: (photo(i), text(f"k{i}"), i),
        ),
        "negative": (
            {"image": raw, "label": IntField(), "key": BytesField()},
            lambda i: (photo(i), -i, text(f"k{i}")),
        ),
        "emptykey": (
            {"image": raw, "key": BytesField()},
            lambda i: (photo(i), text("\0" if i == 3 else f"k{i}")),
        ),
    }
    for name, (fields, row) in files.items():
        writer = DatasetWriter(
            str(folder / f"{name}.beton"), fields, page_size=1 << 21, num_workers=1
        )
        writer.from_indexed_dataset(Rows(row))


def centres(folder: Path) -> np.ndarray:
    """(n, S, S, 3): the centre squares, by FFCV's loader and its own crop decoder."""
    from ffcv.fields.decoders import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(folder / "jpg.beton"), batch_size=COUNT, num_workers=1, order=OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={"image": [CenterCropRGBImageDecoder((SIZE, SIZE), ratio=1)], "key": None},
    )  # fmt: skip
    return next(iter(loader))[0].copy()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write(out)
    np.save(out / "centre.npy", centres(out))
    os._exit(0)  # FFCV's threads may wait for one another at the end
