"""This program made views.json by the documented rules in scalar Python, with numpy's own Philox.
Imports nothing of ours.

    python tests/golden/make_views.py > tests/golden/views.json

Words: Philox4x64-10, key = BLAKE2b-128 of the picture's key, counter = (block, view, epoch = 0,
stream), where stream = BLAKE2b-64 of "view:SEED". Numpy counts up before it draws, so it starts one
below. A view takes four words a try (area, ratio, top, left), ten tries, then flip, brightness,
contrast, saturation, order. A word's top 53 bits make the float.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import permutations

import numpy as np

CASES = [
    {"key": "n01440764/n01440764_10026", "height": 375, "width": 500, "views": 4, "policy": {}},
    {"key": "photos/Übung.1", "height": 97, "width": 61, "views": 3, "policy": {"seed": 7}},
    {
        "key": "photos/Übung.1",
        "height": 480,
        "width": 640,
        "views": 3,
        "policy": {"scale": [0.4, 1.0], "jitter": 0.4, "seed": 2**40},
    },
    {"key": "pano", "height": 10, "width": 400, "views": 2, "policy": {"scale": [0.9, 1.0]}},
    {"key": "tower", "height": 301, "width": 20, "views": 2, "policy": {"scale": [0.9, 1.0]}},
]
DEFAULT = {"scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5, "jitter": 0.0, "seed": 0}


def words(key: str, purpose: str, seed: int, view: int, epoch: int, count: int) -> list[int]:
    pair = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u8")
    stream = int.from_bytes(
        hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=8).digest(), "little"
    )
    counter = (view << 64) + (epoch << 128) + (stream << 192)
    generator = np.random.Philox(key=pair, counter=(counter - 1) % 2**256)
    return [int(word) for word in generator.random_raw(count)]


def unit(word: int) -> float:
    return (word >> 11) / 2**53


def one_view(case: dict, view: int) -> dict:
    policy = {**DEFAULT, **case["policy"]}
    height, width = case["height"], case["width"]
    raw = words(case["key"], "view", policy["seed"], view, 0, 48)
    low, high = policy["scale"]
    log_low, log_high = (math.log(r) for r in policy["ratio"])
    for i in range(10):
        area, ratio, top, left = (unit(w) for w in raw[4 * i : 4 * i + 4])
        fraction = low + (high - low) * area
        aspect = math.exp(log_low + (log_high - log_low) * ratio)
        w = round(math.sqrt(fraction * (height * width) * aspect))
        h = round(math.sqrt(fraction * (height * width) / aspect))
        if 0 < w <= width and 0 < h <= height:
            crop = [math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w]
            break
    else:
        w, h = width, height
        if width / height < policy["ratio"][0]:
            h = round(width / policy["ratio"][0])
        elif width / height > policy["ratio"][1]:
            w = round(height * policy["ratio"][1])
        crop, fraction = [(height - h) // 2, (width - w) // 2, h, w], w * h / (width * height)
    jitter = [1.0, 1.0, 1.0, "brightness,contrast,saturation"]
    if policy["jitter"]:
        orders = list(permutations(["brightness", "contrast", "saturation"]))
        factors = [1 + policy["jitter"] * (2 * unit(w) - 1) for w in raw[41:44]]
        jitter = [*factors, ",".join(orders[math.floor(unit(raw[44]) * 6)])]
    return {
        "crop": crop,
        "flip": int(unit(raw[40]) < policy["flip"]),
        "area": fraction,
        "jitter": jitter,
    }


if __name__ == "__main__":
    made = [
        {**case, "drawn": [one_view(case, view) for view in range(case["views"])]} for case in CASES
    ]
    print("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in made) + "\n]")
