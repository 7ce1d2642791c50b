"""Views of labelled pictures are cropped by the law of the released fine-tuning."""

from __future__ import annotations

import numpy as np
from PIL import Image

from featcache import rng
from featcache.views.policy import Policy
from student.targets.augmentation import Augmentation
from student.targets.labelled_views import LabelledViews

PLAIN = Augmentation(rand_augment="", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0)


def test_crops_keep_the_aspect_of_the_law_in_a_wide_picture() -> None:
    """Of 100 x 400 pixels a box is 133 wide at most, 4/3 of its height: what does not fit is drawn
    again, and is not cut to the picture's sides, as MAE's linear probe does."""
    column = np.broadcast_to(np.arange(400) * (255 / 399), (100, 400))
    picture = Image.fromarray(np.rint(np.stack([column] * 3, -1)).astype(np.uint8))
    policy = Policy(size=32, scale=(0.08, 1.0), filter="bicubic", flip=0.5, seed=3)
    views = LabelledViews(policy, np.zeros(1, np.int64), 2, PLAIN, (0.5,) * 3, (0.2,) * 3)
    digest = rng.key_digests(["a.png"])[0]
    widths = []
    for view in range(200):
        pixels = views.render(picture, {}, 0, "a.png", digest, view)["pixels"][16, :, 0]
        widths.append(np.ptp(pixels.astype(float)) * (399 / 255))
    # the outermost of 32 columns lie half a column inside the box
    assert 110 < max(widths) < 134 + 3
    assert np.mean(widths) < 100
