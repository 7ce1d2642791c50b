"""Do the quick start by Python calls alone, a cell at a time: open this file as a notebook, or run
it.

    python examples/notebook.py [--reduced]      # writes ./notebook; needs 'featcache[quickstart]'

A small ViT learns 1,400 digits with labels and becomes the teacher; its targets are stored once,
for four views of each digit; a student learns from them with mralign, and another stays untrained.
Both, and the teacher, are judged on 397 digits that none of them saw. With --reduced a few epochs
show that everything runs, and decide nothing. A cell that is run again goes on with what is there;
the last one wants `notebook/timm` gone.
"""

# %% What is needed, and how far each call is
import sys
from pathlib import Path

import featcache
import student
from pipelines import digits, small_teacher

REDUCED = "--reduced" in sys.argv
OUT = Path("notebook")


def show(now: featcache.Progress) -> None:
    loss = "" if now.loss is None else f"  loss {now.loss:.3f}"
    print(f"\r{now.stage}: {now.done} of {now.total}{loss}   ", end="", flush=True)


# %% Digits, and a teacher that is trained on them
digits.write_shards(OUT, seed=0)
TEACHER = digits.teacher(depth=4)
small_teacher.train_from_shards(
    TEACHER,
    OUT,
    what="digits",
    seed=0,
    epochs=2 if REDUCED else 8,
    batch_size=16,
    lr=1e-3,
)
TRAIN = str(OUT / "data/train-*.tar")
TEST = str(OUT / "data/test-*.tar")

# %% The teacher runs once over the views, and its targets are stored
cache = featcache.extract(
    teacher=TEACHER.spec,
    weights=OUT / "teacher.safetensors",
    images=TRAIN,
    out=OUT / "cache",
    views=1 if REDUCED else 4,
    levels="last:3",
    size=digits.PX,
    scale=digits.CROPS["scale"],
    flip=digits.CROPS["flip"],
    seed=0,
    batch_size=256,
    progress=show,
)
print(f"\n{cache.cache}: {cache.new_pictures} pictures")

# %% Students: one learns from the cache, one is not trained
SETTINGS = {
    "encoder": TEACHER.student,
    "decoder_width": 64,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "lr": 2e-3,
    "warmup_epochs": 2,
    "drop_path": 0,
    "level_weights": "top:3",
}
runs = {}
for name, length in {
    "untrained student": {"steps": 0},
    "mralign student": {"epochs": 1 if REDUCED else 14},
}.items():
    done = student.train(
        recipe="mralign",
        cache=cache.cache,
        images=TRAIN,
        out=OUT / name.split()[0],
        batch_size=32,
        seed=0,
        settings=SETTINGS,
        resume=True,
        progress=show,
        **length,
    )
    runs[name] = done.run
    print(f"\n{done.run}: {done.steps} steps, loss {done.loss}")

# %% k-NN and a linear probe on digits that nobody saw
PROBE = {"train_views": 0, "batch_size": 256, "blr": 2.7, "epochs": 15 if REDUCED else 90}
SUBJECTS = {
    "teacher": {"teacher": TEACHER.spec, "weights": OUT / "teacher.safetensors"},
    **{name: {"run": run} for name, run in runs.items()},
}
table = {}
for name, subject in SUBJECTS.items():
    table[name] = {
        protocol: student.evaluate(
            protocol,
            **subject,
            images=TRAIN,
            test=TEST,
            crop_pct=1.0,
            pool="cls",
            seed=0,
            progress=show,
            **options,
        )
        for protocol, options in (("knn", {}), ("linear", PROBE))
    }

# %% The table, with the interval of each score
print(f"\n\n{'':20}{'k-NN %':>22}{'linear %':>22}")
for name, found in table.items():
    cells = [
        f"{score.top1:.1f} ({score.interval[0]:.1f}-{score.interval[1]:.1f})"
        for result in found.values()
        for score in result.scores.values()
    ]
    print(f"{name:20}" + "".join(f"{cell:>22}" for cell in cells))

# %% The student as timm reads it
exported = student.export(run=runs["mralign student"], format="timm", out=OUT / "timm")
print(f"{exported.out}: differs by at most {exported.difference:.1e} from the run")
