"""The parameters of `student eval PROTOCOL`, which a command line and a Python call share."""

from __future__ import annotations

from typing import Any

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import SEED, FiniteRange, LocalText, PicturesText
from featcache.console.picture_options import picture_options
from student.setup import eval_options, finetune_options


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


def parameters(module: Any) -> list[click.Parameter]:
    """Return the parameters of a protocol, with its own."""
    if getattr(module, "TRAINS_ENCODER", False):
        return [*_pictures(trains=True), *finetune_options.parameters()]
    return [*_shared(module), *_own(module)]


def _shared(module: Any) -> list[click.Parameter]:
    """Return what all protocols of frozen features share; one that trains nothing has no training
    pictures, one that pools tokens itself no pools."""
    return [
        *_pictures(trains=getattr(module, "TRAINS", True)),
        *eval_options.parameters(pools=getattr(module, "POOLS", True)),
        Option(
            ["--seed"],
            group=HelpGroup.RUNNING,
            type=SEED,
            default=0,
            show_default=True,
            help="Of splits, views and heads.",
        ),
    ]


def _pictures(*, trains: bool) -> list[click.Parameter]:
    """Return the options that name training and test pictures."""
    default = "a fifth of --images, held out" if trains else "all of --images"
    few = [
        Option(
            ["--shots"],
            group=HelpGroup.PICTURES,
            type=click.IntRange(1, 10**6),
            help="Train on so many pictures a class.",
        ),
        Option(
            ["--fraction"],
            group=HelpGroup.PICTURES,
            type=FiniteRange(0, 1, min_open=True),
            help="Train on this share of each class, such as 0.01.",
        ),
    ]
    return [
        *picture_options(
            "images_spec",
            group=HelpGroup.PICTURES,
            help="Labelled pictures: class folders, tars with .cls, parquet or .beton. [default: "
            "$FEATCACHE_IMAGES]",
        ),
        Option(
            ["--test", "tests"],
            group=HelpGroup.PICTURES,
            type=PicturesText(),
            multiple=True,
            metavar="[NAME=]SPEC",
            help=f"Labelled test pictures; may be repeated. [default: {default}]",
        ),
        Option(
            ["--subset", "subsets"],
            group=HelpGroup.PICTURES,
            multiple=True,
            metavar="NAME[=FILE]",
            help="On the test set NAME choose only among the classes that it has, or those of "
            "FILE, one a line (ImageNet-A, -R).",
        ),
        Option(
            ["--class-map", "maps"],
            group=HelpGroup.PICTURES,
            multiple=True,
            metavar="NAME=FILE",
            help="JSON object from training class to class of the test set NAME (ImageNet-9).",
        ),
        *(few if trains else ()),
    ]


def _own(module: Any) -> list[click.Parameter]:
    """Return the options that a protocol alone has."""
    return [
        Option(
            [f"--{key.replace('_', '-')}", key],
            group=HelpGroup.PROTOCOL,
            default=default,
            show_default=default not in (None, ""),
            help=_sentence(text),
            type=_KINDS.get(type(default), type(default)),
        )
        for key, (default, text) in module.OPTIONS.items()
    ]


def _sentence(text: str) -> str:
    """Return a protocol's text of an option as help has them.

    >>> _sentence("heads of the attention [default: 12]"), _sentence("a FILE.")
    ('Heads of the attention. [default: 12]', 'A FILE.')
    """
    said, bracket, default = text.partition(" [")
    return f"{said[0].upper()}{said[1:].rstrip('.')}.{bracket}{default}"
