"""A run's folder as a training leaves it, with random weights and without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from student import checkpoint
from student.models import classifier
from student.models.build import build_encoder
from tests import teacher_reference

SIZES = {"img_size": 32, "patch_size": 8}


def write(run: Path, recipe: str, family: str, encoder: str, **more: Any) -> Path:
    """Write config.json and a checkpoint of step 2, of an encoder alone, of 4 x 4 patches;
    with `classes` and what else a classifier's settings are, that of a fine-tuning."""
    settings = {"encoder": encoder, "family": family, **SIZES, **more}
    build = classifier.build if classifier.is_meant(settings) else build_encoder
    net = teacher_reference.randomise_parameters(build(settings, family), std=0.05)
    model = {f"encoder.{key}": value for key, value in net.state_dict().items()}
    checkpoint.save(run, 2, {"model": model, "optimizer": {}, "scaler": {}})
    record = {"recipe": recipe, "config": settings, "steps": 2}
    (run / "config.json").write_text(json.dumps(record))
    return run
