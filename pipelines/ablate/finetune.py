"""The table `finetune`: three students and one that learnt nothing, fine-tuned with few labels and
with all.

Linear probes under-rate students of masked pictures; fine-tuning is what most papers report. All
rows are fine-tuned alike, by MAE's protocol at one learning rate.
"""

from __future__ import annotations

from pipelines.ablate.table import Column, Ordering, Row, Table

FEW, ALL = "finetune-shots", "finetune-all"
IMAGENET = "ImageNet-1k, ViT-B from CLIP-B/16, fine-tuned"

TITLE = "Students that are fine-tuned, with few labels and with all."
TABLE = Table(
    title="Students fine-tuned",
    rows=(
        Row("untrained", "untrained student", recipe="mae", trained=False),
        Row("mae", "mae student", recipe="mae"),
        Row("maskalign", "maskalign student", recipe="maskalign"),
        Row("mralign", "mralign student", recipe="mralign"),
    ),
    columns=(
        Column(FEW, "10 a class", "finetune", options={"shots": 10, "epochs": 100}, trains=True),
        Column(ALL, "all", "finetune", options={"epochs": 20}, trains=True),
    ),
    orderings=(
        *(
            Ordering(name, "untrained", column, "a student has learnt")
            for column in (FEW, ALL)
            for name in ("mae", "maskalign", "mralign")
        ),
        Ordering("maskalign", "mae", ALL, f"{IMAGENET}: 85.4 and 83.6 (MaskAlign, Table 1; MAE)"),
        Ordering("mralign", "mae", ALL, "ours: alignment adds to predicted pixels"),
    ),
    notes=("Accuracy of the last weights; the test pictures chose nothing.",),
)
