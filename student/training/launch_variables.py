"""Environment variables that Accelerate reads may not change what a run computes.

Accelerate takes from them, unasked, a divisor of the gradients, a precision, a device, a compiler,
or an engine whose package is not here. What a run computes is said by its own options, which are
given to Accelerate explicitly. A variable that agrees with them passes, since `accelerate launch`
sets many for every program; any other stops the run by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from featcache.errors import UsageError

OFF = ("", "0", "n", "no", "f", "false", "off", "none")
ON = ("1", "y", "yes", "t", "true", "on")
# numbers of processes, as torch's and MPI's launchers tell them
WORLD = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARDING = "FSDP version 2 shards the weights here"


@dataclass(frozen=True)
class Rule:
    """Holds the values of a variable that change nothing, in small letters, and what to give in
    place of others."""

    harmless: tuple[str, ...]
    instead: str


RULES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(("", "1"), "--accumulate N sums batches up"),
    "ACCELERATE_GRADIENT_CLIPPING": Rule(("", "auto", "none"), "--set clip_grad=NORM clips"),
    "ACCELERATE_DYNAMO_BACKEND": Rule(OFF, "--compile compiles the model"),
    "ACCELERATE_BYPASS_DEVICE_MAP": Rule(OFF, "with it processes would not share gradients"),
    "ACCELERATE_FP8_BACKEND": Rule(OFF, "--precision is fp32, bf16 or fp16"),
    "ACCELERATE_USE_DEEPSPEED": Rule(OFF, _SHARDING),
    "ACCELERATE_USE_MEGATRON_LM": Rule(OFF, _SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Rule(OFF, _SHARDING),
    "ACCELERATE_USE_SAGEMAKER": Rule(OFF, "`accelerate launch` or torchrun starts the processes"),
    "ACCELERATE_USE_TPU": Rule(OFF, "GPUs and CPUs are trained on here"),
    "ACCELERATE_USE_IPEX": Rule(OFF, "--precision and --device say how a run computes"),
    "ACCELERATE_USE_XPU": Rule(OFF, "--device says where a run computes"),
    "ACCELERATE_DOWNCAST_BF16": Rule(OFF, "--precision is fp32, bf16 or fp16"),
    "FSDP_IGNORED_MODULES": Rule(OFF, "without it all modules share their gradients"),
    "FSDP_ACTIVATION_CHECKPOINTING": Rule(OFF, "--checkpoint-activations computes blocks again"),
}


def check(environ: Mapping[str, str], precision: str, on_cpu: bool) -> None:
    """Raise UsageError for a variable that says otherwise than the options: `precision` is fp32,
    bf16 or fp16."""
    rules = {
        **RULES,
        # `accelerate launch` says `no` where nobody asked for a precision
        "ACCELERATE_MIXED_PRECISION": Rule(
            ("", "no", precision), f"--precision is {precision} here, and fp32, bf16 or fp16"
        ),
        "ACCELERATE_USE_CPU": Rule((*OFF, *ON) if on_cpu else OFF, "--device cpu asks for it"),
        "ACCELERATE_TORCH_DEVICE": Rule(
            ("", "cpu") if on_cpu else ("",), "--device says where a run computes"
        ),
    }
    for name, rule in rules.items():
        value = environ.get(name, "")
        if value.strip().lower() not in rule.harmless:
            raise UsageError(
                f"the environment variable {name}={value!r} would change what is computed; "
                f"{rule.instead}: unset it, or take it out of Accelerate's configuration"
            )


def check_processes(environ: Mapping[str, str], count: int, sharded: bool) -> None:
    """Raise UsageError where a launcher's variables tell of processes, or of shared weights, that
    Accelerate does not know of: each would train alone, into one folder."""
    for name in WORLD:
        told = environ.get(name, "1").strip()
        if count == 1 and told not in ("", "1"):
            raise UsageError(
                f"the environment variable {name}={told!r} tells of other processes, this one "
                "knows of none; start them by `accelerate launch` or torchrun, or unset it"
            )
    if count == 1 and _is_alone(environ):
        raise UsageError(
            "`accelerate launch` was asked for several processes and has started one: on CPUs it "
            "starts no others; `torchrun --nproc_per_node N -m student train ...` starts N, and "
            "`accelerate launch --multi_gpu` those of GPUs (for one process, unset MASTER_ADDR)"
        )
    if not sharded and environ.get("ACCELERATE_USE_FSDP", "").strip().lower() not in OFF:
        raise UsageError(
            f"the environment variable ACCELERATE_USE_FSDP={environ['ACCELERATE_USE_FSDP']!r} "
            "asks for FSDP, which several processes on GPUs can have; unset it, or start them by "
            "`accelerate launch`"
        )


def _is_alone(environ: Mapping[str, str]) -> bool:
    """Tell whether Accelerate's simple launcher started this process: it names an address where
    more than one process was asked for, and no rank (accelerate/utils/launch.py at v1.10.0,
    `prepare_simple_launcher_cmd_env`)."""
    launched = environ.keys() >= {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"}
    return launched and not environ.keys() & {"RANK", "LOCAL_RANK", *WORLD}
