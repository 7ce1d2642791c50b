"""Measure what codecs cost and what they lose, beside fp16 and the formats of others.

    python -m benchmarks.bench_codecs                         all of it: some twenty minutes
    python -m benchmarks.bench_codecs --pictures 40 --reps 1  a trial, not a measurement

Records are 5 levels of clip-b16 with random weights, of photographs, of which [CLS] and 58 patches
are kept. Read in turns: rows a second in random batches, checked, from the page cache, as ratios to
fp16's within one repetition. Decoding is told in milliseconds a view and as a share of a step of a
ViT-B that sees 58 patches, written with timm alone; encoding as a share of the teacher's forward.
Both run on the same threads as what they are compared with. Losses are those of the levels
themselves, of normal numbers, and of both with outlier channels, beside others' formats on the same
tokens; the bound is that of any code for normal numbers, 4^-bits.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor

import featcache
from benchmarks import (
    command_options,
    describe,
    environment,
    markdown_table,
    plain_steps,
    save_json,
    sync,
    warm,
)
from benchmarks.codec_peers import PEERS
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.extraction.extract import run
from featcache.extraction.forward import run_teacher
from featcache.extraction.options import parse_levels
from featcache.extraction.plan import Plan
from featcache.maintenance.derive import derive
from featcache.maintenance.derive_plan import Wish
from featcache.models.precision import keep_freed_memory
from featcache.pictures.open_source import open_source
from featcache.reading.feature_reader import FeatureReader
from featcache.targets import codec_names, distortion
from featcache.targets.codecs import CODECS
from featcache.targets.levels import normalise
from featcache.teachers import load
from featcache.views.policy import load_policy

LOSSY = tuple(name for name in codec_names.NAMES if name != codec_names.LOSSLESS)
KEPT = 58
BATCH = 256  # rows of a read, as of a training step
SIDE_ARRAYS = ("feature_stats", "thumbnail", "prefix_crc")  # left out of the bytes a view
AIMS = {"q8": 1.8, "t4": 3.0}
BYTES = {"q8": 230_000, "t4": 116_000, "t3": 88_000}
ENCODE_SHARE = 0.10
ADDED_LOSS = {"q8": 0.0005, "t4": 0.035, "t3": 0.12}
Results = dict[str, Any]


# ------------------------------------------------------------ the caches


def write_pictures(folder: Path, count: int) -> None:
    """Write crops of the two photographs of scikit-learn, each another one."""
    folder.mkdir()
    photos = [Image.fromarray(each) for each in sklearn.datasets.load_sample_images().images]
    random = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = (int(random.integers(0, side - 256)) for side in photo.size)
        photo.crop((left, top, left + 256, top + 256)).save(folder / f"{i:05d}.png")


def make_caches(folder: Path, teacher: Any, pictures: int, views: int) -> dict[str, Path]:
    """Extract fp16, and derive the others from it."""
    write_pictures(folder / "pictures", pictures)
    caches = {name: folder / name for name in codec_names.NAMES}
    plan = Plan(
        source=open_source(str(folder / "pictures")),
        teacher=teacher,
        policy=load_policy(),
        views=views,
        levels=parse_levels("last:5", teacher.depth),
        tokens="ranked",
        keep=min(KEPT, teacher.patches),
    )
    run(plan, caches[codec_names.LOSSLESS], batch_size=32, workers=2)
    for name in LOSSY:
        derive(caches[codec_names.LOSSLESS], caches[name], Wish(codec=name))
    for path in caches.values():
        sync(path)
        warm(path)
    return caches


def view_bytes(cache: featcache.Cache) -> int:
    """Count the bytes of a view, without statistics, thumbnail and checksums of prefixes."""
    arrays = {
        name: np.dtype(spec.dtype).itemsize * int(np.prod(spec.item))
        for name, spec in cache.arrays.items()
        if spec.per_view and name not in SIDE_ARRAYS
    }
    levels = len(cache.levels)
    checksums = 4 * (levels + len(arrays) + len(SIDE_ARRAYS) + levels)
    return sum(arrays.values()) + checksums


# ------------------------------------------------------------ reading


def time_reads(caches: Mapping[str, Path], threads: int, seconds: float) -> dict[str, float]:
    """Return rows a second of each cache, read in random batches with all checks."""
    found = {}
    for name, path in caches.items():
        with featcache.open(path, threads=threads, io="buffered") as cache:
            rows, views = len(cache), cache.views
            order = np.random.default_rng(0).permutation(rows * views)
            memory = cache.read(np.zeros(BATCH, int), 0)
            done, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds or done < len(order):
                at = order[np.arange(done, done + BATCH) % len(order)]
                cache.read(at // views, at % views, out=memory)
                done += BATCH
            found[name] = done / (time.perf_counter() - start)
    return found


def measure_reads(caches: Mapping[str, Path], reps: int, seconds: float) -> Results:
    """Return the medians of ratios to fp16's rate, by threads and codec."""
    results: Results = {}
    for threads in (1, 2):
        every = []
        for rep in range(reps):
            names = list(caches)
            turned = [names[(rep + i) % len(names)] for i in range(len(names))]
            every.append(time_reads({name: caches[name] for name in turned}, threads, seconds))
        results[str(threads)] = {
            name: statistics.median(each[name] / each[codec_names.LOSSLESS] for each in every)
            for name in caches
        }
    return results


