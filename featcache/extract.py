"""The extraction: pictures -> views -> teacher -> targets -> codec -> shard, once.

Three stages overlap: threads decode and render, the caller's thread runs the teacher and encodes on its device, one
thread writes. Batches are made of views in (picture, view) order, never cross a shard, and the last one of a shard is
padded, so that a real network sees the same batches whenever it is run again.

B batch (views), V views a picture, S pixels, L levels, T tokens, P patches, D width.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache import checksums, codecs, manifest, publish, rendering, rng, targets, teachers, views
from featcache import lease as leases
from featcache.errors import UsageError, UserError
from featcache.plan import Plan, prepare
from featcache.statistics import OfFeatures, Statistics, of_stored
from featcache.store import QUARANTINE, ShardWriter, record_path, store

WAIT_S = 1.0  # between looks at shards that other processes work on


@dataclass
class Progress:
    """Busy seconds of each stage and what is done; `report` is called after every batch."""

    report: Callable[[Progress], None] = lambda progress: None
    waiting: Callable[[int], None] = lambda shards: None  # called while other processes hold the last shards
    told_waiting: int = 0
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
class Encoded:
    """A batch on the host, as it will be stored, but for the order of tokens."""

    coded: dict[str, npt.NDArray[Any]]  # the codec's arrays, `features` (B, L, T, ...) among them
    stats: npt.NDArray[np.float32]  # (B, L, T, 2)
    attention: npt.NDArray[np.float32]  # (B, P)
    about: OfFeatures  # h before encoding


def run(
    plan: Plan,
    out: Path,
    *,
    batch_size: int = 64,
    workers: int = 2,
    strict: bool = False,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    about: dict[str, Any] | None = None,
    only: str | None = None,
) -> dict[str, Any]:
    """Extract what is missing of the cache at `out`; returns its manifest. Killed at any moment, the next call
    continues; several processes may work on one cache at once. `share` (i, n) takes only shards i, i + n, ... A picture
    that cannot be used is quarantined, or a UserError with `strict`. A repair gives the manifest `about` that is there,
    which it has compared itself, and the `only` shard it wants."""
    if batch_size < 1 or workers < 1:
        raise UsageError(f"--batch-size {batch_size}, --workers {workers}: at least 1 is needed")
    progress = progress or Progress()
    wanted = about or prepare(plan, out, batch_size)
    mine = [shard for shard in wanted["shards"][share[0] :: share[1]] if only in (None, shard["name"])]
    publish.settle(out, plan.store, (shard["name"] for shard in mine))
    progress.workers = workers
    try:
        with ThreadPoolExecutor(workers) as decoders, ThreadPoolExecutor(1) as writing, contextlib.ExitStack() as stack:
            free = stack.enter_context(contextlib.closing(_free_shards(plan, out, mine, progress)))
            for shard in free:
                writer = store(plan.store).writer(out, shard["name"], plan.arrays, plan.views)
                try:
                    _extract_shard(plan, shard, writer, batch_size, strict, progress, decoders, writing)
                except BaseException:
                    decoders.shutdown(wait=True, cancel_futures=True)
                    writing.shutdown(wait=True, cancel_futures=True)
                    writer.discard()
                    raise
    except BaseException as error:
        publish.abandon(out)
        leases.abandon(out)
        if full := _disk_full(error, out, wanted):
            raise full from error
        raise
    report_quarantine(out, wanted)
    return wanted


def _free_shards(
    plan: Plan, out: Path, shards: Sequence[dict[str, Any]], progress: Progress
) -> Generator[dict[str, Any], None, None]:
    """Shards without a record that nobody else works on; waits for those that somebody does, until they are complete or
    left behind."""
    left = list(shards)
    missing = {shard["name"] for shard in left if not record_path(out, shard["name"]).is_file()}
    progress.total = progress.total or sum(shard["count"] for shard in left if shard["name"] in missing)
    while left:
        taken = False
        for shard in list(left):
            if record_path(out, shard["name"]).is_file():
                left.remove(shard)
                progress.total -= shard["count"] if shard["name"] in missing else 0
                leases.clear(out, shard["name"])
                continue
            lease = leases.take(out, shard["name"])
            if lease is None:
                continue
            publish.settle(out, plan.store, [shard["name"]])
            if record_path(out, shard["name"]).is_file():  # finished by another in the meantime, or adopted just now
                lease.release()
                taken = True
                continue
            taken = True
            left.remove(shard)
            try:
                yield shard
            finally:
                lease.release()
        if left and not taken:
            progress.waiting(len(left))
            time.sleep(WAIT_S)


def _disk_full(error: BaseException, out: Path, wanted: dict[str, Any]) -> UserError | None:
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    done = sum(record_path(out, shard["name"]).is_file() for shard in wanted["shards"])
    return UserError(
        f"--out {str(out)!r}: {error.strerror}; {done} of {len(wanted['shards'])} shards are complete and kept; make "
        "room and run the same command again, it continues"
    )


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
    statistics = Statistics()
    quarantined: list[dict[str, str]] = []
    pending: deque[Future[None]] = deque()
    indices = range(shard["first"], shard["first"] + shard["count"])
    window = max(2 * batch_size // plan.views, 2 * progress.workers)

    def decode(index: int) -> rendering.Rendered:
        with progress.stage("decode"):
            return rendering.render(plan, index)

    rendered = rendering.usable(plan, rendering.ahead(decoders, decode, indices, window), strict, quarantined)
    for batch in rendering.batches(rendered, plan.views, batch_size):
        with progress.stage("teacher"):
            encoded = _run_teacher(plan, batch, batch_size)
        if len(pending) == 2:
            pending.popleft().result()
        pending.append(writing.submit(_write, plan, writer, batch, encoded, statistics, progress))
        progress.pictures += sum(view == plan.views - 1 for _, view in batch)
        progress.report(progress)
    for future in pending:
        future.result()
    with progress.stage("write"):
        writer.finish(quarantined, statistics.summary())
    progress.pictures += len(quarantined)
    progress.report(progress)


def _run_teacher(plan: Plan, batch: list[tuple[rendering.Rendered, int]], batch_size: int) -> Encoded:
    pixels = np.stack([picture.pixels[view] for picture, view in batch])
    if len(batch) < batch_size:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], batch_size - len(batch), 0)])
    device = next(iter(plan.teacher.state_dict().values())).device
    coded, stats, attention, about = compute(
        plan.teacher, _to_device(pixels, device), plan.levels, plan.codec, len(batch)
    )
    for row, level in codecs.out_of_range(coded, stats)[:1]:
        picture, view = batch[row]
        raise UserError(
            f"teacher {plan.teacher.name!r} gave non-finite features for picture {picture.key!r}, view "
            f"{plan.view_numbers[view]}, level {plan.levels[level]}; finite values within {plan.codec}'s range are "
            "needed: check the weights"
        )
    weights = attention.cpu().numpy()
    good = np.isfinite(weights).all(1) & (weights >= 0).all(1) & (weights.sum(1) <= 1 + 1e-3)
    for row in np.flatnonzero(~good)[:1]:
        picture, view = batch[row]
        raise UserError(
            f"teacher {plan.teacher.name!r} gave [CLS] attention outside 0 to 1 for picture {picture.key!r}, view "
            f"{plan.view_numbers[view]}; weights of one softmax row are needed: check the weights"
        )
    host = {name: value.cpu().numpy() for name, value in coded.items()}
    return Encoded(host, stats.cpu().numpy(), weights, about)


def _to_device(pixels: npt.NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, S, S, 3) -> (B, 3, S, S) on the device, still uint8."""
    return torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def compute(
    teacher: teachers.Teacher, pixels: Tensor, levels: Sequence[int], codec: str, count: int
) -> tuple[dict[str, Tensor], Tensor, Tensor, OfFeatures]:
    """uint8 (B, 3, S, S) -> the codec's arrays (n, L, T, ...), statistics (n, L, T, 2), attention (n, P), facts on h.

    The first n = `count` of the batch are kept; the rest is padding.
    """
    ys, attention = teacher(pixels, levels)
    levels_coded, stats, spans, norms = [], [], [], []
    for y in ys:
        h, stat = targets.normalise(y[:count])
        spans.append(torch.stack(h.aminmax()))
        norms.append(torch.linalg.vector_norm(h, dim=-1).mean(-1))
        levels_coded.append(codecs.CODECS[codec].encode(h))
        stats.append(stat)
    low, high = torch.stack(spans, 1)
    about = OfFeatures(float(low.min()), float(high.max()), torch.stack(norms, 1).float().cpu().numpy())
    coded = {name: torch.stack([level[name] for level in levels_coded], 1) for name in levels_coded[0]}
    return coded, torch.stack(stats, 1), attention[:count].float(), about


