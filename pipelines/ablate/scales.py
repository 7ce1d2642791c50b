"""The scales that a table can be made at: pictures, their small teacher, and the length of all.

One learning rate, one schedule and one decoder are for all students: the recipes' own are for
ImageNet. The rate is where the training losses of the quick start's students end lowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines import clipart, digits
from pipelines.small_teacher import SmallTeacher

LEVELS = 3  # of the six that a teacher has
# Of each setting that a recipe has.
SETTINGS: dict[str, Any] = {
    "encoder": digits.TEACHER.student,
    "drop_path": 0,
    "lr": 4e-3,
    "warmup_epochs": 2,
    "level_weights": f"top:{LEVELS}",
    "target": "f",  # where z is the default: these teachers have no projection
    "jitter": 0,  # all students see the same views
    "decoder_width": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "regressor_width": 128,  # the encoder's, which needs no bridge
    "regressor_depth": 2,
    "regressor_heads": 4,
}
# Some hundred pictures are few steps of a probe that is made for a million: small batches, and the
# smallest learning rate at which `student eval linear` does not warn. Heads are trained on centre
# views, which are embedded once. Spelled out, since the default of `student eval` is what each
# recipe was published with, and all rows are to be judged alike.
PROBES: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 90, "train-views": 0, "batch-size": 256, "blr": 2.7},
    "efficient": {"epochs": 90, "train-views": 0, "batch-size": 256, "blr": 2.7},
    # SGD: a held-out tenth chooses the rate; as many heads as the encoder has
    "attentive": {
        "epochs": 90,
        "train-views": 0,
        "batch-size": 256,
        "blr": "0.0125,0.05,0.2",
        "heads": digits.HEADS,
    },
    "logreg": {"C": 1},  # with ten pictures a class there are none to choose it by
    # MAE's protocol but for the learning rate, at which all rows learn (at 3e-3 the untrained
    # student does not); crops are the teacher's. Spelled out for the same reason.
    "finetune": {
        "batch-size": 20,
        "eval-every": 50,
        "set": (
            "lr=0.001",
            "layer_decay=0.75",
            "drop_path=0.1",
            "warmup_epochs=5",
        ),
    },
}


@dataclass(frozen=True)
class Scale:
    """Describe pictures with their teacher, and the length of every part."""

    name: str
    what: str
    module: str  # writes pictures and teacher: python -m MODULE OUT --seed S --epochs E
    teacher: SmallTeacher
    seeds: tuple[int, ...]
    teacher_epochs: int
    epochs: int
    views: int = 4
    batch_size: int = 64
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: PROBES)
    given: tuple[str, ...] = ()  # more words for MODULE
    is_reduced: bool = False

    def reduced(self) -> Scale:
        """Return the scale with everything as short as it can be: it shows that all runs."""
        probes = {
            name: {**own, "epochs": 12} if "epochs" in own else own  # 10 of warm-up
            for name, own in self.probes.items()
        }
        return replace(self, teacher_epochs=2, epochs=1, views=1, probes=probes, is_reduced=True)


DIGITS = Scale(
    name="digits",
    what="397 held-out digits",
    module="pipelines.digits",
    teacher=digits.TEACHER,
    seeds=(0, 1, 2),
    teacher_epochs=20,
    epochs=24,
)
CLIPART = Scale(
    name="clipart",
    what=f"{clipart.TEST * len(clipart.CLASSES)} held-out drawings",
    module="pipelines.clipart",
    teacher=clipart.TEACHER,
    seeds=(0, 1),
    teacher_epochs=60,
    epochs=48,
)
SCALES = {scale.name: scale for scale in (DIGITS, CLIPART)}
