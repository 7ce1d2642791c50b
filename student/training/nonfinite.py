"""A micro-batch whose loss is not finite is kept with the weights it met, so that it can run again.

    RUN/nonfinite/step-00000412.safetensors   `-rank3` is added where another process than the
                                                    first had it

A safetensors file: `model.NAME` and `batch.NAME` tensors, and in its metadata one JSON text,
`about`: recipe and settings, precision, step, micro-batch, process, the seed of what is drawn
inside the model, the keys of the pictures, and the loss with its parts as they were. Nothing in it
is ever executed.

    student replay RUN/nonfinite/step-00000412.safetensors
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache.console.text import join_lines
from featcache.errors import UsageError, UserError, counted
from featcache.runtime import strict_json
from featcache.runtime.field_words import field_reason
from featcache.runtime.user_file import reason
from featcache.storage import json_file
from student import config
from student.models import drop_path
from student.training import trainable
from student.training.train_state import TrainState

FOLDER = "nonfinite"
FORMAT = 1
DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MicroBatch:
    """Holds one micro-batch as the model takes it."""

    number: int
    keys: list[str]
    batch: dict[str, Tensor]
    seed: int  # of what is drawn inside the model


@dataclass(frozen=True)
class Reproducer:
    """Holds the content of a reproducer."""

    about: dict[str, Any]
    model: dict[str, Tensor]
    batch: dict[str, Tensor]


def find_nonfinite(
    state: TrainState, micros: Iterable[MicroBatch]
) -> tuple[MicroBatch, dict[str, float]] | None:
    """Return the first micro-batch of this process whose loss is not finite, and the loss with its
    parts; None where all are finite.

    All are run, since processes that share a model (FSDP) must run as many.
    """
    found: tuple[MicroBatch, dict[str, float]] | None = None
    for micro in micros:
        torch.manual_seed(micro.seed)
        with torch.no_grad(), state.acc.autocast():
            parts = {name: float(value) for name, value in state.model(micro.batch).items()}
        if found is None and not torch.tensor(parts["loss"]).isfinite():
            found = micro, parts
    return found


def path(run: Path, step: int, rank: int) -> Path:
    """Return the path of the reproducer of a step, counted from 1 as in metrics.jsonl."""
    return run / FOLDER / f"step-{step:08d}{f'-rank{rank}' if rank else ''}.safetensors"


def save(
    target: Path,
    step: int,
    about: dict[str, Any],
    rank: int,
    model: dict[str, Tensor],
    micro: MicroBatch,
    parts: dict[str, float],
) -> None:
    """Write a reproducer: the whole weights, and one micro-batch with the loss and the parts it
    gave."""
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": FORMAT,
        **{name: about[name] for name in ("recipe", "config", "seed", "precision")},
        "step": step,
        "micro": micro.number,
        "rank": rank,
        "draw_seed": micro.seed,
        "keys": micro.keys,
        "parts": {name: str(value) for name, value in parts.items()},
    }
    tensors = {f"model.{name}": value for name, value in model.items()}
    tensors |= {f"batch.{name}": value for name, value in micro.batch.items()}
    own = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with json_file.replaced(target) as temporary:
        save_file(own, str(temporary), metadata={"about": json.dumps(facts)})


def load(file: Path) -> Reproducer:
    """Read a reproducer; a file that is none is a UserError."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("no such file")
        with safe_open(str(file), "pt") as content:
            text = (content.metadata() or {}).get("about", "")
            about = _About.model_validate(strict_json.parse_object(text))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - no dictionary
    except (OSError, SafetensorError, ValueError) as error:
        why = _first_problem(error) if isinstance(error, ValidationError) else str(error)[:160]
        raise UserError(
            f"cannot replay {str(file)!r}: {why}; a file of RUN/{FOLDER} is needed, which "
            "training wrote when a loss was not finite"
        ) from error
    groups = {
        kind: {
            name.removeprefix(f"{kind}."): value
            for name, value in tensors.items()
            if name.startswith(f"{kind}.")
        }
        for kind in ("model", "batch")
    }
    return Reproducer(about.model_dump(), groups["model"], groups["batch"])


