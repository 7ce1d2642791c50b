"""A fine-tuned classifier is read back from its run: the last weights, or those of the best score.

RUN/checkpoints/   the last ones, with everything that a run goes on from
RUN/best.safetensors   weights alone, of the highest score on the first test set

network, config = load_classifier(run)          # timm's own network, with its head
network.state_dict()   -> timm.create_model(NAME, num_classes=C, global_pool="avg")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.runtime.field_words import field_reason
from student import checkpoint
from student.models import classifier, weights_file

BEST = "best.safetensors"


class BestFacts(BaseModel):
    """Hold what the file of the best weights says of itself."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    step: Annotated[int, Field(ge=0)]
    top1: Annotated[float, Field(ge=0, le=100)]


def write_best(path: Path, weights: dict[str, Tensor], step: int, top1: float) -> None:
    """Write the weights of a run's model as the best, whole or not at all."""
    weights_file.write(path, weights, {"step": step, "top1": top1})


def best_facts(run: Path) -> BestFacts | None:
    """Return step and score of a run's best weights; None where none are kept."""
    return _read(run / BEST)[0] if (run / BEST).exists() else None


def load_classifier(run: Path, *, best: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Return a fine-tuned network with its head, in eval mode, and the run's configuration: the
    last weights or the best. Raises UserError for a run that was not fine-tuned."""
    settings = checkpoint.read_config(run)["config"]
    if not classifier.is_meant(settings):
        raise UserError(
            f"run {str(run)!r} has no head: it was not fine-tuned; give one that `student eval "
            "finetune` wrote"
        )
    network, settings = checkpoint.load_encoder(run)
    if best:
        weights = {
            name.removeprefix("encoder."): value for name, value in _read(run / BEST)[1].items()
        }
        if _kinds(network.state_dict()) != _kinds(weights):
            raise UserError(f"{str(run / BEST)!r} does not fit the network of its run; remove it")
        network.load_state_dict(weights)
    return network, settings


def _kinds(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (value.shape, value.is_floating_point()) for name, value in weights.items()}


def _read(path: Path) -> tuple[BestFacts, dict[str, Tensor]]:
    try:
        about, tensors = weights_file.read(path)
        facts = BestFacts.model_validate(about)
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {field_reason(first)}" if first else str(error)
        raise UserError(
            f"{str(path)!r} cannot be read: {why.splitlines()[0][:160]}; remove it, and the next "
            "score that is higher writes it again"
        ) from error
    return facts, tensors
