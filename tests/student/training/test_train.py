"""The trainer is tested: learning rates, the run folder, what stops it, and what a resumed run must
agree with."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import student.training.train
from featcache.reading.cache import Cache
from featcache.storage import manifest
from student import checkpoint
from student.setup import cache_match
from student.training import metrics
from student.training.metrics import Metrics
from student.training.train import step_seed
from tests import student_fixtures as fx
from tests.conftest import flip

SMALL = ("--batch-size", "8")

# A recipe of one's own: the mean colour is learnt, and from the third forward on the loss is not a
# number.
MINE = '''"""Mine."""
import torch
from pydantic.dataclasses import dataclass
from student.models import vit
from student.config import CHECKED, RecipeConfig
from student.recipes import TargetSpec

@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    bad: int = 3

def needs(config):
    return TargetSpec(teacher="", levels=(), fields=(), patches=config.patches)

class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = vit.build(
            config.encoder, img_size=config.img_size, patch_size=config.patch_size)
        self.bad, self.calls = config.bad, 0

    def no_weight_decay(self):
        return set()

    def forward(self, batch):
        self.calls += 1
        loss = (self.encoder(batch["images"]) ** 2).mean()
        return {"loss": loss * float("nan") if self.calls >= self.bad else loss}
'''


def mine(tmp_path: Path, run: Path, *options: str, text: str = MINE) -> fx.Ran:
    (tmp_path / "mine.py").write_text(text)
    sets = [part for text in (*fx.COMMON, "patch_size=8") for part in ("--set", text)]
    recipe = (
        "--recipe",
        tmp_path / "mine.py",
        "--images",
        fx.pictures(),
        "--policy",
        fx.policy_file(),
    )
    return fx.stud(
        "train",
        *recipe,
        "--out",
        run,
        "--device",
        "cpu",
        *SMALL,
        *sets,
        *options,
        home=tmp_path / "home",
    )


def test_a_recipe_that_draws_for_a_process_is_told_so(tmp_path: Path) -> None:
    """Dropout of its own comes from torch's generator, seeded by step and process: the same again
    in the same number of processes."""
    own = MINE.replace(
        "self.bad, self.calls", "self.rest = torch.nn.Dropout(0.5)\n        self.bad, self.calls"
    )
    own = own.replace('self.encoder(batch["images"])', 'self.rest(self.encoder(batch["images"]))')
    found = []
    for name in "ab":
        ran = fx.good(mine(tmp_path, tmp_path / name, "--steps", "2", text=own))
        assert "note: rest of this recipe draw from torch's generator" in ran.err
        found.append(fx.losses(tmp_path / name))
    assert found[0] == found[1]


def run_of(
    tmp_path: Path,
    *options: Any,
    name: str = "run",
    sets: tuple[str, ...] = (),
    recipe: str = "maskalign",
) -> Path:
    fx.good(
        fx.train(recipe, tmp_path / name, "--cache", fx.cache_path(), *SMALL, *options, sets=sets)
    )
    return tmp_path / name


# --- learning rates -------------------------------------------------------------------------------


def test_rates_by_hand(tmp_path: Path) -> None:
    """24 pictures in steps of 8 are 3 steps an epoch; 2 epochs of warm-up in 4, blr 0.32: the peak
    is 0.32 * 8 / 256 = 0.01, six steps rise to it by sixths, then half a cosine over six steps goes
    towards 0.001."""
    sets = ("warmup_epochs=2", "lr=null", "blr=0.32", "min_lr=0.001")
    rows = metrics.read(run_of(tmp_path, "--epochs", "4", sets=sets))
    rise = [0, 0.01 / 6, 0.02 / 6, 0.03 / 6, 0.04 / 6, 0.05 / 6]
    # (1 + cos(k pi / 6)) / 2
    half = [1, (2 + math.sqrt(3)) / 4, 0.75, 0.5, 0.25, (2 - math.sqrt(3)) / 4]
    expected = [*rise, *(0.001 + 0.009 * part for part in half)]
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-12)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["epoch"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_the_rate_is_really_used(tmp_path: Path) -> None:
    """At a learning rate of 0 (the first step of a warm-up) no weight moves."""
    one = run_of(tmp_path, "--steps", "1", sets=("warmup_epochs=1",), name="one")
    none = run_of(tmp_path, "--steps", "0", sets=("warmup_epochs=1",), name="none")
    assert fx.same_weights(one, none)


def test_the_rate_follows_the_global_batch(tmp_path: Path) -> None:
    sets = ("lr=null", "blr=0.32")
    plain = metrics.read(run_of(tmp_path, "--steps", "1", sets=sets, name="a"))[0]["lr"]
    double = metrics.read(
        run_of(tmp_path, "--steps", "1", "--accumulate", "2", sets=sets, name="b")
    )[0]["lr"]
    assert (plain, double) == (pytest.approx(0.01), pytest.approx(0.02))


def test_step_seed_literals() -> None:
    """numpy.random.Philox, counter (0, 0, step, BLAKE2b-64 of 'model:SEED'), key BLAKE2b-128 of
    'step:MICRO:RANK', the first word without its last bit (torch takes 63 bits)."""
    assert step_seed(0, 0, 0, 0) == 7697881356527860803
    assert step_seed(0, 1, 0, 0) == 2263479409534137430
    assert step_seed(3, 1000, 1, 2) == 2243229204195202265
    several = {
        step_seed(s, t, m, r)
        for s in range(2)
        for t in range(5)
        for m in range(2)
        for r in range(3)
    }
    assert len(several) == 60


# --- what fails before the first step -------------------------------------------------------------


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "wrong", ["encoder=tny", "encoder=tiny,dept=3", "encoder=resnet50", "encoder=tiny,num_heads=5"]
)
def test_a_wrong_setting_leaves_no_folder_in_the_way(wrong: str, tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "1", *SMALL)
    ran = fx.train("maskalign", tmp_path / "run", *options, sets=(wrong,))
    assert ran.status == 2
    assert wrong.partition("=")[2].partition(",")[0] in ran.line
    assert not (tmp_path / "run").exists()
    fx.good(fx.train("maskalign", tmp_path / "run", *options))


def test_other_pictures_leave_no_folder_in_the_way(tmp_path: Path) -> None:
    """Told by the first batch, when the folder is there already; what was in it before stays."""
    others = fx.save_pictures(tmp_path / "others", seed=1)
    options = ("--cache", fx.cache_path(), "--steps", "1", *SMALL, "--check-pixels", "1")
    for run in (tmp_path / "new", tmp_path / "there"):
        if run.name == "there":
            run.mkdir()
            (run / ".keep").touch()
        ran = fx.train("maskalign", run, *options, "--images", others)
        assert ran.status == 1
        assert "not those the teacher saw" in ran.line
        fx.good(fx.train("maskalign", run, *options))
    assert (tmp_path / "there/.keep").is_file()


def test_a_resumed_run_that_fails_at_once_is_kept(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--steps", "3", "--save-every", "1")
    for path in sorted((run / "checkpoints").iterdir()):
        path.unlink()
    others = fx.save_pictures(tmp_path / "others", seed=1)
    options = (
        "--cache",
        fx.cache_path(),
        "--steps",
        "3",
        "--save-every",
        "1",
        *SMALL,
        "--check-pixels",
        "1",
    )
    assert fx.train("maskalign", run, *options, "--images", others, "--resume").status == 1
    assert (run / checkpoint.CONFIG).is_file()


# --- the run folder -------------------------------------------------------------------------------


def test_the_run_folder(tmp_path: Path) -> None:
    begun = time.time()
    run = run_of(tmp_path, "--steps", "4", "--seed", "5", recipe="mralign")
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.json", "encoder.safetensors", "environment.json", "metrics.jsonl",
    ]  # fmt: skip
    rows = metrics.read(run)
    parts = {"align", "pixel", "level_2", "level_3", "level_4"}
    assert set(rows[0]) == {"step", "epoch", "loss", "lr", *metrics.CLOCKS} | parts
    assert all(row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert begun <= times[0]
    assert times[-1] <= time.time()
    for row in rows:
        assert row["loss"] == pytest.approx(0.5 * row["align"] + 0.5 * row["pixel"], rel=1e-5)
        assert row["align"] == pytest.approx(
            (row["level_2"] + row["level_3"] + row["level_4"]) / 3, rel=1e-5
        )


def test_the_record_of_a_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--steps", "2", "--seed", "5")
    record = json.loads((run / "config.json").read_text())
    cache = fx.open_cache()
    assert record["recipe"] == "maskalign"
    assert (record["seed"], record["steps"]) == (5, 2)
    assert record["precision"] in ("no", "fp32")
    assert record["config"]["encoder"] == fx.ENCODER
    assert record["config"]["drop_path"] == 0.1
    assert record["targets"]["id"] == cache.manifest["id"]
    assert record["targets"]["identity"] == json.loads(json.dumps(cache.identity))
    digest = hashlib.blake2b(
        "".join(f"p{i:02d}\n" for i in range(24)).encode(), digest_size=16
    ).hexdigest()
    expected = {"pictures": 24, "keys_digest": digest, "global_batch": 8, "steps_per_epoch": 3}
    expected |= {"sampling": "random", "aug_repeats": 1}
    assert record["data"] == expected
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"featcache", "timm", "python", "device", "threads", "commit", "command"} <= set(
        environment
    )


def test_the_ledger_lies_in_home_and_the_cache_is_untouched(tmp_path: Path) -> None:
    cache = Path(shutil.copytree(fx.cache_path(), tmp_path / "c"))
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "run",
            "--cache",
            cache,
            "--steps",
            "1",
            *SMALL,
            home=tmp_path / "home",
        )
    )
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    use, line = (tmp_path / "home" / "runs.jsonl").read_text().splitlines()
    assert json.loads(use)["command"] == "use"
    noted = json.loads(line)
    assert noted["command"] == "train"
    assert noted["recipe"] == "maskalign"
    assert noted["run"] == str(tmp_path / "run")


@pytest.mark.slow
def test_a_config_file_is_a_runs_own_record(tmp_path: Path) -> None:
    first = run_of(tmp_path, "--steps", "3", name="first", sets=("drop_path=0.3",))
    options = (
        "--cache",
        fx.cache_path(),
        "--steps",
        "3",
        *SMALL,
        "--config",
        first / "config.json",
    )
    fx.good(
        fx.stud(
            "train",
            "--recipe",
            "maskalign",
            "--device",
            "cpu",
            "--out",
            tmp_path / "again",
            *options,
        )
    )
    assert fx.losses(first) == fx.losses(tmp_path / "again")
    over = ("--set", "drop_path=0")
    fx.good(
        fx.stud(
            "train",
            "--recipe",
            "maskalign",
            "--device",
            "cpu",
            "--out",
            tmp_path / "over",
            *options,
            *over,
        )
    )
    assert checkpoint.read_config(tmp_path / "over")["config"]["drop_path"] == 0


def test_the_same_command_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    a, b = (
        run_of(tmp_path, "--steps", "4", "--workers", workers, name=workers)
        for workers in ("1", "3")
    )
    assert fx.losses(a) == fx.losses(b)
    assert fx.same_weights(a, b)
    assert fx.losses(run_of(tmp_path, "--steps", "4", "--seed", "1", name="c")) != fx.losses(a)


@pytest.mark.slow
def test_an_out_that_is_used_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--steps", "1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ran = fx.train("maskalign", run, "--cache", fx.cache_path(), "--steps", "1", *SMALL)
    assert ran.status == 1
    assert "--resume" in ran.line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    ran = fx.train(
        "maskalign",
        tmp_path / "new",
        "--cache",
        fx.cache_path(),
        "--steps",
        "1",
        *SMALL,
        "--resume",
    )
    assert ran.status == 0  # nothing to go on from: it starts, so that one line can be requeued
    ran = fx.train(
        "maskalign",
        tmp_path / "new",
        "--cache",
        fx.cache_path(),
        "--steps",
        "1",
        *SMALL,
        "--resume",
    )
    assert "1 step done, loss 2." in ran.out  # a run that was complete tells its own last loss


# --- what stops it --------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    ran = mine(tmp_path, tmp_path / "run", "--steps", "9", "--save-every", "1")
    assert ran.status == 1
    assert "loss is nan at step 3" in ran.line
    shown = ran.line.split("pictures ", 1)[1].split(")")[0]
    assert shown.startswith("p")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == [
        "step-00000001.pt",
        "step-00000002.pt",
    ]
    assert all(value.isfinite().all() for value in fx.weights(tmp_path / "run").values())
    assert [row["loss"] for row in metrics.read(tmp_path / "run")][2] == "nan"


def test_it_stops_too_when_losses_arrive_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU rows become numbers 16 steps later, and a checkpoint flushes them: it must look at
    them and must not be written over good ones."""
    monkeypatch.setattr(
        student.training.train, "Metrics", lambda run, lag, log: Metrics(run, 16, log)
    )
    ran = mine(tmp_path, tmp_path / "run", "--steps", "9", "--save-every", "2")
    assert ran.status == 1
    assert "loss is nan at step 3" in ran.line
    assert all(value.isfinite().all() for value in fx.weights(tmp_path / "run").values())


