"""The benchmark programs run to their end at tiny sizes, and do not time a reader that gives wrong
numbers.

How fast anything is has no place here: 16 rows of 2 x 5 x 16 say nothing about it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import sklearn.utils
import torch
from safetensors.torch import save_file

import featcache
from benchmarks import (
    bench_commits,
    bench_extract,
    bench_foreign,
    bench_read,
    bench_recipes,
    codec_peers,
    cold,
    drop,
    markdown_table,
    peers,
    resident_share,
    warm,
)
from benchmarks.comparison import Comparison, Reader, Task, Timing, check_reader, time_reader
from benchmarks.records import CacheReaders, ReadCase, make_source, write_cache
from featcache.errors import UsageError, UserError
from featcache.pictures.open_source import open_source
from featcache.teachers import load, load_tokenizer
from pipelines import digits, tokenizer
from student import checkpoint, recipes
from tests.conftest import run_module

TASK = Task(16, (2, 5, 16), 2, 4, 4)
ORDER = np.random.default_rng(0).permutation(16)
SOURCE = make_source(TASK)
ROOT = Path(__file__).parents[2]


def program(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return run_module(f"benchmarks.{name}", *args, cwd=ROOT)


# ------------------------------------------------------------ the programs


def test_two_commits_are_compared_round_by_round() -> None:
    """Ratios 2/1, 2/2, 4/4; medians 2 and 2; quarters of the rounds lie below 1.5 and above 3."""
    facts = bench_commits.summarise([1.0, 2.0, 4.0], [2.0, 2.0, 4.0])
    assert facts == {
        "before_s": 2, "after_s": 2, "ratio": 1, "lowest": 1, "highest": 2, "spread": 0.75,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository to take a commit from")
def test_bench_commits_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "commits.json"
    small = ("--rounds", 1, "--pictures", 32, "--rows", 2000, "--steps", 12)
    done = program("bench_commits", "HEAD", *small, "--json", path)
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    reads = {"read all fields", "read features"}
    assert set(results) == {"extract", "step", "around the steps", "open", *reads}
    assert all(facts["ratio"] > 0 for facts in results.values())
    worktrees = subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert "before" not in worktrees.stdout


@pytest.mark.slow
def test_bench_train_step_to_its_end(tmp_path: Path) -> None:
    """A trial: each way takes its steps, and the ratios are of the seconds beside them."""
    path = tmp_path / "step.json"
    small = (
        "--trial",
        "--recipe",
        "maskalign",
        "--batch-size",
        2,
        "--pictures",
        4,
        "--steps",
        1,
        "--reps",
        1,
    )
    ran = program(
        "bench_train_step", *small, "--device", "cpu", "--folder", tmp_path, "--json", path
    )
    assert ran.returncode == 0, ran.stderr
    (line,) = json.loads(path.read_text())["lines"]
    seconds = {name: values[0] for name, values in line["seconds"].items()}
    assert set(seconds) == {"online", "cached", "in memory"}
    assert line["online / cached"] == pytest.approx(seconds["online"] / seconds["cached"])
    assert line["cached / in memory"] == pytest.approx(seconds["cached"] / seconds["in memory"])
    assert ran.stdout.splitlines()[-1].startswith(
        "cached / in memory, at most (maskalign, synthetic) = "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


@pytest.mark.slow
def test_bench_loader_to_its_end(tmp_path: Path) -> None:
    """Every way delivers, ratios are of the rates beside them, and nothing is left."""
    path = tmp_path / "loader.json"
    small = (
        "--rows",
        12,
        "--shape",
        "2x197x16",
        "--batch-size",
        4,
        "--reps",
        1,
        "--seconds",
        0.2,
        "--steps",
        3,
    )
    ran = program("bench_loader", *small, "--workers", 1, "--folder", tmp_path, "--json", path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    assert len(found["rates"]) == 9 + 2 * bool(importlib.util.find_spec("ffcv"))
    assert all(rate > 0 for rates in found["rates"].values() for rate in rates)
    assert len(found["data_wait"]) == 2
    lines = ran.stdout.splitlines()
    stored, preads, tars, peer = (
        found["rates"][name][0]
        for name in (
            "ours, stored pixels",
            "plain preads of the same bytes",
            "ours, tars",
            "webdataset, Pillow and npy",
        )
    )
    for text, value in (
        ("ours, stored pixels / preads", stored / preads),
        ("ours, tars / webdataset", tars / peer),
    ):
        (line,) = (line for line in lines if line.startswith(text))
        assert float(line.split(" = ")[1].split(",")[0]) == pytest.approx(value, abs=0.006)
        assert line.endswith(("  ok", "  MISSED"))
    assert sum(line.startswith("data_wait, encoder tiny on cpu") for line in lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["loader.json"]


@pytest.mark.slow
def test_bench_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "read.json"
    small = ("--rows", 16, "--shape", "2x5x16", "--reps", 1, "--threads", "1,2", "--seconds", 0.2)
    ran = program("bench_read", *small, "--folder", tmp_path, "--json", path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    assert found["hardware"]["cores"] >= 1
    assert {"cpu", "memory_bytes", "kernel", "filesystem"} <= set(found["hardware"])
    assert found["versions"]["featcache"]
    assert found["commit"]
    assert found["options"]["rows"] == 16
    assert all(result["ratio"] > 0 and result["gb_s"] > 0 for result in found["results"])
    assert {result.get("peer") for result in found["results"]} >= {
        p for p in peers.PEERS if not peers.missing(p)
    }
    lines = ran.stdout.splitlines()
    for text in (
        "random rows, no checks / memcpy = ",
        "random rows, row checks / memcpy = ",
        "time for 1 of 2 levels",
    ):
        assert (
            sum(line.startswith(text) and line.endswith(("  ok", "  MISSED")) for line in lines)
            >= 1
        ), text
    assert found["cold"]["gb_s"] or found["cold"]["skipped"]
    assert [path.name for path in tmp_path.iterdir()] == ["read.json"]  # nothing else is left


@pytest.mark.slow
def test_bench_foreign_to_its_end(tmp_path: Path) -> None:
    """It checks the row that each library reads; a row of a few MB is read in each."""
    ran = program(
        "bench_foreign", "--rows", "16", "--folder", tmp_path, "--json", tmp_path / "found.json"
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 9
    assert {row["library"] for row in found} == {"zarr-python", "zarrs", "tensorstore"}
    for row in found:
        whole = row["shard"] == "format 3"
        assert (row["read_bytes"] > 16 * 1_512_960) == whole
        assert whole or row["read_bytes"] < 1_600_000


@pytest.mark.slow
def test_bench_remote_to_its_end(tmp_path: Path) -> None:
    """It compares the rows of every reader with those that were written before it times one."""
    options = ("--rows", "64", "--shard-rows", "16", "--reps", "1", "--seconds", "0.5")
    ran = program("bench_remote", *options, "--folder", tmp_path, "--json", tmp_path / "found.json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["kind"] for row in found["results"]] == [
        "whole", "whole", "block", "block", "whole", "block", "stream",
    ]  # fmt: skip
    assert all(row["gb_s"] > 0 for row in found["results"])
    assert [row["ratio"] for row in found["results"] if row["name"] == row["versus"]] == [1, 1]
    assert len(found["claims"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]  # nothing else is left


def test_bench_foreign_serves_ranges(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with bench_foreign.serve(tmp_path) as (address, sent):
        for given, wanted in (
            ("bytes=5-9", slice(5, 10)),
            ("bytes=90-", slice(90, 100)),
            ("bytes=-4", slice(96, 100)),
            (None, slice(0, 100)),
        ):
            request = urllib.request.Request(f"{address}/file")
            if given:
                request.add_header("Range", given)
            with urllib.request.urlopen(request) as answer:
                assert answer.read() == bytes(range(100))[wanted]
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(f"{address}/none")
        caught.value.close()
    assert sent == [5, 10, 4, 100]


@pytest.mark.slow
def test_bench_write_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "write.json"
    small = (
        "--teacher",
        "synthetic:levels=2,tokens=4,width=16,size=28",
        "--levels",
        "all",
        "--rows",
        8,
        "--views",
        2,
    )
    ran = program(
        "bench_write",
        *small,
        "--batch-size",
        4,
        "--workers",
        1,
        "--folder",
        tmp_path,
        "--json",
        path,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    assert found["hardware"]["cpu"]
    assert set(found["ratios"]) == {
        "writer alone / raw disk",
        "store / null sink",
        "store / raw disk",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values())
    (rep,) = found["repetitions"]
    assert rep["store"]["slowest"] in ("decode", "copy", "teacher", "encode", "write")
    assert set(rep["store"]["resident_bytes"]) == {"25", "50", "75", "100"}
    assert rep["store"]["peak_bytes"] >= rep["store"]["start_bytes"] > 0
    assert "memory above the start = " in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["write.json"]


VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=16,embed_dim=24,depth=2,num_heads=3"


@pytest.mark.slow
@pytest.mark.parametrize("ready", [(), ("--ready",)], ids=["network", "ready"])
def test_bench_extract_to_its_end(tmp_path: Path, ready: tuple[str, ...]) -> None:
    path = tmp_path / "extract.json"
    small = (
        "--teacher",
        VIT,
        "--levels",
        "all",
        "--rows",
        7,
        "--reps",
        2,
        "--batch-size",
        4,
        "--workers",
        1,
        *ready,
    )
    ran = program("bench_extract", *small, "--device", "cpu", "--folder", tmp_path, "--json", path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    assert found["hardware"]["cpu"]
    assert found["options"]["device"] == "cpu"
    assert [*found["repetitions"][0]] == list(found["repetitions"][1])
    assert set(found["repetitions"][0]) == set(bench_extract.VARIANTS)
    for case in ("null sink", "store"):
        assert set(found["repetitions"][0][case]["busy"]) == {
            "decode",
            "copy",
            "teacher",
            "encode",
            "write",
        }
    assert found["bytes"] == found["repetitions"][1]["raw disk"]["bytes"]
    assert set(found["ratios"]) == {
        *bench_extract.AIMS, "store / null sink", "rate of store / raw disk"
    }  # fmt: skip
    lines = ran.stdout.splitlines()
    aimed = [line for line in lines if line.startswith(tuple(bench_extract.AIMS))]
    assert all(line.endswith(("  ok", "  MISSED")) == (not ready) for line in aimed)
    assert len(aimed) == 2
    assert lines[-1].startswith("the stage that limits the extraction into the store: ")
    assert [path.name for path in tmp_path.iterdir()] == ["extract.json"]


def test_bench_recipes_has_a_row_for_every_recipe() -> None:
    assert {case.recipe for case in bench_recipes.CASES.values()} == set(recipes.names())
    assert "target=f" in bench_recipes.settings_of(bench_recipes.Case("kd"))
    assert not any(
        text.startswith("target=")
        for text in bench_recipes.settings_of(bench_recipes.Case("maskalign"))
    )
    own = bench_recipes.settings_of(bench_recipes.Case("mae", settings={"decoder_depth": 3}))
    assert [text for text in own if text.startswith("decoder_depth")] == ["decoder_depth=3"]


def test_bench_recipes_tells_who_learnt_and_who_did_not() -> None:
    before = [60.0, 61.0, 62.0, 63.0, 64.0]  # 62 and sqrt(2.5)
    common = {"untrained": before, "wanted": 65.16, "seconds": 7.4}
    found = {
        "a": {**common, "passed": True, "checkpoints": [(50, 40.0), (100, 70.5)]},
        "b": {**common, "passed": False, "checkpoints": [(50, 64.0), (100, 51.0)]},
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in bench_recipes.report(found, 100).splitlines()
    ]
    assert rows[2] == ["a", "62.0 ± 1.6", "65.2", "100", "70.5", "7"]
    assert rows[3] == ["b", "62.0 ± 1.6", "65.2", "not in 100", "best 64.0", "7"]


TRAINING = """
import sys, time, torch
from pathlib import Path
folder = Path(sys.argv[1]) / "checkpoints"
folder.mkdir(parents=True)
for step in (5, 10, 15):
    (folder / f"step-{step:08d}.part").touch()
    (folder / f"step-{step:08d}.part").rename(folder / f"step-{step:08d}.pt")
    time.sleep(0.6)
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 3])
def test_bench_recipes_looks_at_every_checkpoint(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that writes three, the next while this one is looked at, were it not held; one
    that fails says so in one line."""
    monkeypatch.setattr(checkpoint, "load_encoder", lambda run: (checkpoint.latest_step(run), {}))
    command = [sys.executable, "-c", TRAINING, str(tmp_path), str(status)]
    seen = []
    with pytest.raises(UserError, match="failed: 3") if status else contextlib.nullcontext():
        for each in bench_recipes.checkpoints(command, tmp_path):
            seen.append(each)
            time.sleep(1.3)
    assert seen == [(5, 5), (10, 10), (15, 15)]


@pytest.mark.slow
def test_bench_recipes_stops_the_training_it_need_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_encoder", lambda run: (checkpoint.latest_step(run), {}))
    command = [sys.executable, "-c", TRAINING.replace("0.6", "60"), str(tmp_path), "0"]
    with contextlib.closing(bench_recipes.checkpoints(command, tmp_path)) as found:
        assert next(found) == (5, 5)


def few_digits(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 digits to learn from and 60 held out, a teacher and a tokenizer that have learnt nothing:
    what the program would otherwise make in minutes."""
    whole = sklearn.datasets.load_digits()
    cut = sklearn.utils.Bunch(images=whole.images[:120], target=whole.target[:120])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: cut)
    monkeypatch.setattr(digits, "TRAIN", 60)
    digits.write_shards(home, seed=0)
    train = open_source(f"{home}/data/train-*.tar")
    save_file(
        digits.train_teacher(train, seed=0, epochs=2).state_dict(), home / "teacher.safetensors"
    )
    words = load_tokenizer(tokenizer.SPEC, "random:0")
    save_file(dict(words.state_dict()), home / "tokenizer.safetensors")
    for name in ("teacher", "tokenizer"):
        (home / f"{name}.json").write_text(json.dumps({"name": name}))
    return home