def _write(
    plan: Plan,
    writer: ShardWriter,
    batch: list[tuple[rendering.Rendered, int]],
    encoded: Encoded,
    statistics: Statistics,
    progress: Progress,
) -> None:
    with progress.stage("encode"):
        items = _items(plan, batch, encoded)
        of_copy = plan.keep is not None or plan.recount
        statistics.add(items, of_stored(plan.codec, plan.teacher.width, items) if of_copy else encoded.about)
        items |= checksums.compute(plan.arrays, items)
    with progress.stage("write"):
        writer.append([picture.key for picture, _ in batch], items)


def _items(plan: Plan, batch: list[tuple[rendering.Rendered, int]], encoded: Encoded) -> dict[str, npt.NDArray[Any]]:
    """What is stored of a batch, but for the checksums."""
    digests = rng.key_digests(picture.key for picture, _ in batch)
    numbers = np.array([plan.view_numbers[view] for _, view in batch])
    order = targets.mask_order(plan.order, encoded.attention, digests, numbers, plan.policy.seed)
    tokens = {**encoded.coded, "feature_stats": encoded.stats}
    if plan.tokens == "ranked":
        tokens = {name: ranked(values, order, plan.stored_tokens) for name, values in tokens.items()}
    pixels = {"pixels": np.stack([p.proofs[view] for p, view in batch if p.proofs is not None])} if plan.pixels else {}
    drawn = {
        name: np.stack([getattr(picture.drawn, name)[0, view] for picture, view in batch])
        for name in views.Drawn._fields
    }
    return {
        **tokens,
        **pixels,
        "attention": encoded.attention,
        "mask_order": order,
        **drawn,
        "pixel_hash": np.stack([picture.hashes[view] for picture, view in batch]),
        "thumbnail": np.stack([picture.thumbnails[view] for picture, view in batch]),
        "source_size": np.array([picture.source_size for picture, _ in batch], np.int32),
    }


