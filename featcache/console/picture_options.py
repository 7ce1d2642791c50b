"""The option --images names pictures; --labels and --image-member beside it say how they are read.

    --images val.tar --labels val.csv     is     --images val.tar#labels=val.csv

All three are declared at once, and are one text before a command's own function, or a Python call,
sees them: what is recorded is the same either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from featcache.console.option import HelpGroup, Option
from featcache.console.params import LocalText, PicturesText, images_variable
from featcache.errors import UsageError
from featcache.pictures import spec

_Function = TypeVar("_Function", bound=Callable[..., Any])


class ImagesOption(Option):
    """The option --images; `variable`: without it the pictures are those of FEATCACHE_IMAGES."""

    def __init__(self, *args: Any, variable: bool, **attrs: Any) -> None:
        super().__init__(*args, type=PicturesText(), **attrs)
        self.variable = variable


class PartOption(Option):
    """An option that is a part of the text of --images."""


def picture_options(
    name: str, *, group: HelpGroup, help: str, variable: bool = True
) -> list[click.Parameter]:
    """Return --images, as click's parameter `name`, and the options of how its pictures are
    read."""
    return [
        ImagesOption(["--images", name], group=group, metavar="SRC", variable=variable, help=help),
        PartOption(
            ["--labels"],
            group=group,
            type=LocalText(),
            metavar="FILE|prefix",
            help="In place of #labels= in --images: a CSV table of key and class, or prefix, the "
            "first part of each key. [default: the source's own labels]",
        ),
        PartOption(
            ["--image-member"],
            group=group,
            metavar="SUFFIX",
            help="In place of #image-member= in --images: of each sample in tars the member "
            "KEY.SUFFIX, such as seg.png. [default: the plain picture]",
        ),
    ]


def with_pictures(
    name: str, *, group: HelpGroup, help: str, variable: bool = True
) -> Callable[[_Function], _Function]:
    """Return the decorator that gives a command's function the options of `picture_options`."""

    def decorate(function: _Function) -> _Function:
        found = picture_options(name, group=group, help=help, variable=variable)
        for param in reversed(found):  # as click's own decorators, the last one first
            function.__dict__.setdefault("__click_params__", []).append(param)
        return function

    return decorate


def joined(parameters: Sequence[click.Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, by click's names, with the parts in the text of --images. Raises
    UsageError where there is no such text, or it has the part itself."""
    names = {spec_name(param): str(param.name) for param in parameters if _is_part(param)}
    given = {part: values[name] for part, name in names.items() if values[name] is not None}
    left = {name: value for name, value in values.items() if name not in names.values()}
    if not given:
        return left
    images = next(param for param in parameters if isinstance(param, ImagesOption))
    text = left[str(images.name)] or (images_variable() if images.variable else None)
    if not text:
        options = " ".join(f"--{part} {value}" for part, value in given.items())
        raise UsageError(
            f"{options} says how --images is read, which is not given; give --images SRC too, or "
            "leave it out"
        )
    return {**left, str(images.name): spec.with_parts(text, given)}


def wrapped(
    callback: Callable[..., Any], parameters: Sequence[click.Parameter]
) -> Callable[..., Any]:
    """Return a command's function, called with the parts in the text of --images."""

    @functools.wraps(callback)
    def call(*args: Any, **given: Any) -> Any:
        return callback(*args, **joined(parameters, given))

    return call if any(map(_is_part, parameters)) else callback


def spec_name(param: click.Parameter) -> str:
    """Return the name of a part, as a spec has it."""
    return param.opts[0].removeprefix("--")


def _is_part(param: click.Parameter) -> bool:
    return isinstance(param, PartOption)
