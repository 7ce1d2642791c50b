"""`student eval` judges frozen features; each file of `student/evals` is a command of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from featcache.console import config_file
from featcache.console.params import SEED, FiniteRange, LocalText
from featcache.console.text import echo, first_paragraph, print_facts
from featcache.errors import one_line
from student.setup import eval_options, eval_text, finetune_options

if TYPE_CHECKING:
    from student.features.frozen import FrozenEncoder
    from student.features.labelled import Sets
    from student.features.task import Outcome, Subject


class _Whole(click.types.IntParamType):
    """One option takes a whole number; how large, the protocol says. More than 10**9 is a mistake,
    of which memory would tell late."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = super().convert(value, param, ctx)
        if abs(number) > 10**9:
            self.fail(f"{number} is too large; at most 1000000000 is allowed", param, ctx)
        return number


_KINDS: dict[type, click.ParamType] = {
    int: _Whole(),
    type(None): _Whole(),
    float: FiniteRange(),
    str: LocalText(),
}


class _Evals(click.Group):
    """Offers one command for each file in student/evals."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from student import evals

        return evals.names()

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        from student import evals

        module = evals.load(name)
        if getattr(module, "TRAINS_ENCODER", False):
            return _training_command(name, module)
        return _eval_command(name, module)


@click.group("eval", cls=_Evals)
def command() -> None:
    """Accuracy of frozen features on labelled pictures, by the papers' protocols.

    Each result is a line of RUN/results.jsonl and of $FEATCACHE_HOME/results.jsonl. Features are
    kept below $FEATCACHE_HOME/features, so that the next protocol reads no picture.
    """


def _parameters(module: Any) -> list[click.Parameter]:
    """Return what all protocols of frozen features share; one that trains nothing has no training
    pictures, one that pools tokens itself no pools."""
    return [
        *_pictures(trains=getattr(module, "TRAINS", True)),
        *eval_options.parameters(pools=getattr(module, "POOLS", True)),
        click.Option(
            ["--seed"], type=SEED, default=0, show_default=True, help="Of splits, views and heads."
        ),
    ]


def _pictures(*, trains: bool) -> list[click.Parameter]:
    """Return the options that name training and test pictures."""
    default = "a fifth of --images, held out" if trains else "all of --images"
    few = [
        click.Option(
            ["--shots"], type=click.IntRange(1, 10**6), help="Train on so many pictures a class."
        ),
        click.Option(
            ["--fraction"],
            type=FiniteRange(0, 1, min_open=True),
            help="Train on this share of each class, such as 0.01.",
        ),
    ]
    return [
        click.Option(
            ["--images", "images_spec"],
            type=LocalText(),
            help="Labelled pictures: class folders, tars with .cls, or .beton.",
        ),
        click.Option(
            ["--test", "tests"],
            type=LocalText(),
            multiple=True,
            metavar="[NAME=]SPEC",
            help=f"Labelled test pictures; may be repeated. [default: {default}]",
        ),
        click.Option(
            ["--subset", "subsets"],
            multiple=True,
            metavar="NAME[=FILE]",
            help="Of that test set only the classes that it has, or those in FILE, one a line, can "
            "be chosen (ImageNet-A, -R).",
        ),
        click.Option(
            ["--class-map", "maps"],
            multiple=True,
            metavar="NAME=FILE",
            help="JSON object from training class to class of that test set (ImageNet-9).",
        ),
        *(few if trains else ()),
    ]


def _training_command(name: str, module: Any) -> click.Command:
    """Return the command of a protocol that trains the encoder itself, as a run."""

    def run(**given: Any) -> None:
        from student.setup import finetune_run

        finetune_run.run(name, module, given)

    examples = (
        f"Examples:\n\n  student eval {name} runs/mralign-s0 --images train/ --test val/\n\n"
        f"  student eval {name} RUN --images train/ --set img_size=384 --resume"
    )
    command = click.Command(
        name,
        params=[*_pictures(trains=True), *finetune_options.parameters()],
        callback=run,
        help=first_paragraph(module.__doc__),
        epilog=examples,
    )
    return config_file.accepts(
        settings=_settings,
        own_code={"teacher_spec": config_file.is_registered},
        also_settings=("epochs",),
    )(command)


def _settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a fine-tuning, from --config and --set."""
    from student.setup.file_settings import merged_values
    from student.training.finetune import Config

    return merged_values(Config, given)


def _eval_command(name: str, module: Any) -> click.Command:
    own = [
        click.Option(
            [f"--{key.replace('_', '-')}", key],
            default=default,
            show_default=default not in (None, ""),
            help=text,
            type=_KINDS.get(type(default), type(default)),
        )
        for key, (default, text) in module.OPTIONS.items()
    ]

    @click.pass_context
    def run(ctx: click.Context, **given: Any) -> None:
        options = {key: given.pop(key) for key in module.OPTIONS}
        set_by_user = {
            key for key in options if ctx.get_parameter_source(key) is not ParameterSource.DEFAULT
        }
        _evaluate(module, name, options, set_by_user, eval_options.filled(given))

    example = f"Example:\n\n  student eval {name} runs/mralign-s0 --images train/ --test val/"
    command = click.Command(
        name,
        params=[*_parameters(module), *own],
        callback=run,
        help=first_paragraph(module.__doc__),
        epilog=example,
    )
    return config_file.accepts(
        own_code={"teacher_spec": config_file.is_registered},
        rivals={"shots": "fraction", "fraction": "shots"},
        soft=tuple(module.OPTIONS),  # a recipe's publication has others
    )(command)


def _evaluate(
    module: Any, name: str, options: dict[str, Any], set_by_user: set[str], given: dict[str, Any]
) -> None:
    from featcache.console.params import require_images
    from featcache.runtime.device import pick_device
    from student.features import results
    from student.features.embed import Skipped
    from student.features.labelled import SetOptions, open_sets
    from student.features.task import Task
    from student.training.run_folder import commit

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
    options |= _published(module, name, frozen, options, set_by_user)
    for note in sets.notes:
        echo(one_line(f"note: {note}"), err=True)
    started, skipped = time.perf_counter(), Skipped(given["skip_bad"])
    with eval_options.stage_bars() as progress:
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
        echo(one_line(f"note: {facts['note']}"), err=True)
    print_facts(facts, given["as_json"], eval_text.of_result(name, facts))


def _subject(given: dict[str, Any], frozen: FrozenEncoder) -> Subject:
    from student.features.task import Subject

    # the step that was read: a run that goes on has newer ones meanwhile
    step = frozen.facts.get("checkpoint")
    teacher = given["teacher_spec"] or ""
    return Subject(given["run"], step, given["ema"], teacher, given["weights"])


def _published(
    module: Any,
    name: str,
    frozen: FrozenEncoder,
    options: dict[str, Any],
    set_by_user: set[str],
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
        echo(one_line(f"note: {name} as {recipe} has it: {told}"), err=True)
    return changed


def _facts(
    given: dict[str, Any], options: dict[str, Any], sets: Sets, outcome: Outcome, skipped: Any
) -> dict[str, Any]:
    """Return what a result says of settings and scores, as plain JSON."""
    from student.features import scores

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