def ranked(values: npt.NDArray[Any], order: npt.NDArray[np.unsignedinteger], count: int) -> npt.NDArray[Any]:
    """(B, L, 1 + P, ...) in image order -> (B, L, count, ...): [CLS], then patches as `order` (B, P) ranks them."""
    out = np.empty((*values.shape[:2], count, *values.shape[3:]), values.dtype)
    for item, ranks, target in zip(values, order, out, strict=True):
        target[:, 0] = item[:, 0]
        target[:, 1:] = item[:, 1 + ranks[: count - 1].astype(np.intp)]
    return out


def report_quarantine(out: Path, wanted: dict[str, Any]) -> None:
    """quarantine.json beside the manifest, where a picture could not be used; an error where none could."""
    paths = [record_path(out, shard["name"]) for shard in wanted["shards"]]
    if not all(path.is_file() for path in paths):  # the shares of others are still to come
        return
    records = [manifest.read_json(path) for path in paths]
    rows = [row for record in records for row in record["quarantined"]]
    if not rows:
        publish.remove(out / QUARANTINE)
    elif not _is_written(out / QUARANTINE, {"pictures": rows}):
        manifest.write_json(out / QUARANTINE, {"pictures": rows})
    if rows and not sum(record["rows"] for record in records):
        raise UserError(
            f"none of {len(rows)} pictures could be used, the first {rows[0]['key']!r}: {rows[0]['reason']}; "
            f"all are listed in {out / QUARANTINE}"
        )


def _is_written(path: Path, value: dict[str, Any]) -> bool:
    """Whether a JSON of ours is there already: a complete cache may be read-only."""
    try:
        return manifest.read_json(path) == value
    except UserError:
        return False