@pytest.mark.slow
def test_files_are_closed_when_it_stops(tmp_path: Path) -> None:
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine(tmp_path, tmp_path / "run", "--steps", "9")
        gc.collect()
    assert [str(w.message) for w in caught if issubclass(w.category, ResourceWarning)] == []


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "1", *SMALL)
    ran = fx.train("maskalign", tmp_path / "run", *options, "--precision", "fp16")
    assert ran.status == 2
    assert all(word in ran.line for word in ("fp16", "bf16", "fp32"))
    ran = fx.train("maskalign", tmp_path / "run", *options, "--precision", "fp8")
    assert ran.status == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bf16_is_near_fp32_and_weights_stay_fp32(tmp_path: Path) -> None:
    exact = fx.losses(run_of(tmp_path, "--steps", "4", name="fp32"))
    rough = run_of(tmp_path, "--steps", "4", "--precision", "bf16", name="bf16")
    assert fx.losses(rough) == pytest.approx(exact, rel=0.02)
    assert fx.losses(rough) != exact
    assert {value.dtype for value in fx.weights(rough).values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    """Asked for a GPU it must not train on the CPU without a word."""
    sets = [part for text in fx.RECIPES["maskalign"] for part in ("--set", text)]
    options = ("--cache", fx.cache_path(), "--steps", "1", *SMALL, *sets, "--out", tmp_path / "run")
    for device in ("cuda", "nonsense"):
        ran = fx.stud("train", "--recipe", "maskalign", *options, "--device", device)
        assert ran.status == 2
        assert device in ran.line


# --- damaged caches -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_a_small_cache_stops_it_before_the_first_step(
    tmp_path: Path,
) -> None:
    """Every file there is, of the cache, of what was added to it, and those that training would
    never read."""
    bad = fx.save_pictures(tmp_path / "p", 5)
    (bad / "bad.png").write_text("not a picture")
    cache = fx.extract(bad, tmp_path / "c", "--rows-per-shard", "4")
    fx.extract(bad, cache, "--add", "--levels", "1")
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {
        "manifest.json",
        "manifest.copy.json",
        "quarantine.json",
        "zarr.json",
        "000000.json",
    } <= names
    assert sum("feature_stats" in str(path) for path in files) >= 4
    assert sum("parts" in path.parts for path in files) >= 10
    options = ("--cache", cache, "--images", bad, "--steps", "1", "--batch-size", "2")
    for path in files:
        data = path.read_bytes()
        flip(path, len(data) // 2)
        ran = fx.train("maskalign", tmp_path / "run", *options)
        assert ran.status == 1, path
        assert str(path) in ran.line, (path, ran.line)
        assert not (tmp_path / "run").exists()
        path.write_bytes(data)
    fx.good(fx.train("maskalign", tmp_path / "run", *options))


def test_a_larger_cache_is_checked_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the bound a damaged row stops the step that reads it, unless rows are not checked; a
    damaged file that is not read is not noticed."""
    monkeypatch.setattr(cache_match, "VERIFIED_BYTES", 0)
    cache = Path(shutil.copytree(fx.cache_path(), tmp_path / "c"))
    options = ("--cache", cache, "--steps", "3", *SMALL)
    (unread,) = cache.rglob("feature_stats/c.0.1.*")
    flip(unread, 500)
    fx.good(fx.train("maskalign", tmp_path / "unread", *options))
    flip(unread, 500)
    (path,) = cache.rglob("features/c.0.1.*")
    flip(path, 3 * 17 * 24 * 2 * 5 + 7)  # of the sixth row's first level
    ran = fx.train("maskalign", tmp_path / "read", *options)
    assert ran.status == 1
    assert str(path) in ran.line
    fx.good(fx.train("maskalign", tmp_path / "blind", *options, "--verify-rows", "0"))
    assert fx.losses(tmp_path / "blind") != fx.losses(tmp_path / "unread")


# --- how a cache is read --------------------------------------------------------------------------


def test_how_a_cache_is_read_goes_to_the_cache_and_into_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    class Watched(Cache):
        def __init__(self, path: Any, **given: Any) -> None:
            opened.append(given)
            super().__init__(path, **given)

    monkeypatch.setattr(cache_match, "Cache", Watched)
    options = ("--cache", fx.cache_path(), "--steps", "1", *SMALL)
    fx.good(fx.train("maskalign", tmp_path / "plain", *options))
    odd = ("--direct", "--verify-rows", "0.25", "--read-threads", "3")
    fx.good(fx.train("maskalign", tmp_path / "odd", *options, *odd))
    plain, changed = opened
    assert plain == {"threads": None, "verify_rows": 1.0, "io": "auto", "partial": False}
    assert changed == {"threads": 3, "verify_rows": 0.25, "io": "direct", "partial": False}
    reading = [
        checkpoint.read_config(tmp_path / name)["targets"]["reading"] for name in ("plain", "odd")
    ]
    assert reading == [{**given, "tokens": "all", "pixels": "decoded"} for given in opened]
    assert fx.losses(tmp_path / "odd") == fx.losses(tmp_path / "plain")


def test_direct_reads_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    plain = os.open

    def watch(path: Any, flag: int, *rest: Any, **others: Any) -> int:
        if "features" in str(path):
            flags.append(flag & os.O_DIRECT)
        return plain(path, flag, *rest, **others)

    monkeypatch.setattr(os, "open", watch)
    for name, options in {"plain": (), "direct": ("--direct",)}.items():
        flags.clear()
        ran = fx.train(
            "maskalign",
            tmp_path / name,
            "--cache",
            fx.cache_path(),
            "--steps",
            "3",
            *SMALL,
            *options,
        )
        assert ran.status == 0 or "O_DIRECT" in ran.line  # a file system that knows none says so
        assert set(flags) == {os.O_DIRECT if options else 0}


def test_a_run_may_be_resumed_with_another_way_of_reading(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--steps", "4", "--save-every", "2")
    whole = fx.losses(run)
    (run / "checkpoints" / "step-00000004.pt").unlink()
    options = ("--cache", fx.cache_path(), "--steps", "4", *SMALL, "--save-every", "2", "--resume")
    fx.good(fx.train("maskalign", run, *options, "--read-threads", "1", "--verify-rows", "0"))
    assert fx.losses(run) == whole


@pytest.mark.parametrize(
    "option", [("--direct",), ("--verify-rows", "0.5"), ("--read-threads", "2")]
)
def test_ways_of_reading_without_anything_to_read(option: tuple[str, ...], tmp_path: Path) -> None:
    options = (
        "--images",
        fx.pictures(),
        "--policy",
        fx.policy_file(),
        "--steps",
        "1",
        *SMALL,
    )
    ran = fx.train(
        "mae", tmp_path / "run", *options, *option, sets=("patch_size=8",), home=tmp_path / "home"
    )
    assert ran.status == 2
    assert option[0] in ran.line


# --- what a resumed run must agree with -----------------------------------------------------------


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--seed", "1"), ("seed", "0", "1")),
        (("--steps", "3"), ("steps", "4", "3")),
        (("--batch-size", "4"), ("global_batch", "8", "4")),
        (("--precision", "bf16"), ("precision", "bf16")),
        (("--set", "drop_path=0.2"), ("drop_path", "0.1", "0.2")),
        (("--set", "lr=0.002"), ("lr", "0.003", "0.002")),
    ],
)
def test_other_settings_are_refused_by_name(
    change: tuple[str, str], told: tuple[str, ...], tmp_path: Path
) -> None:
    run = run_of(tmp_path, "--steps", "4", "--save-every", "2")
    (run / "checkpoints" / "step-00000004.pt").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = (
        "--cache",
        fx.cache_path(),
        "--steps",
        "4",
        *SMALL,
        "--save-every",
        "2",
        "--resume",
        *change,
    )
    ran = fx.train("maskalign", run, *options)
    assert ran.status == 1
    assert all(word in ran.line for word in told), ran.line
    assert "patch_size" not in ran.line  # what did not change is not told
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_of_a_version_with_fewer_settings_goes_on(tmp_path: Path) -> None:
    """What its version did not know had the value of today's default; another one is refused."""
    run = run_of(tmp_path, "--steps", "4", "--save-every", "2")
    whole = fx.losses(run)
    (run / "checkpoints" / "step-00000004.pt").unlink()
    record = json.loads((run / "config.json").read_text())
    for name in ("mask_count", "repeat_peak", "betas"):
        del record["config"][name]
    (run / "config.json").write_text(json.dumps(record))
    options = ("--cache", fx.cache_path(), "--steps", "4", *SMALL, "--save-every", "2", "--resume")
    ran = fx.train("maskalign", run, *options, "--set", "repeat_peak=true")
    assert ran.status == 1
    assert "config.repeat_peak False before, True now; give" in ran.line
    fx.good(fx.train("maskalign", run, *options))
    assert fx.losses(run) == whole


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "--steps", "1")
    ran = fx.train("mralign", run, "--cache", fx.cache_path(), "--steps", "1", *SMALL, "--resume")
    assert ran.status == 1
    assert "'maskalign'" in ran.line
    assert "'mralign'" in ran.line


