"""A task is what an evaluation is given: labelled pictures to train and to test on, and features of
them.

    pooled   [CLS] or the mean of the patches, of the last block or of several, one after the other
    tokens   all tokens of the last block

Both are those after the encoder's final norm. What was made before is read from
`$FEATCACHE_HOME/features/` (`features.kept`), and no picture is.

n pictures, V views, L blocks, K pools that are kept, T = prefix + P tokens, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.errors import UserError, counted
from featcache.pictures.source import Source
from featcache.pictures.stamps import stamp
from student.features import kept
from student.features.embed import CROP_PCT, EmbedProgress, Keep, Rendering, Skipped, tokens_of
from student.features.frozen import FrozenEncoder
from student.features.labels import Subset

I64 = npt.NDArray[np.int64]
VERSION = 1  # of what is kept: another one makes all features anew
# tokens come with the pooled features, so that another protocol finds them, where they are small
SMALL_BYTES = 2 << 30


@dataclass(frozen=True)
class LabelledSet:
    """Names pictures with their class numbers (n,), those of the training set."""

    name: str
    source: Source
    labels: I64 = field(repr=False)

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class TestSet(LabelledSet):
    """Says as well which classes may be chosen (None: all), or, with `mapping` (C,), to which of
    its own classes each training class belongs (-1: to none); labels are then of its own."""

    __test__ = False  # no test of pytest's

    names: Sequence[str] = ()
    classes: I64 | None = None
    mapping: I64 | None = None


@dataclass(frozen=True)
class Visible:
    """Chooses the patches that the encoder is to see of a picture."""

    name: str  # of how they are chosen: kept features depend on it
    count: int
    choose: Keep = field(repr=False)
    size: int = 0  # pixels a side that `choose` looks at, of the same crop; 0: the encoder's own


@dataclass(frozen=True)
class Subject:
    """Names what is evaluated: a run with its checkpoint, or a teacher."""

    run: Path | None = None
    checkpoint: int | None = None  # None: the newest
    ema: bool = False
    teacher: str = ""
    weights: str | None = None  # of the teacher


@dataclass(frozen=True)
class Scored:
    """Scores (n,C) of the pictures of a test set that could be decoded, and their labels (n,)."""

    of: TestSet
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found: scores for each test set, its settings and what else it says as
    plain JSON, and what it trained."""

    scored: list[Scored]
    facts: dict[str, Any]
    head: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Task:
    """Holds the pictures of an evaluation, and makes or finds their features."""

    frozen: FrozenEncoder
    train: LabelledSet
    tests: tuple[TestSet, ...]
    names: Sequence[str] = field(repr=False)  # of the training classes
    pool: str = "cls"
    blocks: int = 1  # the last so many
    seed: int = 0
    device: str = "cpu"
    crop_pct: float = CROP_PCT
    batch_size: int = 64  # pictures embedded at once
    keep: bool = True
    skipped: Skipped = field(default_factory=lambda: Skipped(0), repr=False)
    progress: EmbedProgress | None = field(default=None, repr=False)
    subject: Subject = field(default_factory=Subject)
    _stamps: dict[int, str] = field(default_factory=dict, repr=False)
    _shapes: list[Any] = field(default_factory=list, repr=False)

    def token_shape(self) -> tuple[int, int]:
        """Return (T,D) of the encoder's tokens, of a blank picture that is shown to it once."""
        if not self._shapes:
            frozen, side = self.frozen, self.frozen.img_size
            frozen.to(self.device)
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
            self._shapes.append(tuple(frozen.tokens(blank)[0].shape[1:]))
        return self._shapes[0]

    def stamp(self, source: Source) -> str:
        """Return what `pictures.stamps` says of a source, asked once: a folder has many files."""
        if id(source) not in self._stamps:
            self._stamps[id(source)] = stamp(source)
        return self._stamps[id(source)]

    @property
    def classes(self) -> int:
        return len(self.names)

    def pooled(
        self,
        of: LabelledSet,
        views: Sequence[int] | None = None,
        *,
        stage: str,
        keep: bool = True,
        visible: Visible | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return features (V,n,F) float32 and labels (n,) of the pictures that can be decoded; F is
        the width times the number of blocks. `views` None is the centre crop (V = 1), else those
        augmented views, drawn under the task's seed; with `keep` False they are not kept."""
        self.frozen.check_pool(self.pool)
        first = self.frozen.depth - self.blocks + 1
        blocks = tuple(range(first, self.frozen.depth + 1))
        found, good = self._rows(of, views, stage, keep, visible, "pooled", blocks)
        place = 0 if self.pool == "cls" else -1
        rows = [torch.from_numpy(_taken(each, good)[:, :, place].copy()) for each in found]
        return torch.stack(rows).flatten(2), torch.from_numpy(of.labels[good])

    def tokens(
        self,
        of: LabelledSet,
        views: Sequence[int] | None = None,
        *,
        stage: str,
        keep: bool = True,
    ) -> tuple[list[npt.NDArray[Any]], Tensor]:
        """Return the tokens (n,T,D) float16 of each view, perhaps mapped from a file, and labels
        (n,), as `pooled` does."""
        blocks = (self.frozen.depth,)
        found, good = self._rows(of, views, stage, keep, None, "tokens", blocks)
        return [_taken(each, good) for each in found], torch.from_numpy(of.labels[good])

    # -------------------------------------------------------- kept, or made

    def _rows(
        self,
        of: LabelledSet,
        views: Sequence[int] | None,
        stage: str,
        keep: bool,
        visible: Visible | None,
        what: str,
        blocks: Sequence[int],
    ) -> tuple[list[npt.NDArray[Any]], I64]:
        """Return what is kept of each view (n,...), and the rows of pictures that were decoded."""
        renderings = [
            Rendering(self.frozen.img_size, self.crop_pct, view, self.seed)
            for view in ([None] if views is None else views)
        ]
        job = _Job(self, of.source, renderings, visible, what, tuple(blocks), keep and self.keep)
        found = job.find() or job.make(stage)
        skipped = sorted({row for _, rows in found for row in rows})
        self._check_skipped(of.source, skipped)
        good = np.setdiff1d(np.arange(len(of)), skipped)
        if not len(good):
            raise UserError(
                f"cannot evaluate on {of.source.spec}: none of its "
                f"{counted(len(of), 'picture')} can be "
                "decoded; give other pictures"
            )
        return [rows for rows, _ in found], good

    def _check_skipped(self, source: Source, rows: Sequence[int]) -> None:
        """Count pictures that were skipped when their features were made."""
        for row in rows:
            if row not in self.skipped.errors.get(source.spec, {}):
                error = UserError(
                    f"cannot decode the picture {source.keys[row]!r} of {source.spec}, as was "
                    "found when its features were kept; repair it, take it out of the source, or "
                    "leave up to N out with --skip-bad N"
                )
                self.skipped.add(source, row, error)


def _taken(rows: npt.NDArray[Any], good: I64) -> npt.NDArray[Any]:
    return rows if len(good) == len(rows) else rows[good]


Found = list[tuple[npt.NDArray[Any], list[int]]]  # of each view: rows, and those skipped


@dataclass(frozen=True)
class _Job:
    """Finds or makes features of one source."""

    task: Task
    source: Source
    renderings: list[Rendering]
    visible: Visible | None
    what: str
    blocks: tuple[int, ...]
    keep: bool

    def of(self, source: Source, rendering: Rendering, what: str) -> dict[str, Any] | None:
        """Return what features depend on; None where that is not known, and they are not kept."""
        pictures = self.task.stamp(source) if self.keep else ""
        if not pictures or not self.task.frozen.digest:
            return None
        return {
            "version": VERSION,
            "encoder": self.task.frozen.digest,
            "pictures": pictures,
            "rendering": rendering.facts(),
            "what": what,
            "blocks": list(self.blocks) if what == "pooled" else [self.task.frozen.depth],
            "visible": self.visible.name if self.visible else "all",
        }

    def find(self) -> Found | None:
        """Return what is kept of this source, or of the whole one that it is a part of; None unless
        all views are there."""
        source: Source = self.source
        rows = np.arange(len(source))
        while True:
            found = [self._find(source, rendering) for rendering in self.renderings]
            if all(each is not None for each in found):
                return [_part(each, rows) for each in found if each is not None]
            if not isinstance(source, Subset):
                return None
            rows = np.asarray(source.rows, np.int64)[rows]
            source = source.source

    def _find(
        self, source: Source, rendering: Rendering
    ) -> tuple[npt.NDArray[Any], list[int]] | None:
        of = self.of(source, rendering, self.what)
        if of is None or not kept.is_there(of):
            return None
        tokens, width = self.task.token_shape()
        if self.what == "tokens":
            return kept.find(of, (len(source), tokens, width), "<f2")
        pools = 2 if self.task.frozen.prefix else 1
        return kept.find(of, (len(source), len(self.blocks), pools, width), "<f4")

    def make(self, stage: str) -> Found:
        """Embed the pictures, and keep their features unless that was not asked for."""
        with contextlib.ExitStack() as stack:
            sinks: dict[tuple[int, str], kept.Sink] = {}
            with_tokens = self._keeps_tokens()
            for rows, found in self._batches():
                for view, tokens in enumerate(found):
                    for what, values in self._values(tokens, with_tokens).items():
                        if (view, what) not in sinks:
                            sinks[view, what] = self._sink(view, what, values, stack)
                        sinks[view, what].add(rows, values)
                if self.task.progress is not None:
                    self.task.progress(stage, int(rows[-1]) + 1, len(self.source))
            skipped = self.task.skipped.errors.get(self.source.spec, {})
            ended = {key: sink.finish(sorted(skipped)) for key, sink in sinks.items()}
        if not ended:
            return [(np.zeros((len(self.source), 1)), sorted(skipped))]
        return [(ended[view, self.what], sorted(skipped)) for view in range(len(self.renderings))]

    def _batches(self) -> Any:
        task = self.task
        return tokens_of(
            task.frozen, self.source, self.renderings, blocks=self.blocks,
            batch_size=task.batch_size, device=task.device, skipped=task.skipped,
            keep=self.visible.choose if self.visible else None,
            keep_px=self.visible.size if self.visible else 0,
        )  # fmt: skip

    def _keeps_tokens(self) -> bool:
        """Tell whether tokens are written: they are asked for, or small and not kept yet."""
        if self.what == "tokens":
            return True
        every = [self.of(self.source, each, "tokens") for each in self.renderings]
        if self.visible is not None or all(each is None or kept.is_there(each) for each in every):
            return False
        tokens, width = self.task.token_shape()
        return 2 * tokens * width * len(self.source) * len(every) <= SMALL_BYTES

    def _values(self, tokens: list[Tensor], with_tokens: bool) -> dict[str, npt.NDArray[Any]]:
        """Return what is kept of a batch: `pooled` (b,L,K,D) float32, `tokens` (b,T,D) float16."""
        prefix = self.task.frozen.prefix
        values = {}
        if self.what == "pooled":
            pools = [
                torch.stack([*([each[:, 0]] if prefix else []), each[:, prefix:].mean(1)], 1)
                for each in tokens
            ]
            values["pooled"] = torch.stack(pools, 1).cpu().numpy()
            if not np.isfinite(values["pooled"]).all():
                raise UserError(
                    f"features of {self.task.frozen.name} are not finite; look at the run's "
                    "losses, or evaluate another checkpoint"
                )
        if with_tokens:
            values["tokens"] = _halves(tokens[-1], self.task.frozen.name)
        return values

    def _sink(
        self, view: int, what: str, values: npt.NDArray[Any], stack: contextlib.ExitStack
    ) -> kept.Sink:
        shape, dtype = (len(self.source), *values.shape[1:]), values.dtype.str
        of = self.of(self.source, self.renderings[view], what)
        if of is None:
            return kept.InMemory(shape, dtype)
        sink = kept.OnDisk(of, shape, dtype, self.task.frozen.told, self.source.spec)
        stack.callback(sink.discard)
        return sink


def _halves(tokens: Tensor, name: str) -> npt.NDArray[np.float16]:
    """Return tokens as float16. Raises UserError for numbers that it cannot hold."""
    halves = tokens.half()
    if not bool(halves.isfinite().all()):
        raise UserError(
            f"tokens of {name} are not finite in float16 (largest {tokens.abs().max():g}, 65504 "
            "is allowed); look at the run's losses, or evaluate another checkpoint"
        )
    return halves.cpu().numpy()


def _part(
    found: tuple[npt.NDArray[Any], list[int]], rows: I64
) -> tuple[npt.NDArray[Any], list[int]]:
    """Return rows of what is kept of the whole, and which of them were skipped there."""
    whole, skipped = found
    own = np.flatnonzero(np.isin(rows, skipped)).tolist()
    same = len(rows) == len(whole) and bool((rows == np.arange(len(whole))).all())
    return (whole if same else whole[rows]), own


def unlabelled_task(
    frozen: FrozenEncoder, source: Source, given: Mapping[str, Any], progress: EmbedProgress
) -> Task:
    """Return a task whose pictures need no labels: the number of each picture stands for one."""
    from featcache.runtime.device import pick_device

    return Task(
        frozen, LabelledSet("pictures", source, np.arange(len(source))), (), (), given["pool"],
        given["blocks"], 0, pick_device(given["device"]), given["crop_pct"], given["embed_batch"],
        given["keep"], Skipped(given["skip_bad"]), progress,
    )  # fmt: skip