@pytest.mark.slow
def test_bench_recipes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recipes, four steps: nothing is learnt, which is told, and the exit status is 1."""
    path, home = tmp_path / "r.json", few_digits(tmp_path / "d", monkeypatch)
    small = ("--steps", 4, "--every", 2, "--batch-size", 8, "--recipe", "cae", "--recipe", "mae")
    ran = program("bench_recipes", *small, "--folder", home, "--json", path)
    assert ran.returncode == 1, ran.stderr
    assert (
        "not 2 standard deviations above untrained encoders within 4 steps"
        in ran.stderr.splitlines()[-1]
    )
    found = json.loads(path.read_text())
    assert set(found["recipes"]) == {"cae", "mae"}
    for row in found["recipes"].values():
        assert len(row["untrained"]) == 5
        assert row["wanted"] == pytest.approx(
            np.mean(row["untrained"]) + 2 * np.std(row["untrained"], ddof=1)
        )
        assert [step for step, _ in row["checkpoints"]][-1] == 4
    assert found["tokenizer"] == {"name": "tokenizer"}
    assert "| cae " in ran.stdout


def test_the_bare_network_is_the_same_without_hooks() -> None:
    """It gives what timm gives, and asks no attention."""
    plain, read = bench_extract.without_hooks(load(VIT, "random:0")), load(VIT, "random:0")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert plain(batch, ())[0] == []
    assert plain(batch, ())[1].numel() == 0
    assert read(batch, ())[1].numel() == 8
    x = torch.full((1, 3, 32, 32), -1.0)
    torch.testing.assert_close(plain.vit.forward_features(x), read.vit.forward_features(x))


def test_ratios_of_an_extraction_are_of_one_repetition() -> None:
    seconds = [(1.0, 1.1, 1.2, 4.0, 2.0), (2.0, 2.2, 3.0, 4.0, 1.0), (1.0, 1.3, 1.4, 4.0, 3.0)]
    reps = [
        {case: {"seconds": s} for case, s in zip(bench_extract.VARIANTS, rep, strict=True)}
        for rep in seconds
    ]
    found = bench_extract.ratios_of(reps)
    assert found["null sink / bare forward"] == pytest.approx(
        {"median": 1.4, "lowest": 1.2, "highest": 1.5}
    )
    assert found["read forward / bare forward"]["median"] == pytest.approx(1.1)
    assert found["rate of store / raw disk"] == pytest.approx(
        {"median": 0.5, "lowest": 0.25, "highest": 0.75}
    )
    lines = bench_extract.verdicts(found, "write", "cpu", False)
    assert [line.split()[-1] for line in lines if "aim" in line] == ["MISSED", "MISSED", "MISSED"]
    assert (
        "(not the disk: teacher is the limit)"
        in bench_extract.verdicts(found, "teacher", "cpu", True)[-1]
    )


def test_what_cannot_be_asked() -> None:
    assert peers.parse_peers("none") == ()
    assert bench_read.parse_shape("5x197x768") == (5, 197, 768)
    with pytest.raises(UsageError, match="--peers: unknown 'hdf5'"):
        peers.parse_peers("npy,hdf5")
    for shape in ("5x197", "5x1x768", "ax2x3", "0x2x3"):
        with pytest.raises(UsageError, match="--shape"):
            bench_read.parse_shape(shape)


# ------------------------------------------------------------ right numbers, or no time


# tars, where a stream is left before its end
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("layout", peers.LAYOUTS, ids=lambda layout: layout.name)
def test_every_peer_is_checked(layout: peers.Layout, tmp_path: Path) -> None:
    """Right numbers pass; with any number changed after writing, every reader is refused."""
    if all(peers.missing(peer) for peer in layout.readers):
        pytest.skip(f"needs one of {', '.join(layout.readers)}")
    layout.write(tmp_path, SOURCE, TASK)
    wrong = SOURCE.copy()
    wrong[:, -1, -1, -1] += 1
    for peer, make in layout.readers.items():
        for reader in [] if peers.missing(peer) else make(tmp_path, TASK):
            if "DataLoader" in reader.name:  # forks; it runs in the test of the program
                continue
            check_reader(reader, ORDER, SOURCE)
            with pytest.raises(UserError, match="not what was written"):
                check_reader(reader, ORDER, wrong)
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    write_cache(path / "raster", SOURCE, "zarr", ranked=False)
    return write_cache(path / "ranked", SOURCE, "zarr", ranked=True)


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize("part", [{}, {"levels": 1}, {"tokens": 2}], ids=str)
@pytest.mark.parametrize("kind", ["rows", "block"])
def test_ours_and_memcpy_are_checked(
    folder: Path, kind: str, part: dict[str, int], checks: bool
) -> None:
    cache_readers, case = (
        CacheReaders(TASK, SOURCE, ORDER),
        ReadCase(kind, 2, checks=checks, **part),
    )
    with featcache.open(folder, threads=2) as cache:
        bare = case._replace(checks=None, bare=True)
        for reader in (
            cache_readers.ours(cache, case),
            cache_readers.memcpy(case.memcpy),
            cache_readers.preads(cache, bare),
        ):
            check_reader(reader, ORDER, SOURCE, batches=99)
            with pytest.raises(UserError, match="not what was written"):
                check_reader(reader, ORDER, SOURCE + np.float16(1))
    assert len({case.name, case.memcpy.name, bare.name}) == 3


def test_a_written_cache_has_its_checksums(folder: Path) -> None:
    for path in (folder, folder.with_name("raster")):
        with featcache.open(path) as cache:
            np.testing.assert_array_equal(cache.read(ORDER)["features"], SOURCE[ORDER])
            assert cache.complete
            assert list(cache.keys)[3] == "000000003"
    with featcache.open(folder) as cache:
        np.testing.assert_array_equal(cache.read([5], tokens=2)["features"], SOURCE[[5], :, :2])


def test_a_reader_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no rows at all"):
        check_reader(Reader("empty", "rows", lambda order: iter(())), ORDER, SOURCE)
    with pytest.raises(UserError, match="more --rows"):
        time_reader(Reader("one", "rows", lambda order: iter([(ORDER, SOURCE)])), ORDER, 1.0)


# ------------------------------------------------------------ the measuring itself


def test_orders_cover_every_row_once() -> None:
    assert sorted(row for rows in TASK.batches(ORDER) for row in rows) == list(range(16))
    blocks = [row for low, high in TASK.blocks(ORDER) for row in range(low, high)]
    assert sorted(blocks) == list(range(16))
    assert blocks != sorted(blocks)


def test_first_batch_is_not_timed() -> None:
    timing = time_reader(
        Reader("x", "rows", lambda order: iter([(range(4), SOURCE[:4])] * 3)), ORDER, 1.0
    )
    assert (timing.rows, timing.bytes) == (8, 2 * SOURCE[:4].nbytes)


def test_ratios_are_of_one_repetition() -> None:
    """The median of 1/2, 1/4 and 1/12; the ratio of the medians would be another."""
    readers = [Reader(name, "rows", lambda order: iter(())) for name in "ab"]
    turns: dict[str, list[Timing]] = {
        "a": [Timing(1, 10, 2.0), Timing(1, 10, 4.0), Timing(1, 10, 6.0)],
        "b": [Timing(1, 10, 1.0), Timing(1, 10, 1.0), Timing(1, 20, 1.0)],
    }
    comparison = Comparison(readers, turns)
    assert comparison.ratios("a", "b") == pytest.approx([1 / 2, 1 / 4, 1 / 12])
    assert comparison.ratio("a", "b") == pytest.approx(1 / 4)
    assert comparison.time_ratio("a", "b") == pytest.approx(4.0)
    facts: dict[str, Any] = comparison.facts("a", "b")
    assert (facts["lowest"], facts["highest"], facts["versus"]) == pytest.approx(
        (1 / 12, 1 / 2, "b")
    )


def test_pages_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(bytes(1 << 20))
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert warm(file) == 1.0
    if drop(file) > 0.01:
        pytest.skip("this file system keeps its pages")
    assert resident_share(tmp_path) == 0.0
    with file.open("rb", buffering=0) as handle:
        handle.read(4096)
    assert 0 < resident_share(file) <= 1.0


@pytest.mark.parametrize("direct", [False, True])
def test_plain_reads_read_everything(folder: Path, direct: bool) -> None:
    with featcache.open(folder) as cache:
        rows = cold.row_ranges(cache, folder, ORDER)
    whole = cold.file_ranges(rows)
    sizes = {path: Path(path).stat().st_size for path, _, _ in rows}
    try:
        assert cold.read_raw(rows, 2, direct=direct, shared=True) == 16 * TASK.row_bytes
        assert cold.read_raw(whole, 2, direct=direct, shared=False) == sum(sizes.values())
    except OSError:
        assert direct  # not every file system reads past the page cache
    path, offset, length = rows[0]
    with open(path, "rb") as file:  # noqa: PTH123 (a text, as the program has it)
        file.seek(offset)
        assert file.read(length) == SOURCE[ORDER[0]].tobytes()


def test_tables_line_up() -> None:
    assert markdown_table(["", "a"], [("x", "1"), ("long", "22")]).splitlines() == [
        "|      |  a |",
        "| ---- | -: |",
        "| x    |  1 |",
        "| long | 22 |",
    ]


@pytest.mark.slow
def test_bench_codecs_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    small = ("--teacher", "timm:vit_tiny_patch16_224", "--pictures", 4, "--views", 1, "--reps", 1)
    ran = program("bench_codecs", *small, "--seconds", 0, "--folder", tmp_path, "--json", path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    # 5 levels of 59 tokens: 4 bytes of scale, and 8, 4 or 3 bits for each of 192 channels
    sizes = {name: 5 * 59 * (4 + 24 * bits) for name, bits in (("q8", 8), ("t4", 4), ("t3", 3))}
    for name, count in sizes.items():
        assert count < found["bytes"][name] < count + 1200
        assert found["token_bytes"][name] * 5 * 59 == count
    assert "| fp16" in ran.stdout
    assert {"holds", "does not hold"} >= {
        line.partition(":")[0] for line in ran.stdout.splitlines() if ", at " in line
    }
    assert not list(tmp_path.glob("tmp*"))


def test_peers_of_codecs_are_as_good_as_they_are_known_to_be() -> None:
    """Relative errors of normal numbers, as others have measured them."""
    x = torch.randn(2000, 768, generator=torch.Generator().manual_seed(0))
    lost = {
        name: float((peer.through(x) - x).square().mean())
        for name, peer in codec_peers.PEERS.items()
    }
    assert 4e-5 < lost["int8, a scale a token"] < 8e-5
    assert 5e-4 < lost["FP8 E4M3, a scale a token"] < 9e-4
    assert 7e-3 < lost["NF4, blocks of 64"] < 1e-2
    assert 7e-3 < lost["NVFP4, blocks of 16"] < 1.1e-2
    assert 1.2e-2 < lost["int4, a scale a token"] < 2.5e-2


@pytest.mark.slow
def test_bench_codec_students_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    ran = program(
        "bench_codec_students", "--reduced", "--seeds", 0, "--codecs", "t3", "--json", path
    )
    assert ran.returncode == 0, ran.stderr
    scored = json.loads(path.read_text())["seeds"]["0"]
    assert set(scored) == {"fp16", "t3"}
    assert scored["t3"]["loss"] != scored["fp16"]["loss"]
