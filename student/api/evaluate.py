"""`student.evaluate` does what `student eval` does, which is a thin layer over it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from featcache.api.progress import Progress, ProgressCallback, ignore
from featcache.catalog.account import account
from featcache.console import keywords
from featcache.console.params import require_images
from featcache.errors import UsageError, UserError, near, one_line, short
from featcache.runtime.device import pick_device
from student import evals
from student.api.settings import SETTINGS_FILE, setting_texts, with_file
from student.api.voice import voice
from student.features import results, scores
from student.features.embed import Skipped
from student.features.frozen import FrozenEncoder
from student.features.labelled import SetOptions, Sets, open_sets
from student.features.task import Outcome, Subject, Task
from student.setup import eval_options, eval_parameters, eval_text, finetune_run
from student.setup.console import Told, Voice
from student.training.run_folder import commit
from student.training.set_aside import generators_kept

Text = str | os.PathLike[str]
Texts = Text | Sequence[Text]
Stages = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True)
class Score:
    """Holds the accuracy on one test set, in per cent, with its interval of 95 %."""

    top1: float
    interval: tuple[float, float]
    n_test: int
    top5: float | None = None  # None where there are fewer than five classes
    per_class: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class EvalResult:
    """Says what an evaluation found; `facts` are plain JSON, all that --json prints."""

    protocol: str
    scores: dict[str, Score]  # of each test set; none where nothing was scored
    facts: dict[str, Any] = field(repr=False)

    @property
    def top1(self) -> float:
        """Return the accuracy on the first test set. Raises UserError where nothing was scored."""
        if not self.scores:
            raise UserError(
                f"{self.protocol}: nothing was scored, so there is no top1: a dry run, or settings "
                "alone, were asked for; evaluate without them"
            )
        return next(iter(self.scores.values())).top1


def evaluate(
    protocol: str,
    *,
    run: Text | None = None,
    teacher: Text | None = None,
    weights: Text | None = None,
    checkpoint: int | None = None,
    ema: bool = False,
    images: Text | None = None,
    labels: Text | None = None,
    image_member: str | None = None,
    test: Texts = (),
    subset: str | Sequence[str] = (),
    class_map: str | Sequence[str] = (),
    seed: int = 0,
    embed_batch: int = 64,
    skip_bad: int = 0,
    device: str | None = None,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> EvalResult:
    """Judge the features of a run, or of a teacher, on labelled pictures by a protocol.

    Each keyword is the option of `student eval PROTOCOL` of this name, with its meaning, range and
    default, and `run` is its argument. `options` are those that not all protocols have, such as
    `k=20` of knn, `shots`, `pool` or, of finetune, `epochs` and `settings`; `student eval PROTOCOL
    --help` says them. Several test sets are a list. `progress` is called with a `Progress` of each
    stage, in pictures, epochs or fits, and of finetune in steps; what it raises ends the work.
    Notes go to the logger "student".

    Raises UsageError for what cannot be meant, UserError where the work cannot be done, and, of
    finetune, StoppedError as `student.train` does; an OSError of the machine passes through.
    """
    given = dict(locals())  # the keywords, which are all there is yet
    module = evals.load(given.pop("protocol"))
    callback, own = given.pop("progress"), given.pop("options")
    if "settings" in own:
        own = {**own, "settings": setting_texts(own["settings"])}
    trains = getattr(module, "TRAINS_ENCODER", False)
    parameters = [*eval_parameters.parameters(module), *([SETTINGS_FILE] if trains else [])]
    values = keywords.read(parameters, {**_defaults(protocol, parameters, own), **given, **own})
    values = with_file(values)
    told = carry_out(protocol, values, own, voice(callback), _stages(callback or ignore))
    tests = told.facts.get("tests", {})
    return EvalResult(protocol, {name: _score(each) for name, each in tests.items()}, told.facts)


def _defaults(protocol: str, parameters: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what keywords are where they are not given. Raises UsageError for one that the
    protocol does not have."""
    known = keywords.keywords(parameters)
    for name in given:
        if name not in known:
            raise UsageError(f"{protocol} has no option {short(name)}: {near(name, known)}")
    return {name: keywords.default(param) for name, param in known.items()}


def _stages(callback: ProgressCallback) -> Stages:
    def show(stage: str, done: int, total: int) -> None:
        callback(Progress(stage, done, total))

    return lambda: nullcontext(show)


def _score(facts: Mapping[str, Any]) -> Score:
    low, high = facts["interval"]
    return Score(facts["top1"], (low, high), facts["n_test"], facts.get("top5"), facts["per_class"])


# --- the work, for the command too ----------------------------------------------------------------


