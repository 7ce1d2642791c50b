"""The `featcache extract` command that would make what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from featcache.catalog import extract_command
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.views import pixel_path
from featcache.views.policy import Policy
from student.config import RecipeConfig
from student.recipes import TargetSpec
from student.setup.missing import missing_levels, missing_tokens, second_keeps_few, second_missing


def extract_remedy(
    spec: TargetSpec, config: RecipeConfig, cache: Cache | None, source: Source | None = None
) -> str:
    """The exact extract command that makes what is missing: an incomplete cache is finished in its
    place, missing levels are added to it, and for the rest another is made."""
    if cache is None:
        levels = extract_command.format_levels(spec.levels, config.teacher_depth)
        facts = ["--teacher", config.teacher, "--levels", levels]
        size = [] if config.img_size == Policy().size else ["--size", str(config.img_size)]
        others = [word for name in _others(spec.fields) for word in ("--teacher", name)]
        decoder = pixel_path.pixel_path(source)["decoder"] if source else "pillow"
        path = [] if decoder == "pillow" else ["--decoder", decoder]
        command = [
            *facts,
            *size,
            *_crops(spec),
            *others,
            *path,
            "--images",
            source.spec if source else "SRC",
        ]
    elif not cache.complete:
        command = [*extract_command.extract_options(cache.manifest), "--out", str(cache.path)]
    elif names := _others(field for field in spec.fields if field not in cache.fields):
        command = ["--teacher", names[0], *_last_level(spec, names[0]), *_same_views(cache)]
        command += ["--add", "--out", str(cache.path)]
    elif second_keeps_few(cache, spec):
        command = [
            *extract_command.extract_options(cache.manifest, keep=False),
            "--teacher",
            spec.second,
        ]
    elif second_missing(cache, spec):
        command = ["--teacher", spec.second, *_last_level(spec, spec.second), *_same_views(cache)]
        command += ["--add", "--out", str(cache.path)]
    elif missing_tokens(cache, spec, config) or any(
        field not in cache.fields for field in spec.fields
    ):
        wanted = sorted({*cache.levels, *spec.levels})
        command = extract_command.extract_options(cache.manifest, wanted, cache.views, keep=False)
    else:
        command = extract_command.extract_options(
            cache.manifest, missing_levels(cache, spec), cache.views
        )
        command += ["--add", "--out", str(cache.path)]
    return f"make it with: {extract_command.shell_line(command)}"


def _others(fields: Iterable[str]) -> list[str]:
    """Which other teachers' arrays are asked for: NAME of NAME/token_ids and NAME/features."""
    return [field.rpartition("/")[0] for field in fields if "/" in field]


def _last_level(spec: TargetSpec, name: str) -> list[str]:
    """The option for a second teacher of features; a tokenizer has one level."""
    return ["--levels", "last:1"] if name == spec.second else []


def _same_views(cache: Cache) -> list[str]:
    """The options that another teacher over a cache's views shares with it."""
    own = {
        "teacher",
        "levels",
        "weights",
        "order",
        "codec",
        "tokens",
        "keep",
        "pixels",
        "precision",
        "batch-size",
    }
    words = [
        word for word in extract_command.extract_options(cache.manifest) if word != "--compile"
    ]
    pairs = zip(words[::2], words[1::2], strict=True)
    return [
        word for key, value in pairs if key.removeprefix("--") not in own for word in (key, value)
    ]


def _crops(spec: TargetSpec) -> list[str]:
    """The options of a publication's crops, where they are not the usual ones."""
    scale = (
        []
        if spec.scale == Policy().scale
        else ["--scale", ",".join(f"{end:g}" for end in spec.scale)]
    )
    return [*scale, *([] if spec.jitter == Policy().jitter else ["--jitter", f"{spec.jitter:g}"])]
