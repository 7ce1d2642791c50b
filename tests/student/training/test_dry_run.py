"""A dry run reports counts, memory and the disk, checked by hand, by arithmetic and by a clock of
our own; nothing is written."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import student.training.train
from featcache.errors import UserError
from featcache.runtime.device_clock import Seconds
from student.targets.cached import CachedTargets
from student.training import dry_run
from student.training.train import StepResult
from tests import student_fixtures as fx

DRY = ("--batch-size", "8", "--dry-run", "--json")


def facts(recipe: str, tmp_path: Path, *options: Any, cache: Path | None = None) -> dict[str, Any]:
    given = ("--cache", cache or fx.cache_path(), *DRY, *options)
    ran = fx.good(fx.train(recipe, tmp_path / "run", *given, home=tmp_path / "home"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "home").exists()
    return ran.json


def test_the_numbers_of_a_small_run(tmp_path: Path) -> None:
    """maskalign, width 48, 4 blocks, 16 patches of 8 pixels; adaptors of 3 levels to width 24, W 3
    x 4."""
    found = facts("maskalign", tmp_path, "--epochs", "5", "--ema", "0.9")
    # qkv and proj, two layers of 4 x 48, two norms
    block = 4 * 48 * 48 + 4 * 48 + 8 * 48 * 48 + 5 * 48 + 4 * 48
    # stem, cls_token, positions, norm
    encoder = 4 * block + 8 * 8 * 3 * 48 + 48 + 48 + 17 * 48 + 2 * 48
    assert found["encoder_parameters"] == encoder
    assert found["parameters"] == encoder + 3 * (48 * 24 + 24) + 3 * 4
    # fixed positions, and the norm that is not trained
    learnt = found["parameters"] - 17 * 48 - 2 * 48
    memory = found["memory"]
    assert (memory["weights"], memory["average"]) == (4 * found["parameters"],) * 2
    assert (memory["gradients"], memory["moments"]) == (4 * learnt, 8 * learnt)
    parts = ("weights", "gradients", "moments", "average", "activations")
    assert memory["sum"] == sum(memory[part] for part in parts)
    assert (found["steps_per_epoch"], found["steps"]) == (3, 15)


def test_bytes_of_a_picture_by_hand(tmp_path: Path) -> None:
    """maskalign reads 3 levels x 17 tokens x 24 channels in fp16, 16 weights of attention in fp32,
    and the view: box (4 x int32), flip (1), jitter (4 x fp32), area and source size besides where
    they are read."""
    plain = 3 * 17 * 24 * 2 + 16 * 4
    found = facts("maskalign", tmp_path)["bytes_per_picture"]
    assert plain + 4 * 4 + 1 + 4 * 4 <= found <= plain + 64
    # of a ranked cache only [CLS] and the 4 visible of 16 patches, and the pixels
    prefix = ("--set", "mask=stored")
    kept = facts("maskalign", tmp_path, *prefix, cache=fx.ranked_path())["bytes_per_picture"]
    assert 3 * 5 * 24 * 2 + 32 * 32 * 3 <= kept <= 3 * 5 * 24 * 2 + 32 * 32 * 3 + 100


def test_what_is_kept_for_the_backward_pass_by_hand() -> None:
    """relu(x W) W': x (6 x 3) for W's gradient, the relu's output (6 x 5) once for itself and W';
    no weight."""
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    with dry_run._kept(model) as count:
        model(torch.randn(6, 3)).sum().backward()
    assert count == [4 * (6 * 3 + 6 * 5)]


def test_the_pace_of_the_disk_by_a_clock_of_our_own() -> None:
    """A tenth of a second a read of 3,000 bytes: it ends after two seconds, with 30,000 bytes a
    second."""
    now = [0.0]

    def read(step: int) -> int:
        now[0] += 0.1
        return 3000

    assert dry_run.bytes_per_s(read, 10**6, lambda: now[0]) == pytest.approx(30_000)
    assert 2.0 < now[0] < 2.2
    now[0] = 0.0
    assert dry_run.bytes_per_s(read, 5, lambda: now[0]) == pytest.approx(30_000)
    assert now[0] == pytest.approx(0.5)  # a small cache is read once


def test_time_and_the_disks_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s, half of it waiting, at batch 8: 4 pictures a second, an epoch of 3 steps is 6
    s, and the student alone would want 8 pictures' bytes a second. The disk gives half of that."""
    now = [0.0]
    plain = student.training.train.train_step

    def slow(*args: Any) -> StepResult:
        result = plain(*args)
        now[0] += 2.0
        return dataclasses.replace(result, waits=[Seconds(1.0)])

    monkeypatch.setattr(student.training.train, "train_step", slow)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: now[0])
    per_picture: list[int] = []

    def half(read: Any, steps: int) -> float:
        per_picture.append(read(0) // 8)
        return 4.0 * per_picture[0]

    monkeypatch.setattr(dry_run, "bytes_per_s", half)
    found = facts("maskalign", tmp_path)
    assert (found["step_s"], found["step_without_waiting_s"]) == (2.0, 1.0)
    assert (found["images_per_s"], found["epoch_s"]) == (4.0, 6.0)
    assert found["wanted_bytes_per_s"] == 8 * per_picture[0]
    assert found["given_bytes_per_s"] == 4 * per_picture[0]
    told = fx.good(
        fx.train("maskalign", tmp_path / "run", "--cache", fx.cache_path(), *DRY[:-1])
    ).out
    assert "the disk gives 0.5 times what the student wants of the cache; stage the cache" in told
    assert "memory: weights " in told


@pytest.mark.slow
def test_the_page_cache_is_gone_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    plain = dry_run.Cache

    def watched(path: Any, **given: Any) -> Any:
        opened.append(given["io"])
        return plain(path, **given)

    monkeypatch.setattr(dry_run, "Cache", watched)
    found = facts("maskalign", tmp_path)
    assert opened == ["direct"]
    # False on a file system that knows no O_DIRECT
    assert found["past_page_cache"] in (True, False)

    def refused(self: CachedTargets, at: Any, view: Any, out: Any = None) -> Any:
        if self.cache._options["io"] == "direct":
            cause = OSError(number, os.strerror(number))
            raise UserError("this file cannot be read") from cause
        return read(self, at, view, out)

    read = CachedTargets.fetch
    monkeypatch.setattr(CachedTargets, "fetch", refused)
    number = errno.EINVAL
    assert facts("maskalign", tmp_path)["past_page_cache"] is False
    number = errno.EIO  # a bad disk is not gone round
    ran = fx.train("maskalign", tmp_path / "run", "--cache", fx.cache_path(), *DRY)
    assert (ran.status, ran.line) == (1, "error: this file cannot be read")


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "options", [("--steps", "0"), ("--steps", "1"), ("--checkpoint-activations",)]
)
def test_short_runs_and_other_ways(options: tuple[str, ...], tmp_path: Path) -> None:
    found = facts("mralign", tmp_path, *options)
    assert ("step_s" in found) == (options != ("--steps", "0"))
    if options[0] == "--checkpoint-activations":
        assert (
            found["memory"]["activations"]
            < 0.7 * facts("mralign", tmp_path)["memory"]["activations"]
        )


def test_without_a_cache_there_is_no_disk_to_ask(tmp_path: Path) -> None:
    options = ("--images", fx.pictures(), "--policy", fx.policy_file(), *DRY)
    ran = fx.train(
        "mae", tmp_path / "run", *options, sets=("patch_size=8",), home=tmp_path / "home"
    )
    found = fx.good(ran).json
    assert found["step_s"] > 0
    assert "given_bytes_per_s" not in found
