"""What an extraction will write, decided before anything is read.

A `Plan` joins pictures, teacher, views and layout; its manifest is the cache's identity. `prepare` makes the folder, or
checks that the cache that is there is the same one.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from safetensors.numpy import save

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import precision as running
from featcache.models import tokenizer
from featcache.pictures import open_source as images
from featcache.storage import checksums, manifest
from featcache.storage.store import SHARDS, Array, record_path
from featcache.targets import codecs
from featcache.targets import levels as targets
from featcache.views import draw as views
from featcache.views import ffcv_decoder as replay

TOKENS = ("raster", "ranked")
_SPARE_BYTES = 64 << 20  # what a disk should keep beyond the cache


@dataclass(frozen=True)
class Plan:
    """Everything a cache's content depends on."""

    source: images.Source
    teacher: teachers.Teacher
    policy: views.Policy
    views: int = 1
    levels: tuple[int, ...] = ()
    order: str = "attentive"
    codec: str = "fp16"
    store: str = "zarr"
    rows_per_shard: int = 1024
    tokens: str = "raster"
    keep: int | None = None  # patches stored of a ranked view; None: all
    pixels: bool = False  # store the rendered view
    first_view: int = 0  # above 0 where views are added to a cache
    recount: bool = False  # statistics of what is stored, as a copy of fewer views or levels has them

    def __post_init__(self) -> None:
        if self.views < 1 or self.rows_per_shard < 1:
            raise UsageError(f"--views {self.views}, --rows-per-shard {self.rows_per_shard}: at least 1 is needed")
        if self.tokens not in TOKENS:
            raise UsageError(f"--tokens {self.tokens!r}: {' or '.join(TOKENS)} is allowed")
        if self.keep is not None and self.tokens != "ranked":
            raise UsageError(f"--keep {self.keep} keeps the first of ranked tokens: give --tokens ranked with it")
        if self.keep is not None and not 1 <= self.keep <= self.teacher.patches:
            raise UsageError(f"--keep {self.keep}: 1 to {self.teacher.patches} patches are allowed")
        for each in (self.policy.filter, self.filter):
            replay.check(images.pixel_path(self.source), each)

    @property
    def is_tokenizer(self) -> bool:
        return isinstance(self.teacher, tokenizer.Tokenizer)

    @property
    def input_px(self) -> int:
        return self.teacher.input_px

    @property
    def filter(self) -> str:
        """By which crops are resized for the teacher: the policy's, a tokenizer's own."""
        return self.teacher.filter if isinstance(self.teacher, tokenizer.Tokenizer) else self.policy.filter

    @property
    def stored_tokens(self) -> int:
        """[CLS] and the patches that are stored of each."""
        return 1 + (self.teacher.patches if self.keep is None else self.keep)

    @property
    def view_numbers(self) -> range:
        return range(self.first_view, self.first_view + self.views)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Ranges of the source, fixed before anything is read: `first` picture and `count`."""
        n, step = len(self.source), self.rows_per_shard
        return [
            {"name": f"{i:06d}", "first": first, "count": min(step, n - first)}
            for i, first in enumerate(range(0, n, step))
        ]

    @property
    def arrays(self) -> list[Array]:
        own = [tokenizer.array(self.teacher.patches)] if self.is_tokenizer else self._of_teacher()
        arrays = [*own, *_of_views()]
        ranked = self.tokens == "ranked"
        return [*arrays, *checksums.declare(arrays, len(self.levels), self.stored_tokens, ranked=ranked)]

    def _of_teacher(self) -> list[Array]:
        levels, tokens, patches = len(self.levels), self.stored_tokens, self.teacher.patches
        coded = codecs.CODECS[self.codec].arrays(self.teacher.width)
        order, size = "|u1" if patches <= 256 else "<u2", self.policy.size
        row_view = ("row", "view")
        pixels = Array("pixels", "|u1", (size, size, 3), (*row_view, "y", "x", "rgb"), split=True)
        return [
            *(
                Array(name, dtype, (levels, tokens, *item), (*row_view, "level", "token", *names), split=True)
                for name, (dtype, item, names) in coded.items()
            ),
            Array("feature_stats", "<f4", (levels, tokens, 2), (*row_view, "level", "token", "mean_std"), split=True),
            *([pixels] if self.pixels else []),
            Array("attention", "<f4", (patches,), (*row_view, "patch")),
            Array("mask_order", order, (patches,), (*row_view, "rank")),
        ]

    @property
    def view_bytes(self) -> int:
        """Bytes of the arrays that are stored for each view."""
        return sum(array.item_bytes for array in self.arrays if array.per_view)

    @cached_property
    def _weight_hash(self) -> str:
        """Once: of ViT-L/14 it takes seconds, and an extraction asks for its manifest several times."""
        return teachers.weight_hash(self.teacher)

    def manifest(self) -> dict[str, Any]:
        teacher, run = self.teacher, running.of(self.teacher)
        identity = {
            "teacher": {
                "name": teacher.name,
                "weight_hash": self._weight_hash,
                "input_px": teacher.input_px,
                "pixel_mean": list(teacher.pixel_mean),
                "pixel_std": list(teacher.pixel_std),
                "patches": teacher.patches,
                "width": teacher.width,
                "depth": teacher.depth,
                **({} if run.precision == "fp32" else {"precision": run.precision}),
                **({"filter": self.filter} if self.is_tokenizer else {}),
            },
            "levels": list(self.levels),
            "eps": targets.EPS,
            "order": self.order,
            "codec": self.codec,
            "tokens": self.tokens,
            **({} if self.keep is None else {"keep": self.keep}),
            **({"pixels": "raw"} if self.pixels else {}),
            **({"first_view": self.first_view} if self.first_view else {}),
            "policy": self.policy.as_dict(),
            "views": self.views,
            "pixel_path": images.pixel_path(self.source),
            "pictures": {"count": len(self.source), "keys_digest": manifest.keys_digest(self.source.keys)},
            "rows_per_shard": self.rows_per_shard,
            "store": self.store,
        }
        provenance = {
            "weights": teacher.weights,
            **({"compiled": True} if run.compiled else {}),
            "source": os.path.abspath(self.source.spec),  # noqa: PTH100 (a pattern, not always a path)
            "versions": self._versions(),
        }
        arrays = {array.name: array.as_dict() for array in self.arrays}
        return manifest.make(identity, provenance, arrays, self.shards, self.side_files())

    def _versions(self) -> dict[str, str]:
        ffcv = {"ffcv": version("ffcv")} if images.pixel_path(self.source)["decoder"] == "ffcv" else {}
        return {"torch": torch.__version__, "pillow": PIL.__version__, "python": platform.python_version(), **ffcv}

    def side_files(self) -> dict[str, bytes]:
        """Files beside the manifest: the teacher's tail."""
        return {f"{file_name(self.teacher.name)}.safetensors": save(self.teacher.tail())}


