"""Checkpoints that real programs write are read: timm's CheckpointSaver with its average of the
weights, DistributedDataParallel, torch.compile; and a cache says which part of them it is of."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, distributed, nn

from featcache import teachers
from tests import student_fixtures as fx

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SPEC = "timm:vit_tiny_patch16_224," + ",".join(f"{key}={value}" for key, value in SIZES.items())


def _network() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **SIZES)


def _trained(wrapped: nn.Module, net: nn.Module) -> tuple[torch.optim.Optimizer, ModelEmaV3]:
    """Make two steps of SGD, with timm's average of the weights."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5, momentum=0.9)
    average = ModelEmaV3(net, decay=0.5)
    for step in range(2):
        wrapped(torch.full((2, 3, 16, 16), 0.1 * step)).pow(2).sum().backward()
        optimizer.step()
        average.update(net)
    return optimizer, average


def _same(teacher: Any, wanted: dict[str, Tensor]) -> bool:
    own = {f"vit.{name}": value for name, value in wanted.items() if not name.startswith("head.")}
    found = teacher.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[n], v) for n, v in own.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """`last.pth.tar` of timm's saver, the network and its average."""
    folder, net = tmp_path_factory.mktemp("timm"), _network()
    optimizer, average = _trained(net, net)
    saver = CheckpointSaver(
        net, optimizer, args=argparse.Namespace(model="vit_tiny_patch16_224", lr=0.5),
        model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(1, metric=50.0)
    return folder / "last.pth.tar", net, average.module


def test_timms_checkpoint_saver(
    saved: tuple[Path, Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path, net, average = saved
    assert not torch.equal(net.norm.bias, average.norm.bias)
    cases = {
        "": (average, f"{path}#state_dict_ema"),
        "#ema": (average, f"{path}#ema"),
        "#model": (net, f"{path}#model"),
    }
    for part, (wanted, weights) in cases.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            teacher = teachers.load(SPEC, f"{path}{part}")
        assert _same(teacher, wanted.state_dict())
        assert teacher.weights == weights
        assert ("'state_dict_ema' is taken" in caplog.text) == (not part)
        caplog.clear()
        assert _same(teachers.load(SPEC, teacher.weights), wanted.state_dict())
        assert caplog.text == ""


def test_a_cache_says_which_part_was_taken(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    path, _, _ = saved
    out = tmp_path / "cache"
    words = ("--teacher", SPEC, "--images", str(fx.pictures()), "--size", "16", "--out", str(out))
    made = fx.good(fx.feat("extract", *words, "--levels", "last:1", "--weights", str(path)))
    assert "'state_dict_ema' is taken" in made.err
    facts = fx.good(fx.feat("info", str(out), "--json")).json
    assert facts["provenance"]["weights"] == f"{path}#state_dict_ema"
    told = facts["weights"][SPEC]
    text = fx.good(fx.feat("info", str(out))).out
    assert f"weights of {SPEC}: {path}#state_dict_ema, hash {told['hash']}" in text
    # the same teacher computes the rows again, and says nothing of a choice
    check = fx.good(fx.feat("verify", str(out), "--recompute", "2"))
    assert "is taken" not in check.err
    plain = fx.good(fx.feat("extract", *words[:-1], str(tmp_path / "plain"), "--levels", "last:1",
                            "--weights", f"{path}#model"))  # fmt: skip
    assert "is taken" not in plain.err
    facts = fx.good(fx.feat("info", str(tmp_path / "plain"), "--json")).json
    assert facts["weights"][SPEC]["weights"] == f"{path}#model"
    assert facts["weights"][SPEC]["hash"] != told["hash"]


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_and_compile(tmp_path: Path) -> None:
    net = _network()
    wrapped = nn.parallel.DistributedDataParallel(net)
    optimizer, average = _trained(wrapped, net)
    states: dict[str, Any] = {
        "bare": wrapped.state_dict(),
        "checkpoint": {"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()},
        "of compiled": torch.compile(wrapped).state_dict(),
        "compiled within": nn.parallel.DistributedDataParallel(torch.compile(net)).state_dict(),
        "averaged": {
            "state_dict": wrapped.state_dict(),
            "state_dict_ema": {f"module.{k}": v for k, v in average.module.state_dict().items()},
        },
    }
    assert all(name.startswith("module.") for name in states["bare"])
    assert all(name.startswith("_orig_mod.module.") for name in states["of compiled"])
    assert all(name.startswith("module._orig_mod.") for name in states["compiled within"])
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pt")
        wanted = average.module if name == "averaged" else net
        assert _same(teachers.load(SPEC, str(tmp_path / f"{name}.pt")), wanted.state_dict()), name
