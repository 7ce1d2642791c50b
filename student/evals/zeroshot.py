"""Classify pictures by texts, for a student of a CLIP.

The texts go through its teacher's text tower.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (CLIP),
ICML 2021, section 3.1: the names of the classes, in the sentences of templates, are embedded by the
text tower; the embeddings of a class are averaged, each of length 1, and so is their mean
(open_clip's own build_zero_shot_classifier). A picture's class is the one of the largest cosine.

    student eval zeroshot runs/kd --images LABELLED --templates simple

A student's embedding is what it predicts of its teacher's [CLS] output of the whole picture,
nothing hidden. Recipes that learn z give it as it is (kd, milan, caev2); f goes through the
projection P; the last level h of maskalign and mralign becomes f = gamma h + beta, then z = f P.
Other recipes predict no [CLS] of a teacher. `--teacher clip-b16` is judged by its own z.

Nothing is trained: without --test all of --images is scored; with it, --images names the classes.
Names are those of the class folders, `_` read as a space, or those of --names FILE, a JSON object
from class to name or to a list of names (`--names imagenet`: open_clip's 1,000). Templates are
OpenAI's 80 for ImageNet (`openai`), their 7 best (`simple`), or the lines of a file with {} in the
place of the name.

The text tower is that of the run's teacher, whose hash the run records: registered weights, or a
file of the whole CLIP by --teacher-weights. Cost: C times the templates forwards of the text tower,
and one forward of every picture.

B pictures, C classes, E width of the space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models.open_clip_text import TextTower
from featcache.models.weights import is_random
from student.features import class_texts, run_teacher
from student.features.frozen import FrozenEncoder
from student.features.task import Outcome, Scored, Task
from student.targets import predicted

TRAINS = POOLS = False
OPTIONS: dict[str, tuple[Any, str]] = {
    "templates": ("openai", "sentences around a name: openai (80), simple (7), or a FILE of lines"),
    "names": ("", "JSON FILE of class -> name or list of names; or imagenet. [default: folders]"),
    **run_teacher.OPTIONS,
}
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {}


def evaluate(
    task: Task, templates: str, names: str, teacher_name: str, teacher_weights: str
) -> Outcome:
    """Score the test pictures by the cosine of their embeddings with those of the classes."""
    of = class_texts.templates(templates)
    texts = [
        class_texts.sentences(each, of)
        for each in class_texts.class_texts(task.train.source, task.names, names)
    ]
    spec, weights, frozen = _pictures(task, teacher_name, teacher_weights)
    with run_teacher.own_options():
        tower = teachers.load_text(spec, weights or None)
    classes = embed_classes(task, tower, texts)
    shown = dataclasses.replace(task, frozen=frozen)
    scored = []
    for test in task.tests:
        (rows,), labels = shown.pooled(test, stage=test.name)
        if rows.shape[1] != len(classes):
            raise UserError(
                f"texts of {spec!r} have {len(classes)} channels, pictures {rows.shape[1]}: they "
                "are of two trainings; give the weights of both towers"
            )
        scored.append(Scored(test, rows @ classes, labels))
    facts = {"teacher": spec, "texts": sum(map(len, texts))}
    if is_random(weights):
        facts["note"] = f"{weights}: the texts' weights are drawn, not trained"
    return Outcome(scored, facts)


def embed_classes(task: Task, tower: TextTower, texts: Sequence[Sequence[str]]) -> Tensor:
    """Return the embeddings (E,C) of the classes, each of length 1, in host memory."""
    tower.to(task.device)
    found = []
    for number, each in enumerate(texts, 1):
        found.append(tower.embed_class(each, task.device).cpu())
        if task.progress is not None:
            task.progress("classes", number, len(texts))
    return torch.stack(found, 1)


def _pictures(
    task: Task, teacher_name: str, teacher_weights: str
) -> tuple[str, str, FrozenEncoder]:
    """Return spec and weights of the teacher whose texts are used, and the encoder of pictures."""
    subject = task.subject
    if subject.run is None:
        if teacher_name:
            raise UsageError(
                f"{run_teacher.NAME} names the teacher of a run, and --teacher is evaluated: leave "
                "one of them out"
            )
        weights = teacher_weights or subject.weights or ""
        return subject.teacher, weights, predicted.teacher_embedding(task.frozen)
    found = run_teacher.find(subject.run, teacher_name)
    teacher = run_teacher.load(found, teacher_weights)
    return found.spec, teacher_weights, predicted.run_embedding(subject, teacher)
