"""Labelled pictures are opened for an evaluation: to train on, and one or more sets to test on.

A test set may restrict the classes that can be chosen (ImageNet-A and -R have 200 of ImageNet's
1,000), or map training classes to its own (ImageNet-9 has nine, each of many).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UsageError, UserError, counted, near
from featcache.pictures import passed_over
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.pictures.spec import parse_spec
from featcache.runtime import strict_json
from student.features.labels import (
    I64,
    class_count,
    class_name,
    labels_as,
    labels_of,
    low_shot,
    match_notes,
    split_holdout,
)
from student.features.task import LabelledSet, TestSet

NAMES_BYTES = 16 << 20  # of a file of class names
_NAMED = re.compile(r"([A-Za-z0-9_.-]{1,40})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class SetOptions:
    """What a person asked for: specs of pictures, and how they are cut."""

    images: str
    tests: Sequence[str] = ()  # [NAME=]SPEC
    subsets: Sequence[str] = ()  # NAME or NAME=FILE
    maps: Sequence[str] = ()  # NAME=FILE
    shots: int | None = None
    fraction: float | None = None
    seed: int = 0
    trains: bool = True  # False: the pictures name the classes, and are the test set


@dataclass(frozen=True)
class Sets:
    """Holds the sets of an evaluation, and what a person should know of them."""

    train: LabelledSet
    tests: tuple[TestSet, ...]
    names: list[str]  # of the training classes
    notes: list[str]
    passed_over: list[dict[str, Any]]


def open_sets(options: SetOptions) -> Sets:
    """Open the pictures; without test sets a fifth of the training pictures is held out, and where
    nothing is trained they are the test set."""
    if options.shots is not None and options.fraction is not None:
        raise UsageError("--shots and --fraction: one of them is allowed; leave one out")
    source = open_source(options.images)
    count = class_count(source)
    names = [_plain(source, label) for label in range(count)]
    present = np.unique(labels_of(source))
    if len(present) < 2:
        raise UserError(
            f"cannot evaluate on {source.spec}: its "
            f"{counted(len(source), 'picture is', 'pictures are')} of one class, two "
            "at least are needed; give pictures of more classes (SRC/CLASS/picture.png)"
        )
    specs = _named_specs(options.tests)
    sources = {name: open_source(spec) for name, spec in specs.items()}
    left_out = [row for each in (source, *sources.values()) for row in passed_over.as_json(each)]
    notes = list[str]()
    train: Source = source
    if not sources and not options.trains:
        sources = {"test": source}
    if not sources:
        train, held = split_holdout(source, seed=options.seed)
        sources = {"test": held}
        notes.append(
            f"no --test given; {len(held)} of "
            f"{counted(len(source), 'picture is', 'pictures are')} held out"
        )
    if options.shots is not None or options.fraction is not None:
        train = low_shot(train, shots=options.shots, fraction=options.fraction, seed=options.seed)
        notes.append(f"{len(train)} training pictures are used: {train.spec}")
    subsets, maps = (
        _by_test("--subset", options.subsets, sources),
        _by_test("--class-map", options.maps, sources),
    )
    if both := subsets.keys() & maps.keys():
        raise UsageError(
            f"--subset and --class-map are both given for the test set {min(both)}: classes that "
            "its map leads nowhere are null in the file; leave --subset out"
        )
    tests = []
    for name, test in sources.items():
        if name in maps:
            tests.append(_mapped(name, test, maps[name], names))
            continue
        notes += match_notes(test, train) if options.trains else []
        labels = labels_as(test, source)
        classes = None
        if name in subsets:
            classes = _subset(name, subsets[name], labels, names)
        tests.append(TestSet(name, test, labels, names, classes))
    return Sets(LabelledSet("train", train, labels_of(train)), tuple(tests), names, notes, left_out)


def _plain(source: Source, label: int) -> str:
    """Return the name of a class; the number itself where nobody named it."""
    return source.classes[label] if source.classes else class_name(source, label)


def _named_specs(tests: Sequence[str]) -> dict[str, str]:
    """Return name -> spec; one set without a name is `test`, several are called as their path
    ends."""
    found: dict[str, str] = {}
    for text in tests:
        match = None if Path(text).exists() else _NAMED.fullmatch(text)
        if match:
            name, spec = match.groups()
        else:
            name, spec = "test" if len(tests) == 1 else Path(parse_spec(text).path).name[:40], text
        if name in found:
            raise UsageError(
                f"--test {text}: two test sets are called {name}; give each a name, as in "
                "--test a=FOLDER --test b=OTHER"
            )
        found[name] = spec
    return found


def _by_test(option: str, texts: Sequence[str], tests: dict[str, Source]) -> dict[str, str]:
    """Return test set -> file (empty: none given)."""
    found = {}
    for text in texts:
        name, _, file = text.partition("=")
        if name not in tests:
            raise UsageError(f"{option} {text}: {name!r} is no test set; {near(name, tests)}")
        if option == "--class-map" and not file:
            raise UsageError(f"{option} {text}: a file is needed; give {option} {name}=MAP.json")
        found[name] = file
    return found


def _subset(test: str, file: str, labels: I64, names: list[str]) -> I64:
    """Return the classes that may be chosen: those of the test pictures, or those in a file, one
    name a line."""
    if not file:
        return np.unique(labels)
    try:
        lines = strict_json.read_bytes(Path(file), NAMES_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--subset {test}={file}: it cannot be read as text ({error})") from error
    number = {name: i for i, name in enumerate(names)}
    wanted = [line.strip() for line in lines if line.strip()]
    for name in wanted:
        if name not in number:
            raise UserError(
                f"--subset {test}={file}: {name!r:.80} is no training class "
                f"({near(name, number)[:300]}); one class name a line is needed"
            )
    chosen = np.array(sorted({number[name] for name in wanted}), np.int64)
    if missing := sorted({names[label] for label in labels} - set(wanted)):
        raise UserError(
            f"--subset {test}={file}: test pictures are of {missing[0]!r:.80}, which is not in "
            "the file; add it, or leave =FILE out"
        )
    return chosen


def _mapped(test: str, source: Source, file: str, names: list[str]) -> TestSet:
    """Return a test set whose classes are its own: the file is a JSON object from training class to
    class of the test set, or null."""
    try:
        given = strict_json.as_object(strict_json.read_file(Path(file)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--class-map {test}={file}: {error}; a JSON object from the name of a training class "
            "to that of a class of the test set, or null, is needed"
        ) from error
    own = [_plain(source, label) for label in range(class_count(source))]
    number, known = ({name: i for i, name in enumerate(each)} for each in (own, names))
    mapping = np.full(len(names), -1, np.int64)
    for name, target in given.items():
        if name not in known:
            raise UserError(
                f"--class-map {test}={file}: {name!r:.80} is no training class "
                f"({near(name, names)[:300]})"
            )
        if target is not None and not (isinstance(target, str) and target in number):
            raise UserError(
                f"--class-map {test}={file}: {repr(target)[:80]} is no class of {source.spec} "
                f"({near(str(target)[:80], number)[:300]})"
            )
        if target is not None:
            mapping[known[name]] = number[target]
    if not (mapping >= 0).any():
        raise UserError(f"--class-map {test}={file}: it maps no class; nothing could be right")
    return TestSet(test, source, labels_of(source), own, None, mapping)
