"""The extraction: pictures -> views -> teacher -> targets -> codec -> shard, once.

Three stages overlap: threads decode and render, the caller's thread runs the teacher and encodes on its device, one
thread writes. Batches are made of views in (picture, view) order, never cross a shard, and the last one of a shard is
padded, so that a real network sees the same batches whenever it is run again.

B batch (views), V views a picture, S pixels, L levels, T tokens, P patches, D width.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import codecs, images, manifest, rng, targets, teachers, views
from featcache.errors import UsageError, UserError
from featcache.plan import Plan, prepare
from featcache.store import QUARANTINE, ShardWriter, record_path, store


@dataclass
class Progress:
    """Busy seconds of each stage and what is done; `report` is called after every batch."""

    report: Callable[[Progress], None] = lambda progress: None
    pictures: int = 0
    total: int = 0
    workers: int = 1
    started: float = field(default_factory=time.perf_counter)
    busy: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "teacher": 0.0, "encode": 0.0, "write": 0.0})

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy[name] += time.perf_counter() - start

    @property
    def slowest(self) -> str:
        """The stage that bounds the rate: decoding is shared by its threads, the others have one each."""
        return max(self.busy, key=lambda name: self.busy[name] / (self.workers if name == "decode" else 1))

    @property
    def rate(self) -> float:
        """Pictures a second since the start."""
        return self.pictures / max(time.perf_counter() - self.started, 1e-9)


@dataclass(frozen=True)
class _Rendered:
    """One picture's views, ready for the teacher."""

    key: str
    source_size: tuple[int, int]
    drawn: views.Drawn
    pixels: npt.NDArray[np.uint8]  # (V, S, S, 3)
    hashes: npt.NDArray[np.uint64]  # (V,)
    thumbnails: npt.NDArray[np.uint8]  # (V, 14, 14, 3)


@dataclass(frozen=True)
class Encoded:
    """A batch on the host, as it will be stored."""

    coded: dict[str, npt.NDArray[Any]]  # the codec's arrays, `features` (B, L, T, ...) among them
    stats: npt.NDArray[np.float32]  # (B, L, T, 2)
    attention: npt.NDArray[np.float32]  # (B, P)
    span: tuple[float, float]  # of h before encoding


