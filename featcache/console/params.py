"""Options and variables are read that several commands share: two numbers as one option, such as
--scale 0.2,1 or --ratio 3/4,4/3, finite numbers, seeds, paths and the pictures."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import click

from featcache.errors import UsageError, near, short
from featcache.objects.url import ObjectUrl, is_object_url
from featcache.objects.url import parse as parse_url
from featcache.pictures.patterns import expand_braces
from featcache.pictures.source import ALLOWED
from featcache.pictures.spec import SEPARATOR, parse_spec, split_sources
from featcache.runtime.local_path import local_path
from featcache.runtime.numbers import MOST_COUNTED, parse_range
from featcache.storage.mount import mount


class FloatPair(click.ParamType):
    """One option takes two numbers parted by a comma, fractions allowed: 0.2,1 or 3/4,4/3."""

    name = "LOW,HIGH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        try:
            low, high = (_number(part) for part in str(value).split(","))
        except (ValueError, ZeroDivisionError):
            self.fail(
                f"{value!r} given; two numbers parted by a comma are needed, such as 0.2,1 or "
                "3/4,4/3",
                param,
                ctx,
            )
        return low, high


class Choice(click.Choice[str]):
    """One option takes a word of a closed set, and proposes near ones."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            self.fail(f"{short(value)} given; {near(str(value), self.choices)}", param, ctx)
        return str(value)


class FiniteRange(click.FloatRange):
    """One option takes a finite number of a range: NaN passes every comparison."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class CountOrAuto(click.ParamType):
    """One option takes a number of at least 1, or `auto`: what fits is chosen."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(COUNT.convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"{short(value)} given; auto, or 1 to {COUNT.max} is allowed", param, ctx)


class CountRange(click.ParamType):
    """One option takes a number of at least 1, or the least and the most: 4, 2:8 or 2:."""

    name = "MIN:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_range(str(value))
        except ValueError:
            self.fail(
                f"{short(value)} given; N, or MIN:MAX is needed, from 1 to {MOST_COUNTED} and MIN "
                "no more than MAX, such as 2:8; 2: has no MAX",
                param,
                ctx,
            )
        return str(value)


class ByteSize(click.ParamType):
    """One option takes a number of bytes, with a unit: 200GB, 1.5TiB, 500 MB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        match = _SIZE.fullmatch(str(value).strip())
        size = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if size < 1:
            self.fail(
                f"{short(value)} given; a size is needed, such as 200GB or 1.5TiB", param, ctx
            )
        return size


_UNITS = {"": 1, "B": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("KMGTP", 1)
    for unit, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?((?:[KMGTP]i?)?B|)", re.IGNORECASE)

# closed sets of modules that import torch, which no help waits for
MASK_ORDERS = ("attentive", "topk", "uniform")
TOKEN_ORDERS = ("raster", "ranked")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # of a teacher
ENGINES = ("local", "ray")  # of an extraction; each but the first is a file of extraction/

SEED = click.IntRange(0, 2**63 - 1)  # what a view policy allows, and torch's generator takes
# more is a mistake, of which memory, or the disk, would tell late
COUNT = click.IntRange(1, 10**9)
BATCH = click.IntRange(1, 65536)
THREADS = click.IntRange(1, 4096)
MIN_GPU = 0.01  # of a GPU that several processes share
CROP_SHARE = FiniteRange(0.05, 1)  # below it pictures would be enlarged to gigabytes


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom or 1)


class LocalPath(click.Path):
    """One option takes the path of a file or folder of this machine."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_checked(value, param), param, ctx)


class CachePath(LocalPath):
    """One option takes the path of a cache, or its URL in an object store, which is mounted."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_object_url(value):
            return mount(parse_url(value))
        return super().convert(value, param, ctx)


class ObjectPath(click.ParamType):
    """One option takes the URL of a cache in an object store, which is mounted."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return mount(parse_url(str(value)))


class ObjectPlace(click.ParamType):
    """One option takes the URL of a place in an object store."""

    name = "URL"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> ObjectUrl:
        return value if isinstance(value, ObjectUrl) else parse_url(str(value))


class LocalText(click.types.StringParamType):
    """One option takes a name, or something that begins with a path of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_checked(value, param) if value else value, param, ctx)


class PicturesText(LocalText):
    """One option names pictures, on this machine or as tars in an object store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = [self._convert(each, param, ctx) for each in split_sources(value)]
        return found[0] if len(found) == 1 else SEPARATOR.join(found)

    def _convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not is_object_url(value):
            return super().convert(value, param, ctx)
        parse_url(expand_braces(parse_spec(value).path)[0])
        return value


def _checked(value: Any, param: click.Parameter | None) -> Any:
    if not isinstance(value, str):
        return value
    if isinstance(param, click.Option):
        return local_path(value, param.opts[0])
    return local_path(value, param.human_readable_name.rstrip(".") if param else "path")


def images_variable() -> str | None:
    """Return FEATCACHE_IMAGES; None where it is not set, or is empty."""
    spec = os.environ.get("FEATCACHE_IMAGES")
    if not spec or is_object_url(spec):
        return spec or None
    return local_path(spec, "FEATCACHE_IMAGES")


def require_images(spec: str | None) -> str:
    """Return --images, or FEATCACHE_IMAGES; UsageError says what may be given."""
    spec = spec or images_variable()
    if not spec:
        raise UsageError(
            f"no pictures given: --images SRC is {ALLOWED}; FEATCACHE_IMAGES sets a default"
        )
    return spec
