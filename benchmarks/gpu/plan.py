"""The measurements stand in the order of their worth, each with its time box, and so do the sizes
at which they are taken.

A measurement's function is named by text, so that listing them imports nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """A measurement has a name, a sentence on what it shows, a function and a time box."""

    name: str
    title: str
    function: str  # module:function
    least_s: int  # with less time left it is not begun
    box_s: int  # it is ended after so many seconds
    options: dict[str, Any] = field(default_factory=dict)  # of the function

    def load(self) -> Callable[..., None]:
        """Import the function."""
        return function_of(self.function)


def function_of(text: str) -> Callable[..., Any]:
    """Import module:function."""
    module, _, name = text.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _step(name: str, title: str, *, box_s: int = 90, **options: Any) -> Measurement:
    return Measurement(name, title, "benchmarks.gpu.steps:step", 45, box_s, options)


# by_gmac: student and teacher over the student alone, by multiply-accumulates: 15.9 GMAC a picture
# for MaskAlign's ViT-B student and 17.6 for CLIP-B/16; 18.7 and 61.5 with CLIP-L/14 at 196 pixels.
PLAN = (
    _step(
        "step-b16",
        "MaskAlign's step, ViT-B/16 from CLIP-B/16: cached, in memory, online, plain, released",
        box_s=120,
        recipe="maskalign",
        teacher="clip-b16",
        student="base",
        by_gmac=2.0,
    ),
    Measurement(
        "exact",
        "a run that was killed resumes to the same bits with --deterministic, and streams change "
        "no byte: the tests marked gpu",
        "benchmarks.gpu.exact:exact",
        40,
        120,
    ),
    Measurement(
        "kernels",
        "the share of the GPU's peak that the student's step uses, and its top kernels",
        "benchmarks.gpu.kernels:kernels",
        30,
        75,
    ),
    Measurement(
        "extract-b16",
        "CLIP-B/16 alone, against the extraction into nothing and into the store",
        "benchmarks.gpu.extraction:extraction",
        30,
        75,
        {"teacher": "clip-b16"},
    ),
    Measurement(
        "data",
        "waiting for data, and bytes a second wanted at full speed, from stored pixels and from "
        "tars",
        "benchmarks.gpu.data:data",
        30,
        75,
    ),
    _step(
        "step-l14",
        "MaskAlign's step, ViT-B/16 from CLIP-L/14 at 196 pixels",
        recipe="maskalign",
        teacher="clip-l14",
        student="base",
        by_gmac=4.2,
    ),
    Measurement(
        "memory",
        "peak memory and images a second by batch, with and without --checkpoint-activations",
        "benchmarks.gpu.memory:memory",
        30,
        90,
    ),
    Measurement(
        "codecs",
        "decoding a batch of each codec beside the step, encoding it beside the teacher",
        "benchmarks.gpu.codecs:codecs",
        30,
        90,
    ),
    _step(
        "step-mralign",
        "MR-Align's step, ViT-B/16 from CLIP-B/16",
        recipe="mralign",
        teacher="clip-b16",
        student="base",
    ),
    _step(
        "step-large",
        "MaskAlign's step, ViT-L/16 from CLIP-L/14 at 196 pixels",
        box_s=120,
        recipe="maskalign",
        teacher="clip-l14",
        student="large",
    ),
    _step(
        "step-eager",
        "MaskAlign's step, ViT-B/16 from CLIP-B/16, without --compile",
        recipe="maskalign",
        teacher="clip-b16",
        student="base",
        by_gmac=2.0,
        compiled=False,
    ),
    Measurement(
        "extract-l14",
        "CLIP-L/14 at 196 pixels alone, against the extraction into nothing and into the store",
        "benchmarks.gpu.extraction:extraction",
        30,
        75,
        {"teacher": "clip-l14"},
    ),
    Measurement(
        "recipes",
        "images a second of every recipe that CLIP-B/16 serves, without --compile",
        "benchmarks.gpu.steps:recipe_rates",
        40,
        120,
    ),
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements: real ones, or tiny ones that try the program."""

    teachers: dict[str, str]  # by the names of the plan
    students: dict[str, str]
    others: dict[str, str]  # names that the steps we compare with have for the same
    settings: tuple[str, ...]  # of the recipes that have them
    levels: str  # that are extracted
    pictures: int
    batch_size: int
    steps: int  # of each variant in a repetition
    settle: int  # steps before those, in which what was prepared in others' turns is used up
    reps: int
    precision: str
    compiled: bool
    matmul: int  # rows and columns of the product that shows the peak
    extract_reps: int
    memory_batches: tuple[int, ...]
    exact_tests: tuple[str, ...]  # arguments of pytest

    def describe(self) -> str:
        """Return how a step is measured, where a row does not say otherwise."""
        return (
            f"Steps of {self.batch_size} pictures in {self.precision}, compiled; medians of "
            f"{self.reps} turns of {self.steps} steps; {self.pictures:,} pictures of 500 x 375; "
            "random weights."
        )


GPU_TESTS = (
    "tests/student/training/test_train_exact.py",
    "tests/student/data/test_device_queue.py",
    "tests/student/data/test_prefetch.py",
    "tests/student/training/test_no_host_sync.py",
    "tests/student/training/test_optim.py",
    "tests/student/targets/test_augmentation.py",
    "tests/featcache/extraction/test_device_pipeline.py",
)
REAL = Sizes(
    teachers={"clip-b16": "clip-b16", "clip-l14": "clip-l14:grid=14"},
    students={"base": "base", "large": "large"},
    others={name: name for name in ("base", "large", "clip-b16", "clip-l14")},
    settings=(),
    levels="last:5",
    pictures=2048,
    batch_size=256,
    steps=20,
    settle=5,
    reps=5,
    precision="bf16",
    compiled=True,
    matmul=8192,
    extract_reps=3,
    memory_batches=(256, 512, 1024, 2048),
    exact_tests=("-m", "gpu", *GPU_TESTS),
)
# one network each, so that what is compiled for one measurement serves the others
_TINY = "timm:vit_tiny_patch16_224,embed_dim=24,depth=2,num_heads=3"
TRIAL = Sizes(
    teachers=dict.fromkeys(("clip-b16", "clip-l14"), _TINY),
    students=dict.fromkeys(("base", "large"), "tiny,embed_dim=48,depth=2,num_heads=3"),
    others=dict.fromkeys(("base", "large", "clip-b16", "clip-l14"), "tiny"),
    settings=(
        "level_weights=top:2",
        "target=f",
        "decoder_width=32",
        "decoder_depth=1",
        "decoder_heads=4",
        "regressor_width=32",
        "regressor_depth=1",
        "regressor_heads=4",
    ),
    levels="last:2",
    pictures=8,
    batch_size=4,
    steps=1,
    settle=1,
    reps=1,
    precision="fp32",
    compiled=True,
    matmul=64,
    extract_reps=1,
    memory_batches=(2, 4),
    exact_tests=(
        "tests/student/training/test_train_exact.py",
        "-k",
        "interrupted_at_every_step and (1-died or 5-told)",
    ),
)