# ------------------------------------------------------------ encoding and decoding


def fastest(work: Callable[[], Any], reps: int) -> float:
    """Return the seconds of the fastest of several calls, after one to warm up."""
    work()
    seconds = []
    for _ in range(reps):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_compute(caches: Mapping[str, Path], teacher: Any, reps: int) -> Results:
    """Return seconds a view of the teacher's forward, of a student's step, and of each codec."""
    with featcache.open(caches[codec_names.LOSSLESS]) as cache:
        count = min(16, len(cache))
        rows = np.arange(count)
        reader = FeatureReader(cache)
        stored = {
            name: torch.from_numpy(values)
            for name, values in cache.read(rows, 0, reader.fields).items()
        }
        h, visible = reader.decode(stored), reader.features(stored)
    pixels = torch.randint(
        0, 256, (count, 3, teacher.input_px, teacher.input_px), dtype=torch.uint8
    )
    levels = parse_levels("last:5", teacher.depth)
    with torch.no_grad():
        ys = run_teacher(teacher, pixels, levels)[:-1]
        every = torch.stack([normalise(y)[0] for y in ys], 1)
    forward = fastest(lambda: run_teacher(teacher, pixels, levels), reps) / count
    keep = stored["mask_order"][:, :KEPT].long().sort(1).values
    batch = {"images": torch.randn(count, 3, 224, 224), "ids_keep": keep, "features": visible}
    step = (
        fastest(plain_steps.make_step("maskalign", batch, torch.device("cpu"), "no"), reps) / count
    )
    results: Results = {"forward_s": forward, "step_s": step, "codecs": {}}
    for name in LOSSY:
        codec = CODECS[name]
        state = codec.prepare(iter(every), 0)
        coded = codec.encode(h, state)
        results["codecs"][name] = {
            "encode_s": fastest(lambda: codec.encode(h, state), reps) / count,  # noqa: B023
            "encode_all_s": fastest(lambda: codec.encode(every, state), reps) / count,  # noqa: B023
            "decode_s": fastest(lambda: codec.decode(coded, state), reps) / count,  # noqa: B023
        }
    return results


# ------------------------------------------------------------ what is lost


