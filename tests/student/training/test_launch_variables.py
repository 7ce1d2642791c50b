"""Accelerate's variables agree with the options, or stop the run by name; what else is set is
recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featcache.errors import UsageError
from student.training import launch_variables
from tests import processes
from tests import student_fixtures as fx

# As `accelerate launch` sets them for a program on CPUs where nobody asked for anything.
LAUNCHED = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_CPU_AFFINITY": "1",
    "ACCELERATE_DEBUG_MODE": "true",
}
REFUSED = [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "--accumulate"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0.5", "--accumulate"),
    ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "clip_grad"),
    ("ACCELERATE_MIXED_PRECISION", "bf16", "--precision"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "--precision"),
    ("ACCELERATE_FP8_BACKEND", "TE", "--precision"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ("ACCELERATE_BYPASS_DEVICE_MAP", "true", "gradients"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "FSDP"),
    ("ACCELERATE_USE_MEGATRON_LM", "TRUE", "FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "FSDP"),
    ("ACCELERATE_USE_SAGEMAKER", "1", "torchrun"),
    ("ACCELERATE_TORCH_DEVICE", "meta", "--device"),
    ("FSDP_IGNORED_MODULES", ".*", "gradients"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--checkpoint-activations"),
    ("ACCELERATE_USE_FSDP", "true", "accelerate launch"),
]


@pytest.mark.parametrize(("name", "value", "instead"), REFUSED)
def test_a_variable_that_says_otherwise_is_refused_by_name(
    name: str, value: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    ran = fx.train("mralign", tmp_path / "run", "--cache", fx.cache_path(), "--steps", 1)
    assert ran.status == 2
    assert f"{name}={value!r}" in ran.line
    assert instead in ran.line
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_sets_for_every_program_passes() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        launch_variables.check(LAUNCHED, precision, on_cpu=True)
        same = LAUNCHED | {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": precision}
        launch_variables.check(same, precision, on_cpu=False)
    launch_variables.check({"ACCELERATE_TORCH_DEVICE": "cpu"}, "fp32", on_cpu=True)
    launch_variables.check({}, "fp32", on_cpu=False)


def test_on_a_gpu_the_cpu_is_asked_for_by_the_option() -> None:
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("ACCELERATE_TORCH_DEVICE", "cuda:1")):
        with pytest.raises(UsageError, match=f"{name}='{value}'.*--device"):
            launch_variables.check({name: value}, "bf16", on_cpu=False)


def test_variables_that_pass_change_no_number_and_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--cache", fx.cache_path(), "--steps", 2, "--batch-size", 8)
    fx.good(fx.train("mralign", tmp_path / "plain", *options))
    for name, value in {**LAUNCHED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}.items():
        if name != "ACCELERATE_CPU_AFFINITY":  # binds this process to cores
            monkeypatch.setenv(name, value)
    fx.good(fx.train("mralign", tmp_path / "launched", *options))
    assert fx.same_weights(tmp_path / "plain", tmp_path / "launched")
    noted = json.loads((tmp_path / "launched/environment.json").read_text())["variables"]
    assert noted["ACCELERATE_DYNAMO_MODE"] == "default"
    assert "FEATCACHE_HOME" not in noted


@pytest.mark.parametrize("device", ["--cpu", "--gpu_ids=0"])
def test_accelerates_launcher_that_starts_one_process_of_several_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the variables that the installed Accelerate sets."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", *launch_variables.WORLD):
        monkeypatch.delenv(name, raising=False)

    def environ(processes: int) -> dict[str, str]:
        words = [device, "--num_processes", str(processes), "--mixed_precision", "no"]
        words += ["--dynamo_backend", "no", "--num_machines", "1"]
        words += ["--num_cpu_threads_per_process", "1", "train.py"]
        given = launch_command_parser().parse_args(words)
        given.use_cpu = given.cpu  # as the configuration, which is not read here, would say
        return prepare_simple_launcher_cmd_env(given)[1]

    launch_variables.check_processes(environ(1), 1, sharded=False)
    with pytest.raises(UsageError, match=r"torchrun --nproc_per_node N -m student train"):
        launch_variables.check_processes(environ(2), 1, sharded=False)
    launch_variables.check_processes({**environ(2), "RANK": "0"}, 2, sharded=False)


@pytest.mark.parametrize("name", launch_variables.WORLD)
def test_processes_that_know_nothing_of_each_other_are_refused(name: str) -> None:
    """As mpirun starts them on GPUs, or a WORLD_SIZE without a rank: each would train alone into
    one folder."""
    with pytest.raises(UsageError, match=f"{name}='2' tells of other processes"):
        launch_variables.check_processes({name: "2"}, 1, sharded=False)
    launch_variables.check_processes({name: "2"}, 2, sharded=False)
    launch_variables.check_processes({name: "1", "ACCELERATE_USE_FSDP": "false"}, 1, sharded=False)
    launch_variables.check_processes({"ACCELERATE_USE_FSDP": "true"}, 2, sharded=True)


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "two"}, {"LOCAL_RANK": "0"}, {"OMPI_COMM_WORLD_SIZE": "2"}],
    ids=lambda each: next(iter(each)),
)
def test_a_launch_that_lacks_its_variables_is_one_line(
    variables: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own, which Accelerate's state outlives."""
    before = f"import os; os.environ.update({variables!r}); os.environ.pop('MASTER_ADDR', None)"
    options = ("--cache", fx.cache_path(), "--steps", 1, "--out", tmp_path / "run")
    ran = processes.train(1, *options, recipe="mralign", before=before)
    assert ran.status == [2]
    assert ran.said[0].splitlines()[-1].startswith("error: cannot join the processes of this run")
    assert "Traceback" not in ran.said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["meta", "vulkan"])
def test_training_runs_on_cpus_and_gpus(device: str, tmp_path: Path) -> None:
    given = ("train", "--recipe", "mralign", "--cache", fx.cache_path(), "--out", tmp_path / "run")
    ran = fx.stud(*given, "--device", device)
    assert ran.status == 2
    assert f"--device '{device}' cannot be used here" in ran.line


def test_a_missing_package_or_compiler_stops_before_targets_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for option, told in (
        (("--compile",), "no-such-compiler is not on PATH"),
        (("--tracker", "wandb"), "pip install wandb"),
    ):
        ran = fx.train("mralign", tmp_path / "run", "--cache", tmp_path / "none", *option)
        assert ran.status == 2
        assert told in ran.line


def test_deterministic_kernels_want_a_workspace_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    given = ("--cache", fx.cache_path(), "--steps", 1, "--deterministic")
    ran = fx.train("mralign", tmp_path / "run", *given)
    assert ran.status == 2
    assert "CUBLAS_WORKSPACE_CONFIG=':0:0'; :4096:8 and :16:8 give the same bits" in ran.line