def carry_out(
    name: str, given: Mapping[str, Any], chosen: Collection[str], voice: Voice, stages: Stages
) -> Told:
    """Evaluate, and record the result. `given` are the options by click's names, `chosen` those
    that a person gave, and `stages` shows how far a stage is."""
    module = evals.load(name)
    if getattr(module, "TRAINS_ENCODER", False):
        return finetune_run.run(name, module, given, voice)
    options = {key: given[key] for key in module.OPTIONS}
    shared = eval_options.filled({key: given[key] for key in given if key not in options})
    about = eval_options.subject_facts(given)
    with generators_kept(torch.device("cpu")), account(f"eval {name}", **about) as line:
        asked = set(chosen) & set(options)
        told = _evaluate(module, name, options, asked, shared, voice, stages)
        line |= {"recipe": told.facts.get("recipe", ""), "step": told.facts.get("checkpoint")}
    return told


def _evaluate(
    module: ModuleType,
    name: str,
    options: dict[str, Any],
    set_by_user: set[str],
    given: dict[str, Any],
    voice: Voice,
    stages: Stages,
) -> Told:
    run: Path | None = given["run"]
    trains = getattr(module, "TRAINS", True)
    eval_options.check_subject(f"eval {name}", given)
    sets = open_sets(
        SetOptions(
            require_images(given["images_spec"]), given["tests"], given["subsets"], given["maps"],
            given["shots"], given["fraction"], given["seed"], trains,
        )
    )  # fmt: skip
    frozen = eval_options.freeze(given)
    eval_options.check_blocks(frozen, given["blocks"])
    options |= _published(module, name, frozen, options, set_by_user, voice)
    for note in sets.notes:
        voice.tell(one_line(f"note: {note}"))
    started, skipped = time.perf_counter(), Skipped(given["skip_bad"])
    with stages() as progress:
        task = Task(
            frozen, sets.train, sets.tests, sets.names, given["pool"], given["blocks"],
            given["seed"], pick_device(given["device"]), given["crop_pct"], given["embed_batch"],
            given["keep"], skipped, progress, _subject(given, frozen),
        )  # fmt: skip
        outcome = module.evaluate(task, **options)
    facts = {
        "eval": name,
        "of": str(run.absolute() if run else given["teacher_spec"]),
        **frozen.facts,
        **_facts(given, options, sets, outcome, skipped),
        **({} if trains else {"n_train": 0}),
        "seconds": round(time.perf_counter() - started, 2),
        "commit": commit(),
    }
    if head := results.record(run, facts, outcome.head):
        facts["head"] = head
    if facts.get("note"):
        voice.tell(one_line(f"note: {facts['note']}"))
    return Told(facts, eval_text.of_result(name, facts), speaks=True)


def _subject(given: dict[str, Any], frozen: FrozenEncoder) -> Subject:
    # the step that was read: a run that goes on has newer ones meanwhile
    step = frozen.facts.get("checkpoint")
    teacher = given["teacher_spec"] or ""
    return Subject(given["run"], step, given["ema"], teacher, given["weights"])


def _published(
    module: ModuleType,
    name: str,
    frozen: FrozenEncoder,
    options: dict[str, Any],
    set_by_user: set[str],
    voice: Voice,
) -> dict[str, Any]:
    """Return the settings that a recipe's publication has for this protocol, where the user gave
    none; a note tells them."""
    recipe, size = frozen.facts.get("recipe"), frozen.facts.get("size")
    found = module.DEFAULTS.get((recipe, size), module.DEFAULTS.get((recipe, None), {}))
    changed = {
        key: value
        for key, value in found.items()
        if key not in set_by_user and value != options[key]
    }
    if changed:
        told = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in changed.items())
        voice.tell(one_line(f"note: {name} as {recipe} has it: {told}"))
    return changed


def _facts(
    given: dict[str, Any], options: dict[str, Any], sets: Sets, outcome: Outcome, skipped: Any
) -> dict[str, Any]:
    """Return what a result says of settings and scores, as plain JSON."""
    tests = {each.of.name: scores.of_test(each) for each in outcome.scored}
    first = next(iter(tests.values()))
    shared = {
        key: given[key]
        for key in ("pool", "blocks", "crop_pct", "seed", "shots", "fraction")
        if key in given["own"] and given[key] is not None
    }
    trained = sets.train.source
    shared |= {
        "images": given["images_spec"],
        "tests": {test.name: test.source.spec for test in sets.tests},
    }
    # a result of other weights or other classes is another result
    named = {"weights": "weights", "subsets": "subset", "maps": "class_map"}
    shared |= {told: given[key] for key, told in named.items() if given[key]}
    return {
        **first,
        "n_train": len(trained) - len(skipped.errors.get(trained.spec, ())),
        "classes": len(sets.names),
        "pool": given["pool"],
        "settings": {**shared, **options},
        "tests": tests,
        **outcome.facts,
        **({"labels": sets.notes} if sets.notes else {}),
        **({"passed_over": sets.passed_over} if sets.passed_over else {}),
        **({"skipped": skipped.told()} if skipped.count else {}),
    }
