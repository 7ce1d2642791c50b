"""FSDP2 through Accelerate: each process holds a part of the weights, and everything else is as
without it.

`accelerate launch --config_file pipelines/launch/fsdp2.yaml` sets variables, and Accelerate takes
FSDP on GPUs only. Here processes on a CPU are given the variables of that very file over gloo, and
are told that they may: what a GPU adds (nccl, mixed precision in the shards' own reductions) is not
seen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors import safe_open

from student import checkpoint
from student.training import launch_variables, metrics
from tests import processes
from tests import student_fixtures as fx
from tests.test_end_to_end import assert_undisturbed

pytestmark = pytest.mark.slow  # two processes each

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "pipelines/launch/fsdp2.yaml"


def launched(config: Path) -> dict[str, str]:
    """The variables that `accelerate launch --config_file CONFIG` gives its processes."""
    words = ["--config_file", str(config), "-m", "student", "train"]
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    variables = prepare_multi_gpu_env(args)
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(("ACCELERATE_", "FSDP_"))
    }


SHARDED = """
import os
os.environ.update({variables})
import student.training.accelerator
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

class Sharding(Accelerator):
    def __init__(self, **given):
        super().__init__(**given)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        plugin = AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        if given["mixed_precision"] != "no":
            plugin.set_mixed_precision(given["mixed_precision"])

student.training.accelerator.Accelerator = Sharding
"""
VARIABLES = launched(CONFIG)
TWO = SHARDED.format(variables=VARIABLES)
# On a CPU one process is no group by itself; `accelerate launch` makes one of it on a GPU.
ALONE = """
import torch
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
"""

# Says how many of the weights' numbers this process holds, and how many there are when it is given
# all.
COUNTING = """
import student.training.train_state
plain = student.training.train_state.build_train_state
def counted(*args):
    state = plain(*args)
    own = sum(p.to_local().numel() for p in state.module.parameters())
    whole = {name: type(value).__name__ for name, value in state.weights().items()}
    assert set(whole.values()) == {"Tensor"}, whole
    print("holds", own, "of", sum(value.numel() for value in state.weights().values()))
    return state
student.training.train_state.build_train_state = counted
"""
OPTIONS = ("--batch-size", 4, "--steps", 12, "--save-every", 4)
SETS = ("clip_grad=1.0",)


def train(
    out: Path, *options: Any, before: str = TWO, world: int = 2, sets: tuple[str, ...] = SETS
) -> Any:
    given = ("--cache", fx.cache_path(), *OPTIONS, "--out", out, *options)
    return processes.train(world, *given, recipe="mralign", sets=sets, before=before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Plain and sharded, two processes each, drop path and clipping on."""
    place = tmp_path_factory.mktemp("fsdp")
    processes.good(train(place / "plain", before=""))
    ran = processes.good(train(place / "sharded", before=TWO + COUNTING))
    for said in ran.said:  # biases and norms are cut too, in halves
        own, whole = (int(word) for word in said.split("holds ")[1].split("\n")[0].split(" of "))
        assert 0.45 * whole < own < 0.55 * whole
    return place / "plain", place / "sharded"


def test_sharded_weights_train_like_whole_ones(runs: tuple[Path, Path]) -> None:
    """The same drop path, clipping and learning rate: 1e-5 at step 1, 1e-4 over 12 steps."""
    plain, sharded = (metrics.read(run) for run in runs)
    for name in ("loss", "align", "pixel", "grad_norm"):
        one, two = (np.array([row[name] for row in rows]) for rows in (plain, sharded))
        assert abs(one[0] - two[0]) <= 1e-5 * one[0]
        assert np.abs(one - two).max() <= 1e-4 * one.min(), name
    assert [row["lr"] for row in plain] == [row["lr"] for row in sharded]