def weighted(tmp_path: Path, seed: int) -> Path:
    teacher = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=3"
    return fx.extract(
        fx.pictures(), tmp_path / f"w{seed}", "--weights", f"random:{seed}", teacher=teacher
    )


@pytest.mark.slow
def test_caches_of_other_weights_cannot_be_mixed_up(tmp_path: Path) -> None:
    a, b = weighted(tmp_path, 0), weighted(tmp_path, 1)
    assert manifest.read(a)["id"] != manifest.read(b)["id"]
    options = ("--steps", "4", *SMALL, "--save-every", "2")
    ran = fx.good(fx.train("maskalign", tmp_path / "run", "--cache", a, *options))
    assert "RANDOM WEIGHTS random:0" in ran.err  # told where the cache is used
    (tmp_path / "run" / "checkpoints" / "step-00000004.pt").unlink()
    ran = fx.train("maskalign", tmp_path / "run", "--cache", b, *options, "--resume")
    assert ran.status == 1
    assert "weight_hash" in ran.line
    hashes = [manifest.read(cache)["identity"]["teacher"]["weight_hash"] for cache in (a, b)]
    assert all(each in ran.line for each in hashes)
    fx.good(fx.train("maskalign", tmp_path / "run", "--cache", a, *options, "--resume"))