class _About(BaseModel):
    """Hold what a reproducer says of itself; others may have written it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    format: Literal[1]
    recipe: Annotated[str, Field(max_length=4096)]
    config: dict[str, Any]
    seed: int
    precision: Literal["no", "fp32", "bf16", "fp16"]
    step: Annotated[int, Field(ge=0)]
    micro: Annotated[int, Field(ge=0)] = 0
    rank: Annotated[int, Field(ge=0)] = 0
    draw_seed: Annotated[int, Field(ge=0, lt=1 << 63)]
    keys: list[str]
    parts: dict[str, str]

    @field_validator("parts")
    @classmethod
    def _are_numbers(cls, parts: dict[str, str]) -> dict[str, str]:
        for text in parts.values():
            float(text)
        return parts


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"its {'.'.join(map(str, first['loc']))[:80]} is no good ({field_reason(first)[:120]})"


def build(saved: Reproducer, recipe: ModuleType) -> nn.Module:
    """Build the recipe's model with the weights of that step, in training mode."""
    names = {field.name for field in dataclasses.fields(recipe.Config)}
    values = {key: value for key, value in saved.about["config"].items() if key in names}
    settings = config.read_settings(recipe.Config, values)
    built = config.build_config(recipe.Config, settings)
    what = f"the reproducer's weights do not fit recipe {saved.about['recipe']!r}"
    if saved.about["recipe"] in trainable.names():
        # first without memory: sizes are believed only where the file holds such weights
        with torch.device("meta"):
            own = {name: value.shape for name, value in recipe.Model(built).state_dict().items()}
        if own != {name: value.shape for name, value in saved.model.items()}:
            raise UserError(f"{what}: its settings make others; give a file that training wrote")
    model: nn.Module = recipe.Model(built)
    try:
        model.load_state_dict(saved.model)
    except RuntimeError as error:
        raise UserError(
            f"{what}: {str(error).splitlines()[-1].strip()}; give the recipe's file as it was, "
            "with --recipe"
        ) from error
    drop_path.attach(model)
    return model.train()


def replay(
    saved: Reproducer, model: nn.Module, device: torch.device, precision: str | None = None
) -> dict[str, Any]:
    """Run the micro-batch again: loss and parts, the first module whose output is not finite, and
    the parameters whose gradients are not. `precision` None is that of the run."""
    dtype = DTYPES[precision or saved.about["precision"]]
    model = model.to(device)
    batch = {name: value.to(device) for name, value in saved.batch.items()}
    torch.manual_seed(saved.about["draw_seed"])
    with _watched(model) as bad, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        parts = model(batch)
    parts["loss"].backward()
    gradients = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    return {
        "recipe": saved.about["recipe"],
        "step": saved.about["step"],
        "keys": saved.about["keys"],
        "parts": {name: float(value.detach()) for name, value in parts.items()},
        "parts_then": {name: float(value) for name, value in saved.about["parts"].items()},
        "nonfinite_weights": [name for name, value in saved.model.items() if not _finite(value)],
        "nonfinite_inputs": [name for name, value in saved.batch.items() if not _finite(value)],
        "first_nonfinite_module": bad[0] if bad else None,
        "nonfinite_gradients": gradients,
    }


def run_again(
    file: Path, recipe_name: str | None, device: str, precision: str | None
) -> dict[str, Any]:
    """Run `student replay`. A recipe of the user's own is run only where its file is named: a
    reproducer brings no code."""
    saved = load(file)
    name = recipe_name or saved.about["recipe"]
    if recipe_name is None and name not in trainable.names():
        raise UsageError(
            f"the run's recipe was a file of its own, {name!r}, and a reproducer brings no code: "
            "give it with --recipe"
        )
    if precision is not None and precision not in DTYPES:
        raise UsageError(f"--precision {precision!r}: fp32, bf16 and fp16 are allowed")
    recipe = trainable.load(name)
    try:
        return replay(saved, build(saved, recipe), torch.device(device), precision)
    except UserError as error:
        raise UserError(f"cannot replay {str(file)!r}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tensors of any shape and kind, which a model is run on
        raise UserError(
            f"cannot replay {str(file)!r}: recipe {name!r} fails on what it holds: {reason(error)};"
            " give a file that training wrote, and a recipe of your own as it was"
        ) from error


def text(facts: dict[str, Any]) -> str:
    """Return the facts of `replay` as text for a person."""
    keys = ", ".join(facts["keys"][:8]) + (" ..." if len(facts["keys"]) > 8 else "")
    lines = [
        f"{facts['recipe']}, step {facts['step']}, {counted(len(facts['keys']), 'picture')}: {keys}"
    ]
    lines += [
        f"{name}: {facts['parts_then'].get(name)} then, {now} now"
        for name, now in facts["parts"].items()
    ]
    for what in ("weights", "inputs", "gradients"):
        names = facts[f"nonfinite_{what}"]
        lines.append(
            f"{what} not finite: "
            f"{', '.join(names[:4]) or 'none'}{f' and {len(names) - 4} more' * (len(names) > 4)}"
        )
    return join_lines(
        [
            *lines,
            f"first module with an output that is not finite: {facts['first_nonfinite_module']}",
        ]
    )


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order in which they end."""
    bad: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                bad.append(name)

        return look

    hooks = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield bad
    finally:
        for registered in hooks:
            registered.remove()


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