def samples(caches: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield tokens (n, 1, T, D) by name: normal ones, the teacher's last level, and both with
    outlier channels of 60 times the others, the same in all tokens or others in each."""
    random = torch.Generator().manual_seed(0)
    with featcache.open(caches[codec_names.LOSSLESS]) as cache:
        rows = np.arange(min(32, len(cache)))
        real = torch.from_numpy(cache.derive("h", rows, level=cache.levels[-1]))[:, None]
    normal = torch.randn(real.shape, generator=random)
    yield "normal numbers", normal
    yield "the teacher's last level", real
    for name, h in (("normal numbers", normal), ("the teacher's last level", real)):
        constant = torch.ones(h.shape[-1])
        constant[torch.randperm(h.shape[-1], generator=random)[:3]] = 60
        yield f"{name}, 3 channels x 60", normalise(h * constant)[0]
        each = torch.rand(h.shape, generator=random).argsort(-1) < 3
        yield f"{name}, 3 others x 60 in each token", normalise(torch.where(each, 60 * h, h))[0]


def measure_losses(caches: Mapping[str, Path]) -> Results:
    """Return relative MSE (of what is left without the channels' means) of codecs and peers."""
    results: Results = {}
    for what, h in samples(caches):
        rounded = h.half().float()
        mean = rounded.double().mean((0, 2)).float()
        found = results[what] = {}
        for name in LOSSY:
            state = CODECS[name].prepare(iter(rounded), 0)
            back = CODECS[name].decode(CODECS[name].encode(rounded, state), state)
            lost = distortion.compare(zip(rounded, back, strict=True), mean)
            found[name] = {
                "mse": lost.mse[0],
                "worst": lost.worst[0],
                "added_loss": lost.added_loss[0],
            }
        for name, peer in PEERS.items():
            tokens = rounded.reshape(-1, h.shape[-1])
            back = peer.through(tokens).reshape(h.shape)
            lost = distortion.compare(zip(rounded, back, strict=True), mean)
            found[name] = {
                "mse": lost.mse[0],
                "worst": lost.worst[0],
                "added_loss": lost.added_loss[0],
            }
    return results


# ------------------------------------------------------------ the report


def tables(results: Results, width: int) -> list[str]:
    compute, reads = results["compute"], results["reads"]
    head = [
        "codec",
        "bytes a view",
        "/ fp16",
        "rows/s / fp16, 1 thread",
        "2 threads",
        "decode ms a view",
        "/ step",
        "encode ms a view",
        "/ forward",
        "all tokens / forward",
    ]
    rows = []
    for name, count in results["bytes"].items():
        cost = compute["codecs"].get(name)
        rows.append(
            [
                name,
                f"{count:,}",
                f"{count / results['bytes'][codec_names.LOSSLESS]:.3f}",
                *(f"{reads[threads][name]:.2f}" for threads in reads),
                *(
                    [
                        f"{1000 * cost['decode_s']:.2f}",
                        f"{cost['decode_s'] / compute['step_s']:.1%}",
                        f"{1000 * cost['encode_s']:.1f}",
                        f"{cost['encode_s'] / compute['forward_s']:.1%}",
                        f"{cost['encode_all_s'] / compute['forward_s']:.1%}",
                    ]
                    if cost
                    else ["-"] * 5
                ),
            ]
        )
    out = [markdown_table(head, rows)]
    names = [*LOSSY, *PEERS]
    bits = {
        **{name: f"{8 * count / width:.2f}" for name, count in results["token_bytes"].items()},
        **{name: f"{peer.bits(width):.2f}" for name, peer in PEERS.items()},
    }
    head = ["relative MSE (worst token; added loss)", *results["losses"]]
    rows = [
        [
            f"{name}, {bits[name]} bits",
            *(
                "{mse:.1e} ({worst:.0e}; {added_loss:.2%})".format(**each[name])
                for each in results["losses"].values()
            ),
        ]
        for name in names
    ]
    return [*out, markdown_table(head, rows)]


def verdicts(results: Results) -> list[str]:
    """Say of each aim whether it holds."""
    compute, lines = results["compute"], []
    for name, aim in AIMS.items():
        for threads, found in results["reads"].items():
            lines.append(
                _verdict(
                    f"{name}: rows/s of fp16's, {threads} threads", found[name], aim, least=True
                )
            )
    for name, aim in BYTES.items():
        lines.append(_verdict(f"{name}: bytes a view", results["bytes"][name], aim))
    for name in LOSSY:
        share = compute["codecs"][name]["encode_s"] / compute["forward_s"]
        lines.append(_verdict(f"{name}: encoding of the teacher's forward", share, ENCODE_SHARE))
        added = max(
            found[name]["added_loss"]
            for what, found in results["losses"].items()
            if "60" not in what
        )
        lines.append(_verdict(f"{name}: added loss", added, ADDED_LOSS[name]))
    return lines


def _verdict(what: str, found: float, aim: float, *, least: bool = False) -> str:
    holds = found >= aim if least else found <= aim
    text = f"{what} {found:.6g}, {'at least' if least else 'at most'} {aim:.6g}"
    return f"{'holds' if holds else 'does not hold'}: {text}"


@click.command(cls=Command, context_settings={"max_content_width": 110})
@command_options.text("--teacher", default="clip-b16")
@command_options.text("--weights", default="random:0")
@command_options.number("--pictures", HelpGroup.INPUT, 512, "Pictures that are made.", least=2)
@command_options.number("--views", HelpGroup.INPUT, 2, "Views a picture.")
@command_options.reps(5)
@option(
    "--seconds",
    group=HelpGroup.RUNNING,
    type=float,
    default=3.0,
    show_default=True,
    help="Of each read.",
)
@command_options.folder
@command_options.json_file
def cli(
    teacher: str,
    weights: str,
    pictures: int,
    views: int,
    reps: int,
    seconds: float,
    folder: Path | None,
    json_path: Path | None,
) -> None:
    """Measure codecs."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        about = environment(Path(name))
        click.echo(describe(about))
        network = load(teacher, weights)
        caches = make_caches(Path(name), network, pictures, views)
        results: Results = {"environment": about, "threads": torch.get_num_threads()}
        results["losses"] = measure_losses(caches)
        results["compute"] = measure_compute(caches, network, reps)
        results["reads"] = measure_reads(caches, reps, seconds)
        opened = {codec: featcache.open(path) for codec, path in caches.items()}
        results["bytes"] = {codec: view_bytes(cache) for codec, cache in opened.items()}
        results["token_bytes"] = {
            codec: opened[codec].arrays["features"].item[-1] for codec in LOSSY
        }
    click.echo("\n\n".join([*tables(results, network.width), *["\n".join(verdicts(results))]]))
    save_json(json_path, results)


if __name__ == "__main__":
    entry(cli)
