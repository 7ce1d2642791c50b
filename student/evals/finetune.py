"""Fine-tune an encoder with a new head, by its recipe's paper.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.2, as in the
released code (facebookresearch/mae main_finetune.py): mean of the patches, a norm and a linear
head; AdamW with a learning rate that falls from layer to layer towards the pixels; RandAugment,
mixup, cutmix, random erasing and label smoothing by timm. MaskAlign, MILAN, CAE, CAE v2 and Feature
Distillation change settings of it, and those are taken for their recipes (`DEFAULTS`): CAE's family
trains tables of relative positions and keeps its last norm as `fc_norm`.

    student eval finetune RUN --images TRAIN --test VAL
    accelerate launch -m student eval finetune RUN --images TRAIN --test VAL --batch-size 128

The result is a run folder: it is interrupted and goes on with `--resume`, it has metrics and
checkpoints as any run, and `best.safetensors` beside them. Accuracies are those of the last
weights; the best of all epochs, which is chosen on the test pictures, is told beside.

Learning rates are written for a batch of 256 and scale with the batch. What differs from the
released codes: the warm-up starts at 0 and the peak comes once (CAE's and BEiT's come twice:
repeat_peak=true); Feature Distillation's floor, 1e-6 for every layer, is scaled by layer as the
others' is; positions of another picture size are resized by timm's functions, with antialiasing,
where CAE's code takes sines and cosines of the new grid; pairs that are mixed are neighbours in the
batch, and one lambda is drawn for the global batch, whatever the number of processes; test pictures
are normalised as training pictures are, where Feature Distillation takes CLIP's numbers.

MR-MAE's learning rate is in its text only, without code. None was published for mralign and kd,
which take their nearest parents', nor for mvp in what we could read: BEiT's.
"""

from __future__ import annotations

from typing import Any

TRAINS_ENCODER = True

_CAE = {"fc_norm": "norm", "rel_pos": True, "train_positions": False}
_MASKALIGN = {"blr": 3e-4, "layer_decay": 0.55, "drop_path": 0.2}
_MASKALIGN_L = {"blr": 3e-4, "layer_decay": 0.75, "drop_path": 0.4, "epochs": 50}
_MILAN = {"blr": 1e-4, "head_std": 0.02}
_MILAN_L = {**_MILAN, "layer_decay": 0.75, "drop_path": 0.2}
_FD = {"rel_pos": True, "clip_grad": 5.0}

DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("mae", "large"): {"blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50},
    ("mae", "huge"): {"blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3, "epochs": 50},
    ("maskalign", None): _MASKALIGN,
    ("maskalign", "large"): _MASKALIGN_L,
    ("mralign", None): _MASKALIGN,
    ("mralign", "large"): _MASKALIGN_L,
    ("mrmae", None): {"blr": 3e-4, "layer_decay": 0.6, "drop_path": 0.2},
    # 1.6e-2, 8e-3 and 2e-3 at a batch of 4,096
    ("cae", None): {**_CAE, "blr": 5e-4},
    ("cae", "small"): {**_CAE, "blr": 1e-3, "layer_decay": 0.75, "epochs": 200},
    ("cae", "large"): {
        **_CAE, "blr": 1.25e-4, "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50,
    },
    # 4e-3, 4e-4, 2e-4 and 4e-4 at a batch of 1,024
    ("caev2", None): {**_CAE, "blr": 5e-5, "layer_decay": 0.75},
    ("caev2", "tiny"): {
        **_CAE, "blr": 1e-3, "layer_decay": 0.85, "drop_path": 0.0, "mixup": 0.2, "cutmix": 0.0,
        "smoothing": 0.0,
    },
    ("caev2", "small"): {
        **_CAE, "blr": 1e-4, "layer_decay": 0.75, "warmup_epochs": 20, "epochs": 200,
    },
    ("caev2", "large"): {
        **_CAE, "blr": 1e-4, "layer_decay": 0.8, "drop_path": 0.2, "epochs": 50,
    },
    ("milan", None): _MILAN,
    ("milan", "large"): _MILAN_L,
    ("kd", None): _MILAN,
    ("kd", "large"): _MILAN_L,
    # 5e-3 and 1e-3 at a batch of 2,048
    ("fd", None): {
        **_FD, "blr": 6.25e-4, "layer_decay": 0.6, "drop_path": 0.3, "warmup_epochs": 20,
    },
    ("fd", "large"): {
        **_FD, "blr": 1.25e-4, "layer_decay": 0.75, "drop_path": 0.4, "epochs": 50, "min_lr": 2e-6,
    },
    # microsoft/unilm beit, for its models without intermediate fine-tuning: 4e-3 and 1e-3 at a
    # batch of 1,024
    ("mvp", None): {"rel_pos": True, "blr": 1e-3, "warmup_epochs": 20},
    ("mvp", "large"): {
        "rel_pos": True, "blr": 2.5e-4, "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50,
    },
}  # fmt: skip


def crop_pct(img_size: int) -> float:
    """Return the share of the shorter side that a test picture's centre crop has: 224 of 256, and
    all of it above 224 (facebookresearch/mae util/datasets.py:51-63)."""
    return 0.875 if img_size <= 224 else 1.0