def run(
    plan: Plan,
    out: Path,
    *,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Extract what is missing of the cache at `out`; returns its manifest. Killed at any moment, the next call
    continues. A picture that cannot be used is quarantined, or a UserError with `strict`."""
    if batch_size < 1 or workers < 1:
        raise UsageError(f"--batch-size {batch_size}, --workers {workers}: at least 1 is needed")
    progress = progress or Progress()
    wanted = prepare(plan, out)
    backend = store(plan.store)
    for shard in wanted["shards"]:
        backend.settle(out, shard["name"])
    todo = [shard for shard in wanted["shards"] if not record_path(out, shard["name"]).is_file()]
    progress.total, progress.workers = sum(shard["count"] for shard in todo), workers
    with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(1) as writing:
        for shard in todo:
            if record_path(out, shard["name"]).is_file():  # by another process, in the meantime
                continue
            writer = backend.writer(out, shard["name"], plan.arrays, plan.views)
            try:
                _extract_shard(plan, shard, writer, batch_size, strict, progress, decoders, writing)
            except BaseException:
                decoders.shutdown(wait=True, cancel_futures=True)
                writing.shutdown(wait=True, cancel_futures=True)
                writer.discard()
                raise
    _report_quarantine(out, wanted)
    return wanted


def _extract_shard(
    plan: Plan,
    shard: dict[str, Any],
    writer: ShardWriter,
    batch_size: int,
    strict: bool,
    progress: Progress,
    decoders: ThreadPoolExecutor,
    writing: ThreadPoolExecutor,
) -> None:
    keys: list[str] = []
    quarantined: list[dict[str, str]] = []
    pending: deque[Future[None]] = deque()
    indices = range(shard["first"], shard["first"] + shard["count"])
    window = max(2 * batch_size // plan.views, 2 * progress.workers)
    rendered = _usable(
        plan, _ahead(decoders, lambda i: _render(plan, i, progress), indices, window), strict, quarantined
    )
    for batch in _batches(rendered, plan.views, batch_size):
        with progress.stage("teacher"):
            encoded = _run_teacher(plan, batch, batch_size, progress)
        if len(pending) == 2:
            pending.popleft().result()
        pending.append(writing.submit(_write, plan, writer, batch, encoded, progress))
        keys.extend(picture.key for picture, view in batch if view == 0)
        progress.pictures += sum(view == plan.views - 1 for _, view in batch)
        progress.report(progress)
    for future in pending:
        future.result()
    with progress.stage("write"):
        writer.finish(keys, quarantined)
    progress.pictures += len(quarantined)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int], window: int
) -> Iterator[tuple[int, Future[Any]]]:
    """Futures in order, at most `window` of them under way."""
    waiting: deque[tuple[int, Future[Any]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) >= window:
            yield waiting.popleft()
    yield from waiting


def _usable(
    plan: Plan, futures: Iterable[tuple[int, Future[Any]]], strict: bool, quarantined: list[dict[str, str]]
) -> Iterator[_Rendered]:
    for index, future in futures:
        try:
            yield future.result()
        except OSError as error:  # the disk, not the picture: what is read again may well be good
            raise UserError(
                f"picture {plan.source.keys[index]!r} cannot be read: {error}; mend this and run again"
            ) from error
        except images.PictureError as error:
            key = plan.source.keys[index]
            if strict:
                raise UserError(
                    f"picture {key!r} cannot be used: {error}; mend or remove it, or quarantine it (no --strict)"
                ) from error
            quarantined.append({"key": key, "reason": str(error)})


def _render(plan: Plan, index: int, progress: Progress) -> _Rendered:
    """Decode one picture in full and replay its V views at the teacher's size; hash and thumbnail at the policy's."""
    with progress.stage("decode"):
        key = plan.source.keys[index]
        picture = images.decode(plan.source.read(index))
        size = (picture.height, picture.width)
        drawn = views.draw(plan.policy, rng.key_digests([key]), np.array([size]), range(plan.views))
        proofs = [replay(picture, plan.policy, drawn, view, plan.policy.size) for view in range(plan.views)]
        same = plan.teacher.input_px == plan.policy.size
        pixels = (
            proofs
            if same
            else [replay(picture, plan.policy, drawn, view, plan.teacher.input_px) for view in range(plan.views)]
        )
        return _Rendered(
            key,
            size,
            drawn,
            np.stack(pixels),
            np.array([views.pixel_hash(proof) for proof in proofs], np.uint64),
            np.stack([views.thumbnail(proof) for proof in proofs]),
        )


def replay(picture: Any, policy: views.Policy, drawn: views.Drawn, view: int, size: int) -> npt.NDArray[np.uint8]:
    """One drawn view of row 0 at `size`."""
    parts = (drawn.crop[0, view], drawn.flip[0, view], drawn.jitter[0, view])
    return views.render(picture, *parts, size, policy.filter)


def _batches(rendered: Iterable[_Rendered], views: int, batch_size: int) -> Iterator[list[tuple[_Rendered, int]]]:
    """(picture, view) pairs in row-major order, `batch_size` at a time, the last batch shorter."""
    batch: list[tuple[_Rendered, int]] = []
    for picture in rendered:
        for view in range(views):
            batch.append((picture, view))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def _run_teacher(plan: Plan, batch: list[tuple[_Rendered, int]], batch_size: int, progress: Progress) -> Encoded:
    pixels = np.stack([picture.pixels[view] for picture, view in batch])
    if len(batch) < batch_size:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - len(batch), 0)])
    device = next(iter(plan.teacher.state_dict().values())).device
    coded, stats, attention, span = compute(
        plan.teacher, _to_device(pixels, device), plan.levels, plan.codec, len(batch)
    )
    for row, level in codecs.out_of_range(coded, stats)[:1]:
        picture, view = batch[row]
        raise UserError(
            f"teacher {plan.teacher.name!r} gave non-finite features for picture {picture.key!r}, view {view}, level "
            f"{plan.levels[level]}; finite values within {plan.codec}'s range are needed: check the weights"
        )
    host = {name: value.cpu().numpy() for name, value in coded.items()}
    return Encoded(host, stats.cpu().numpy(), attention.cpu().numpy(), span)


def _to_device(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, S, S, 3) -> (B, 3, S, S) on the device, still uint8."""
    return torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def compute(
    teacher: teachers.Teacher, pixels: Tensor, levels: Sequence[int], codec: str, count: int
) -> tuple[dict[str, Tensor], Tensor, Tensor, tuple[float, float]]:
    """uint8 (B, 3, S, S) -> the codec's arrays (n, L, T, ...), statistics (n, L, T, 2), attention (n, P), range of h.

    The first n = `count` of the batch are kept; the rest is padding.
    """
    ys, attention = teacher(pixels, levels)
    levels_coded, stats, spans = [], [], []
    for y in ys:
        h, stat = targets.normalise(y[:count])
        spans.append(torch.stack(h.aminmax()))
        levels_coded.append(codecs.CODECS[codec].encode(h))
        stats.append(stat)
    low, high = torch.stack(spans, 1)
    coded = {name: torch.stack([level[name] for level in levels_coded], 1) for name in levels_coded[0]}
    return coded, torch.stack(stats, 1), attention[:count].float(), (float(low.min()), float(high.max()))


def _write(
    plan: Plan, writer: ShardWriter, batch: list[tuple[_Rendered, int]], encoded: Encoded, progress: Progress
) -> None:
    with progress.stage("encode"):
        digests = rng.key_digests(picture.key for picture, _ in batch)
        numbers = np.array([view for _, view in batch])
        order = targets.mask_order(plan.order, encoded.attention, digests, numbers, plan.policy.seed)
        items = {
            **encoded.coded,
            "feature_stats": encoded.stats,
            "row_crc": row_crcs(encoded.coded["features"]),
            "attention": encoded.attention,
            "mask_order": order,
            **{
                name: np.stack([getattr(picture.drawn, name)[0, view] for picture, view in batch])
                for name in views.Drawn._fields
            },
            "pixel_hash": np.stack([picture.hashes[view] for picture, view in batch]),
            "thumbnail": np.stack([picture.thumbnails[view] for picture, view in batch]),
        }
    with progress.stage("write"):
        writer.append(items, {"features": encoded.span})
        sizes = [picture.source_size for picture, view in batch if view == 0]
        writer.append_rows({"source_size": np.array(sizes, np.int32).reshape(-1, 2)})


def row_crcs(features: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """(B, L, T, D) -> (B, L) crc32c of each level's bytes."""
    import crc32c

    out = np.empty(features.shape[:2], np.uint32)
    for row, level in np.ndindex(out.shape):
        out[row, level] = crc32c.crc32c(features[row, level].reshape(-1).view(np.uint8).data)
    return out


def _report_quarantine(out: Path, wanted: dict[str, Any]) -> None:
    """quarantine.json beside the manifest, where a picture could not be used; an error where none could."""
    records = [manifest.read_json(record_path(out, shard["name"])) for shard in wanted["shards"]]
    rows = [row for record in records for row in record["quarantined"]]
    if rows:
        manifest.write_json(out / QUARANTINE, {"pictures": rows})
    if rows and not sum(record["rows"] for record in records):
        raise UserError(
            f"none of {len(rows)} pictures could be used, the first {rows[0]['key']!r}: {rows[0]['reason']}; "
            f"all are listed in {out / QUARANTINE}"
        )
