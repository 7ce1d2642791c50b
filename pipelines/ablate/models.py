"""The table `models`: a teacher, its students by five recipes, and a student that learnt nothing.

All students have the teacher's own architecture, the same views, as many steps, and read one cache
per seed. (caev2's encoder is CAE's, with its own positions and layer scale, at the same width and
depth.)
"""

from __future__ import annotations

from pipelines.ablate.table import Column, Ordering, Row, Table

LINEAR = "linear-cls"
IMAGENET = "ImageNet-1k, ViT-B from CLIP-B/16, linear"

TITLE = "A teacher, its students, and a student that learnt nothing."
TABLE = Table(
    title="What a teacher and its students know",
    rows=(
        Row("teacher", "teacher (trained with labels)"),
        Row("untrained", "untrained student", recipe="mae", trained=False),
        Row("mae", "mae student", recipe="mae"),
        Row("maskalign", "maskalign student", recipe="maskalign"),
        Row("mralign", "mralign student", recipe="mralign"),
        Row("milan", "milan student", recipe="milan"),
        Row("caev2", "caev2 student", recipe="caev2"),
    ),
    columns=(
        Column("knn-cls", "k-NN [CLS]", "knn", "cls"),
        Column("knn-mean", "k-NN mean", "knn", "mean"),
        Column("linear-cls", "linear [CLS]", "linear", "cls"),
        Column("linear-mean", "linear mean", "linear", "mean"),
        Column("efficient", "efficient", "efficient"),
        Column("attentive", "attentive", "attentive"),
        Column("shots-cls", "10-shot [CLS]", "logreg", "cls", {"shots": 10}),
        Column("shots-mean", "10-shot mean", "logreg", "mean", {"shots": 10}),
    ),
    orderings=(
        Ordering("maskalign", "mae", LINEAR, f"{IMAGENET}: 79.9 and 68.0 (MaskAlign, Table 8)"),
        Ordering("milan", "mae", LINEAR, f"{IMAGENET}: 78.9 and 68.0 (MaskAlign, Table 8)"),
        Ordering("caev2", "mae", LINEAR, f"{IMAGENET}: 80.7 (CAE v2, Table 6) and 68.0"),
        Ordering("maskalign", "milan", LINEAR, f"{IMAGENET}: 79.9 and 78.9 (MaskAlign, Table 8)"),
        Ordering("caev2", "maskalign", LINEAR, f"{IMAGENET}: 80.7 (CAE v2, Table 6) and 79.9"),
        Ordering(
            "maskalign",
            "teacher",
            LINEAR,
            "published of fine-tuning alone: 85.4 and 82.9 (MaskAlign, Tables 1 and 5)",
        ),
        Ordering("mralign", "mae", "knn-cls", "ours: alignment adds to predicted pixels"),
        *(
            Ordering(name, "untrained", column, "a student has learnt")
            for column in ("knn-cls", LINEAR)
            for name in ("mae", "maskalign", "mralign", "milan", "caev2")
        ),
    ),
    notes=("[CLS]: the token after the encoder's last norm; mean: the mean of its patches.",),
)
