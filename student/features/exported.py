"""An encoder that is exported comes with what its run says of it.

A run's folder may be a stranger's: its facts are checked where they are read, and its texts are
shown, never used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.runtime import strict_json
from student import checkpoint
from student.features import finetuned, results
from student.models import classifier

MODULE = (
    "`student.checkpoint.load_encoder(RUN)` in Python returns the module, built from the run's "
    "config.json"
)
TIMM_FAMILIES = ("mae", "cae", "beit", "timm")  # whose classes are timm's own


@dataclass(frozen=True)
class Exported:
    """Holds the network of a run in eval mode, of `classes` where it was fine-tuned (else 0), and
    the pixels that it takes: `img_size` a side, normalised by mean and std."""

    run: Path
    net: nn.Module
    settings: Mapping[str, Any]  # of the recipe, from config.json
    record: Mapping[str, Any]  # config.json
    step: int
    ema: bool
    best: bool = False  # those of a fine-tuning's best epoch, which was chosen on test pictures

    @property
    def family(self) -> str:
        return str(self.settings.get("family", "mae"))

    @property
    def img_size(self) -> int:
        return int(self.settings["img_size"])

    @property
    def classes(self) -> int:
        """Return C of a classifier, 0 for an encoder; a recipe of the user's own may have classes,
        too, and no head."""
        return int(self.settings["classes"]) if classifier.is_meant(self.settings) else 0

    @property
    def pixels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std of the three colours: a fine-tuned network's own, else ImageNet's."""
        default = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if not self.classes:
            return default
        found = [self.settings.get(name) for name in ("pixel_mean", "pixel_std")]
        return _triple(found[0], default[0]), _triple(found[1], default[1])


def _triple(value: object, default: tuple[float, ...]) -> tuple[float, ...]:
    if value is None:
        return default
    if isinstance(value, list | tuple) and len(value) == 3:
        numbers = [float(x) for x in value if type(x) in (int, float) and abs(x) < 1e6]
        if len(numbers) == 3:
            return tuple(numbers)
    raise UserError(
        f"the run's pixel_mean or pixel_std is {repr(value)[:80]}; three numbers are needed: "
        "restore its config.json"
    )


def read(run: Path, step: int | None, ema: bool, best: bool = False) -> Exported:
    """Read the encoder of a run's newest checkpoint, or of the one of `step`, with its head where
    it was fine-tuned; `best` is that of the epoch with the best score."""
    if best and (step is not None or ema):
        raise UsageError(
            "--best: a fine-tuning keeps its best epoch's weights alone, whose step it records and "
            "of which there is no average; leave --checkpoint and --ema out"
        )
    record = checkpoint.read_config(run)
    step = checkpoint.latest_step(run) if step is None else step
    if best:
        net, settings = finetuned.load_classifier(run, best=True)
        known = finetuned.best_facts(run)
        step = known.step if known is not None else step
    else:
        net, settings = checkpoint.load_encoder(run, ema, step)
    assert step is not None  # else there was no checkpoint to load
    return Exported(run, net.eval().requires_grad_(False), settings, record, step, ema, best)


# --- what the run says of itself ------------------------------------------------------------------


def facts(given: Exported) -> dict[str, str]:
    """Return what a model card says of a run, as text by name, from its own files."""
    targets, data = (_object(given.record.get(name)) for name in ("targets", "data"))
    identity, begun = _object(targets.get("identity")), _object(targets.get("begun"))
    teacher = _object(identity.get("teacher")).get("name") or targets.get("teacher")
    teacher = teacher or given.settings.get("teacher") or begun.get("teacher")
    found = {
        "recipe": given.record.get("recipe"),
        "encoder": given.settings.get("encoder"),
        "family": given.family,
        "picture size": given.img_size,
        "patch size": given.settings.get("patch_size"),
        "step": given.step,
        "steps of the run": given.record.get("steps"),
        "average of the weights": "yes" if given.ema else "no",
        "seed": given.record.get("seed"),
        "cache": targets.get("id"),
        "teacher": _last_part(str(teacher)) if teacher else None,  # perhaps one's own file
        "licence of the teacher": licence(teacher) if teacher else None,
        "begun from": begun.get("recipe"),
        "pictures": data.get("pictures"),
        "digest of the pictures' keys": data.get("keys_digest"),
    }
    if given.best:
        found["epoch"] = "the best of all, chosen on the test pictures"
    return {name: str(value)[:500] for name, value in found.items() if value is not None}


def licence(teacher: object) -> str:
    """Return the licence of a teacher's weights; unknown where no registered teacher has the
    name."""
    name = str(teacher).partition(",")[0]
    cards = teachers.model_cards()
    card = cards.get(name) or cards.get(name.partition(":")[0])
    return (card.licence if card else "") or "unknown"


def command(given: Exported) -> list[str]:
    """Return the command that made the run, from environment.json; empty where none is recorded.
    Of absolute paths the last part is left: where they lie is nobody's business."""
    path = given.run / "environment.json"
    try:
        found = strict_json.as_object(strict_json.read_file(path)).get("command")
    except (OSError, ValueError):
        return []
    return [_last_part(str(word)[:500]) for word in found[:200]] if isinstance(found, list) else []


def _last_part(word: str) -> str:
    """Shorten a word of a command line that is an absolute path, or gives one to a name.

    >>> _last_part("/home/ann/train"), _last_part("--test=val=/data/val"), _last_part("runs/a")
    ('.../train', '--test=val=.../val', 'runs/a')
    >>> _last_part("run:/home/ann/runs/a"), _last_part("https://example.org/a")
    ('run:.../a', 'https://example.org/a')
    """
    found = re.fullmatch(r"((?:.*[=:])?)(~.*|/(?!/).*)", word, re.DOTALL)
    return f"{found[1]}.../{found[2].rstrip('/').rpartition('/')[2]}" if found else word


def scores(given: Exported) -> list[dict[str, Any]]:
    """Return the results of these weights, the newest of each protocol and test set."""
    newest = {
        (row["protocol"], row["test"]): row
        for row in results.read(given.run)
        if _is_of_weights(given, row)
    }
    return [newest[key] for key in sorted(newest)]


def _is_of_weights(given: Exported, row: Mapping[str, Any]) -> bool:
    """Tell whether a line is of these weights. A fine-tuning writes the score of its last ones, and
    as `checkpoint` that of the run that it began from."""
    if given.classes and row["protocol"] == given.record["recipe"]:
        return not given.ema and given.step == given.record.get("steps")
    return row.get("checkpoint") == given.step and bool(row.get("ema", False)) == given.ema


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