class Job(NamedTuple):
    """A plan and the folder it goes to."""

    plan: Plan
    out: Path


def _of_views() -> list[Array]:
    """What every part stores of the views themselves."""
    row_view = ("row", "view")
    return [
        Array("crop", "<i4", (4,), (*row_view, "top_left_height_width")),
        Array("flip", "|u1", (), row_view),
        Array("area", "<f4", (), row_view),
        Array("jitter", "<f4", (4,), (*row_view, "brightness_contrast_saturation_order")),
        Array("pixel_hash", "<u8", (), row_view),
        Array("thumbnail", "|u1", (views.THUMBNAIL, views.THUMBNAIL, 3), (*row_view, "y", "x", "rgb")),
        Array("source_size", "<i4", (2,), ("row", "height_width"), per_view=False),
    ]


def parse_levels(text: str, depth: int) -> tuple[int, ...]:
    """'last:5', '8,10,12', '-1,-3' (counted from the end) or 'all' -> 1-based block numbers, ascending.

    >>> parse_levels("last:3", 12), parse_levels("8,12,10", 12), parse_levels("-1,-3", 12)
    ((10, 11, 12), (8, 10, 12), (10, 12))
    """
    head, _, count = text.partition(":")
    if text == "all":
        return tuple(range(1, depth + 1))
    if head == "last" and count.isdecimal() and 1 <= int(count) <= depth:
        return tuple(range(depth - int(count) + 1, depth + 1))
    parts = text.split(",")
    if all(part.removeprefix("-").isdecimal() and 1 <= abs(int(part)) <= depth for part in parts):
        blocks = {int(part) % (depth + 1) for part in parts}  # -1 is the last
        if len(blocks) == len(parts):
            return tuple(sorted(blocks))
    raise UsageError(
        f"--levels {text!r}: last:N, a list such as 1,{depth} or -1,-3 that names no block twice, or all; blocks are "
        f"1 to {depth}, or -1 to -{depth} from the end"
    )


