"""A plan decides what an extraction will write, before anything is read.

A `Plan` joins pictures, teacher, views and layout; its manifest is the cache's identity.
`target_folder` makes the folder, or checks that the cache that is there is the same one.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from safetensors.numpy import save
from torch import Tensor

import featcache
from featcache.errors import UsageError, counted
from featcache.extraction.layout import level_arrays, token_ids_array, view_arrays
from featcache.extraction.options import check_order, file_name
from featcache.models import precision, tokenizer, weights
from featcache.models.contract import Teacher, has_attention
from featcache.pictures.patterns import absolute
from featcache.pictures.source import Source
from featcache.storage import checksums, codec_state, manifest, picture_lists
from featcache.storage.store import FORMAT, Array, ShardForm
from featcache.targets import codec_names, codecs
from featcache.targets import levels as target_levels
from featcache.views import pixel_path
from featcache.views.policy import Policy

TOKENS = ("raster", "ranked")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold everything that a cache's content depends on."""

    source: Source
    teacher: Teacher
    policy: Policy
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
    # statistics of what is stored, as a copy of fewer views or levels has them
    recount: bool = False
    format: int = FORMAT  # an earlier one where such a cache is continued, repaired or added to
    compression: str = ""  # of an archive that is repaired
    # of a cache that pictures were appended to: its lists, and those of them that `source` gives
    cache_lists: tuple[picture_lists.PictureList, ...] = ()
    own_lists: range = range(1)
    is_new_list: bool = False  # of pictures that are yet to be appended
    # of pictures' files; not of what is added, nor of a cache that was begun without
    file_digests: bool = True
    state_file: bytes = b""  # of the codec, once it is made or read
    # what the codec loses and the teacher's arithmetic changes, once it is measured
    distortion: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.views < 1 or self.rows_per_shard < 1:
            raise UsageError(
                f"--views {self.views}, --rows-per-shard {self.rows_per_shard}: at least 1 is "
                "needed"
            )
        if self.tokens not in TOKENS:
            raise UsageError(f"--tokens {self.tokens!r}: {' or '.join(TOKENS)} is allowed")
        check_order(self.order, self.teacher)
        if self.keep is not None and self.tokens != "ranked":
            raise UsageError(
                f"--keep {self.keep} keeps the first of ranked tokens: give --tokens ranked with it"
            )
        if self.keep is not None and not 1 <= self.keep <= self.teacher.patches:
            raise UsageError(
                f"--keep {self.keep}: 1 to "
                f"{counted(self.teacher.patches, 'patch is', 'patches are')} allowed"
            )
        for each in (self.policy.filter, self.filter):
            pixel_path.check_filter(pixel_path.pixel_path(self.source), each)

    @property
    def is_tokenizer(self) -> bool:
        return isinstance(self.teacher, tokenizer.TokenizerTeacher)

    @property
    def input_px(self) -> int:
        return self.teacher.input_px

    @property
    def filter(self) -> str:
        """Return the filter that resizes crops for the teacher: the policy's, a tokenizer's own."""
        return (
            self.teacher.filter
            if isinstance(self.teacher, tokenizer.TokenizerTeacher)
            else self.policy.filter
        )

    @property
    def stored_tokens(self) -> int:
        """Count [CLS] and the patches that are stored of each view."""
        return 1 + (self.teacher.patches if self.keep is None else self.keep)

    @property
    def view_numbers(self) -> range:
        return range(self.first_view, self.first_view + self.views)

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """Return the shards of the source, fixed before anything is read: `first` picture, counted
        through all lists of the cache, and `count`."""
        end = self.first_picture + len(self.source)
        return [each for each in self._all_shards if self.first_picture <= each["first"] < end]

    @cached_property
    def _all_shards(self) -> list[dict[str, Any]]:
        return picture_lists.shards(self.lists, self.rows_per_shard)

    @cached_property
    def lists(self) -> tuple[picture_lists.PictureList, ...]:
        """Return the lists of pictures of the cache: one, but where some were appended."""
        return self.cache_lists or (picture_lists.list_of(self.source.keys),)

    @cached_property
    def first_picture(self) -> int:
        """Return the number of the source's first picture among those of all lists."""
        return sum(each["count"] for each in self.lists[: self.own_lists.start])

    @property
    def arrays(self) -> list[Array]:
        own = [token_ids_array(self.teacher.patches)] if self.is_tokenizer else self._of_teacher()
        arrays = [*own, *view_arrays(self.format, file_digests=self.file_digests)]
        ranked = self.tokens == "ranked"
        return [
            *arrays,
            *checksums.checksum_arrays(arrays, len(self.levels), self.stored_tokens, ranked=ranked),
        ]

    def _of_teacher(self) -> list[Array]:
        levels, patches = len(self.levels), self.teacher.patches
        own = level_arrays(self.codec, self.teacher.width, levels, self.stored_tokens)
        order, size = "|u1" if patches <= 256 else "<u2", self.policy.size
        row_view, attends = ("row", "view"), has_attention(self.teacher)
        pixels = Array("pixels", "|u1", (size, size, 3), (*row_view, "y", "x", "rgb"), split=True)
        return [
            *own,
            *([pixels] if self.pixels else []),
            *([Array("attention", "<f4", (patches,), (*row_view, "patch"))] if attends else []),
            Array("mask_order", order, (patches,), (*row_view, "rank")),
        ]

    @property
    def coded_arrays(self) -> codec_names.ArrayForms:
        """Return what the codec stores of a token."""
        return codecs.get_codec(self.codec).arrays(self.teacher.width)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Return the codec's state for these levels."""
        if not self.state_file:
            return {}
        return codec_state.unpack(self.state_file, self.manifest(), "the state of the codec")

    @cached_property
    def device_state(self) -> dict[str, Tensor]:
        """Return the same where the teacher is."""
        device = precision.device_of(self.teacher)
        return {name: values.to(device) for name, values in self.state.items()}

    @property
    def state_name(self) -> str:
        """Return the name of the file of the codec's state."""
        return f"{file_name(self.teacher.name)}.{self.codec}.safetensors"

    @property
    def view_bytes(self) -> int:
        """Sum the bytes of the arrays that are stored for each view."""
        return sum(array.item_bytes for array in self.arrays if array.per_view)

    @cached_property
    def _weight_hash(self) -> str:
        """Hash once: for ViT-L/14 it takes seconds, and an extraction asks for its manifest several
        times."""
        return weights.weight_hash(self.teacher)

    def manifest(self) -> dict[str, Any]:
        """Make the manifest of the cache; its id is the digest of the identity alone."""
        arrays = {array.name: array.as_dict() for array in self.arrays}
        made = manifest.make(
            self._identity(),
            self._provenance(),
            arrays,
            self._all_shards,
            self.side_files(),
            format=self.format,
        )
        return {**made, **({"compression": self.compression} if self.compression else {})}

    @cached_property
    def form(self) -> ShardForm:
        """Return how shards are written."""
        return manifest.shard_form(self.manifest())

    def _identity(self) -> dict[str, Any]:
        """Return all that the stored numbers depend on. An option that is not used leaves no trace,
        so that one that comes later changes no ids."""
        return {
            "teacher": self._teacher_facts(),
            "levels": list(self.levels),
            "eps": target_levels.EPS,
            "order": self.order,
            "codec": self.codec,
            "tokens": self.tokens,
            **({} if self.keep is None else {"keep": self.keep}),
            **({"pixels": "raw"} if self.pixels else {}),
            **({"first_view": self.first_view} if self.first_view else {}),
            "policy": self.policy.as_dict(),
            "views": self.views,
            "pixel_path": pixel_path.pixel_path(self.source),
            **picture_lists.fields(self.lists),
            "rows_per_shard": self.rows_per_shard,
            "store": self.store,
        }

    def _teacher_facts(self) -> dict[str, Any]:
        teacher, run = self.teacher, precision.execution_config(self.teacher)
        return {
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
        }

    def _provenance(self) -> dict[str, Any]:
        compiled = precision.execution_config(self.teacher).compiled
        return {
            "weights": self.teacher.weights,
            **({"compiled": True} if compiled else {}),
            "source": absolute(self.source.spec),
            "versions": self._versions(),
            **({"distortion": dict(self.distortion)} if self.distortion else {}),
        }

    def _versions(self) -> dict[str, str]:
        ffcv = (
            {"ffcv": version("ffcv")}
            if pixel_path.pixel_path(self.source)["decoder"] == "ffcv"
            else {}
        )
        return {
            "featcache": featcache.__version__,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "python": platform.python_version(),
            **ffcv,
        }

    def side_files(self) -> dict[str, bytes]:
        """Return the files beside the manifest: the teacher's tail, and the codec's state once it
        is known."""
        state = {self.state_name: self.state_file} if self.state_file else {}
        return {f"{file_name(self.teacher.name)}.safetensors": save(self.teacher.tail()), **state}


class ExtractJob(NamedTuple):
    """Pair a plan with the folder it goes to."""

    plan: Plan
    out: Path

    @property
    def store(self) -> str:
        return self.plan.store