@pytest.mark.slow
def test_online_over_a_cache_uses_its_weights(tmp_path: Path) -> None:
    """The file changed since the extraction: those are other weights, and the comparison would mean
    nothing."""
    import timm
    from safetensors.torch import save_file

    from featcache import teachers

    name = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=3"
    path = tmp_path / "teacher.safetensors"
    plain = "vit_tiny_patch16_224"
    shape: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 4,
        "num_heads": 3,
        "num_classes": 0,
    }
    torch.manual_seed(0)
    save_file(timm.create_model(plain, **shape).state_dict(), str(path))
    assert teachers.load(name, str(path)).weights == str(path)
    fx.extract(fx.pictures(), tmp_path / "c", "--weights", str(path), teacher=name)
    options = ("--cache", tmp_path / "c", "--teacher", "online", "--steps", "1", *SMALL)
    fx.good(fx.train("maskalign", tmp_path / "same", *options))
    torch.manual_seed(1)
    save_file(timm.create_model(plain, **shape).state_dict(), str(path))
    ran = fx.train("maskalign", tmp_path / "other", *options)
    assert ran.status == 1
    assert "weight" in ran.line


def test_other_pictures_of_the_same_number_are_refused(tmp_path: Path) -> None:
    """The order is by number: with other pictures under the numbers the run would be another
    one."""
    one, two = (Path(shutil.copytree(fx.pictures(), tmp_path / name)) for name in ("one", "two"))
    (one / "p00.png").unlink()
    (two / "p23.png").unlink()
    options = ("--cache", fx.cache_path(), "--steps", "4", *SMALL, "--save-every", "2")
    fx.good(fx.train("maskalign", tmp_path / "run", *options, "--images", one))
    (tmp_path / "run" / "checkpoints" / "step-00000004.pt").unlink()
    ran = fx.train("maskalign", tmp_path / "run", *options, "--images", two, "--resume")
    assert ran.status == 1
    assert "pictures" in ran.line


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Neither the cache nor the pictures are there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").touch()
    words = ("--images", tmp_path / "none", "--cache", tmp_path / "none")
    ran = fx.train("mralign", tmp_path / "run", *words)
    assert ran.status == 1
    assert ran.line.endswith("is not empty; continue that run with --resume, or give another --out")
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["mine.txt"]