def test_the_file_asks_for_nothing_that_the_options_say() -> None:
    """The precision, the device and the rest pass as they are, and FSDP is of version 2."""
    launch_variables.check(VARIABLES, "fp32", on_cpu=True)
    launch_variables.check(VARIABLES, "bf16", on_cpu=False)
    assert VARIABLES["ACCELERATE_USE_FSDP"] == "true"
    assert VARIABLES["FSDP_VERSION"] == "2"


def test_one_two_and_four_processes_give_the_same_losses(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """With FSDP and without, drop path and clipping on, batches of eight in all: within 1e-5 of
    one plain process over 12 steps (seen: 1.5e-7, by the order of sums)."""
    alone = ALONE.format(file=tmp_path / "group")
    for name, world, before in (
        ("1", 1, ""), ("4", 4, ""), ("1 sharded", 1, alone + TWO), ("4 sharded", 4, TWO),
    ):  # fmt: skip
        size = ("--batch-size", 8 // world)
        processes.good(train(tmp_path / name, *size, before=before, world=world))
    one = np.array(fx.losses(tmp_path / "1"))
    for run in (*runs, *(tmp_path / name for name in ("4", "1 sharded", "4 sharded"))):
        other = np.array(fx.losses(run))
        np.testing.assert_allclose(other, one, rtol=1e-5, err_msg=run.name)


def test_a_checkpoint_is_one_file_of_whole_tensors(runs: tuple[Path, Path]) -> None:
    """The names, shapes and numbering of a plain run's, so that everything else reads it."""
    plain, sharded = (checkpoint.load_latest(run) for run in runs)
    assert plain["model"].keys() == sharded["model"].keys()
    assert all(
        value.shape == sharded["model"][name].shape for name, value in plain["model"].items()
    )
    for one, two in zip(
        plain["optimizer"]["param_groups"], sharded["optimizer"]["param_groups"], strict=True
    ):
        assert one["params"] == two["params"]
        assert one["weight_decay"] == two["weight_decay"]
    moments, others = plain["optimizer"]["state"], sharded["optimizer"]["state"]
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        assert float(state["step"]) == float(others[number]["step"]) == 12
        scale = float(state["exp_avg"].abs().max())
        torch.testing.assert_close(
            state["exp_avg"], others[number]["exp_avg"], rtol=0, atol=0.02 * scale + 1e-6
        )
    encoder, _ = checkpoint.load_encoder(runs[1])
    with torch.no_grad():
        assert encoder.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 48)  # type: ignore[operator]


def test_a_sharded_run_resumes_exactly(runs: tuple[Path, Path], tmp_path: Path) -> None:
    dying = """
import student.training.train
plain = student.training.train._gradients
def dies(*args):
    if args[-1] == 6:
        raise SystemExit(9)
    return plain(*args)
student.training.train._gradients = dies
"""
    ran = train(tmp_path / "run", before=TWO + dying)
    assert ran.status == [9, 9], ran.said
    assert checkpoint.latest_step(tmp_path / "run") == 4
    processes.good(train(tmp_path / "run", "--resume"))
    assert_undisturbed(tmp_path / "run", runs[1])


@pytest.mark.parametrize("way", ["then whole", "then sharded"])
def test_a_run_may_go_on_with_fsdp_or_without(
    way: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Weights and moments cross over at step 8: the later losses are those of the undisturbed
    run."""
    sharded_first = way == "then whole"
    whole = runs[int(sharded_first)]
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "checkpoints/step-00000012.pt").unlink()
    processes.good(train(run, "--resume", before="" if sharded_first else TWO))
    one, two = (np.array(fx.losses(each)) for each in (whole, run))
    assert (one[:8] == two[:8]).all()
    assert np.abs(one - two).max() <= 1e-4 * one.min()


def test_the_average_is_that_of_a_plain_run_and_resumes(tmp_path: Path) -> None:
    """Whole tensors in the checkpoint; a sharded run goes on from its own and from a plain one's,
    at step 8. Biases of keys aside, whose gradient is rounding alone."""
    for name, before in (("plain", ""), ("sharded", TWO)):
        processes.good(train(tmp_path / name, "--ema", 0.9, before=before))
    averages = {}
    for name in ("plain", "sharded"):
        run = Path(shutil.copytree(tmp_path / name, tmp_path / f"{name} resumed"))
        (run / "checkpoints/step-00000012.pt").unlink()
        processes.good(train(run, "--ema", 0.9, "--resume"))
        for each in (run, tmp_path / name):
            averages[each.name] = checkpoint.load_latest(each)[checkpoint.EMA]
    first = averages["plain"]
    for name, average in averages.items():
        assert average.keys() == first.keys()
        for key, value in average.items():
            assert type(value) is torch.Tensor
            if not key.endswith("attn.qkv.bias"):
                torch.testing.assert_close(
                    value, first[key], rtol=0, atol=1e-4, msg=f"{name} {key}"
                )
    again = averages["sharded resumed"]
    assert all(torch.equal(value, again[key]) for key, value in averages["sharded"].items())


def test_version_1_is_refused(tmp_path: Path) -> None:
    """Its own variables; to send the weights it looks for a GPU, which is none of the test's."""
    own = {"RESHARD_AFTER_FORWARD": "FULL_SHARD", "SYNC_MODULE_STATES": "false", "VERSION": "1"}
    first = VARIABLES | {f"FSDP_{name}": value for name, value in own.items()}
    ran = train(tmp_path / "run", before=SHARDED.format(variables=first))
    assert set(ran.status) == {2}
    assert "fsdp_version: 2" in ran.said[0]
    assert not (tmp_path / "run").exists()


def test_accumulation_and_activation_checkpointing(tmp_path: Path) -> None:
    """Two micro-batches of two, blocks computed again: the run of batches of four, drop path
    on."""
    processes.good(train(tmp_path / "one"))
    ways = ("--batch-size", 2, "--accumulate", 2, "--checkpoint-activations")
    processes.good(train(tmp_path / "two", *ways))
    one, two = (np.array(fx.losses(tmp_path / name)) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1e-4 * one.min()


def test_a_loss_that_is_not_finite_leaves_whole_weights(tmp_path: Path) -> None:
    """At a learning rate of 1e30 the second loss is not finite; its reproducer is run again in one
    process."""
    ran = train(tmp_path / "run", sets=("lr=1e30",))
    assert ran.status == [1, 1]
    assert "loss is nan at step 2" in ran.said[0]
    (path,) = (tmp_path / "run/nonfinite").iterdir()  # both had it, one keeps it
    with safe_open(str(path), "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["about"])
    assert shapes["model.encoder.blocks.0.mlp.fc1.weight"] == (192, 48)
    assert about["step"] == 2
    facts = fx.good(fx.stud("replay", path, "--device", "cpu", "--json")).json
    assert not np.isfinite(facts["parts"]["loss"])


def test_bf16_is_that_of_a_plain_run(tmp_path: Path) -> None:
    """Weights in fp32 and autocast; not the shards' own rounding, which would reach what recipes
    read in fp32."""
    for name, before in (("sharded", TWO), ("plain", "")):
        processes.good(train(tmp_path / name, "--precision", "bf16", before=before))
    assert {value.dtype for value in fx.weights(tmp_path / "sharded").values()} == {torch.float32}
    one, two = (np.array(fx.losses(tmp_path / name)) for name in ("plain", "sharded"))
    assert abs(one[0] - two[0]) <= 1e-5 * one[0]
    assert np.abs(one - two).max() <= 1e-2 * one.min()


def test_a_dry_run_counts_this_processes_part(tmp_path: Path) -> None:
    ran = processes.good(train(tmp_path / "dry", "--dry-run", "--json"))
    facts = json.loads(next(line for line in ran.said[0].splitlines() if line.startswith("{")))
    assert facts["memory"]["weights"] == pytest.approx(facts["parameters"] * 4 / 2, rel=0.1)
    assert ran.said[1].strip() == ""