def file_name(text: str) -> str:
    """A teacher's name as a file name: letters, digits, dot and dash."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)[:80]


def parse_keep(text: str | None, patches: int) -> int | None:
    """'58' patches, or '0.3' of them, rounded up; None keeps all.

    >>> parse_keep("58", 196), parse_keep("0.3", 196), parse_keep(None, 196)
    (58, 59, None)
    """
    if text is None:
        return None
    allowed = f"a number of patches from 1 to {patches}, or a share of them such as 0.3, is needed"
    try:
        value = int(text) if text.isdecimal() else Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"--keep {text!r}: {allowed}") from error
    if isinstance(value, Fraction):
        value = math.ceil(value * patches) if 0 < value <= 1 else 0
    if not 1 <= value <= patches:
        raise UsageError(f"--keep {text}: {allowed}")
    return value


def prepare(plan: Plan, out: Path, batch_size: int) -> dict[str, Any]:
    """Make the folder, or check that the cache in it is the same one; returns its manifest. The batch size is noted in
    it, since real networks give other bits at another."""
    wanted = plan.manifest()
    wanted["provenance"]["batch_size"] = batch_size
    if there := continued(wanted, out):
        wanted = there
    _check_space(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / manifest.NAME, out / SHARDS / manifest.COPY):
        if not path.is_file():  # before any shard, so that a process that dies from here on leaves a cache to continue
            path.parent.mkdir(exist_ok=True)
            manifest.write_json(path, wanted)
    for folder in (out, out / SHARDS):
        manifest.sweep(folder)
    write_side_files(plan, out)
    return wanted


def write_side_files(plan: Plan, out: Path) -> None:
    """What is missing or differs of the files beside the manifest."""
    for name, data in plan.side_files().items():
        if not (out / name).is_file() or (out / name).read_bytes() != data:
            manifest.write_file(out / name, data)


def continued(wanted: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """The manifest of the cache at `out` where it is the wanted one, None where nothing is there; another cache and
    other files are refused."""
    if (out / manifest.NAME).is_file():
        there = manifest.read(out)
        todo = "these options continue the cache that is there, another --out makes a new one, --add adds to this one"
        grades = ("fatal", "lossy", "layout")
        manifest.refuse(wanted, there, f"{str(out)!r} holds another cache", todo, grades, cures=True)
        return there
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise UserError(f"--out {str(out)!r} exists and is no cache; give an empty or new folder")
    return None


def _check_space(plan: Plan, out: Path) -> None:
    """Is there room for the shards that are missing?"""
    check_room([Job(plan, out)])


def check_room(jobs: Sequence[Job]) -> None:
    """Is there room for what is missing of all of them? The first folder's disk holds the others."""
    out = jobs[0].out
    place = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    missing = [
        plan.view_bytes * plan.views * shard["count"]
        for plan, folder in jobs
        for shard in plan.shards
        if not record_path(folder, shard["name"]).is_file()
    ]
    needed, free = sum(missing) + (_SPARE_BYTES if missing else 0), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"--out {str(out)!r}: the cache needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
            "fewer --views or --levels, or another disk"
        )
