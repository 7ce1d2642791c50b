"""What `featcache extract --append` is not told is as in the cache that is appended to.

The options of the extraction are rebuilt from the manifest, as text, and read as if they were
typed. A cache names data, but no code: the teacher that it records is one of a library's list.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from featcache.catalog import extract_command
from featcache.console import config_file, extract_parameters
from featcache.console.config_text import default, key
from featcache.console.extract_options import ExtractOptions
from featcache.errors import UsageError, UserError
from featcache.storage import manifest

# how the work is done and told: never of a cache
_OWN = frozenset(
    ["images_spec", "labels", "image_member", "out", "append", "add", "recipes", "labelled"]
).union(
    ["policy_name", "batch_size", "workers", "device", "devices", "share", "strict", "dry_run"],
    ["engine", "address", "actors", "gpus_per_actor"],
    ["as_json"],
)


def with_options_of_cache(options: ExtractOptions) -> ExtractOptions:
    """Return the options with those of the cache at --out where they are left to their defaults.
    Raises UsageError for options that --append does not go with."""
    out = _checked(options)
    there = manifest.read(out)
    parameters = {str(each.name): each for each in extract_parameters.parameters()}
    recorded = _recorded(out, there, options, list(parameters.values()))
    changes = {
        name: value
        for name, value in recorded.items()
        if name not in _OWN and not _is_given(parameters[name], options)
    }
    if options.policy_name != default(parameters["policy_name"]):
        fields = ("size", "scale", "ratio", "filter_name", "flip", "jitter", "seed")
        changes = {name: value for name, value in changes.items() if name not in fields}
    return replace(options, **changes)


def _checked(options: ExtractOptions) -> Path:
    rivals = {"--add": options.add, "--for": options.recipes}
    if given := [option for option, value in rivals.items() if value]:
        raise UsageError(
            f"--append and {given[0]} do not go together: --append brings new pictures, and all "
            f"else is as in the cache; leave {given[0]} out"
        )
    if options.out is None:
        raise UsageError("--append appends to a cache: name it with --out CACHE")
    if len(options.names) > 1:
        raise UsageError(
            f"--append: {len(options.names)} teachers are given, and a cache that is appended to "
            "has one; leave --teacher out"
        )
    return options.out


def _recorded(
    out: Path, there: dict[str, Any], options: ExtractOptions, parameters: list[click.Parameter]
) -> dict[str, Any]:
    """Read the options that the manifest of a cache stands for, by click's names."""
    from featcache import teachers

    name = there["identity"]["teacher"]["name"]
    named = options.names or ()
    spec = name if named else teachers.recorded_spec(name, (), f"cache {str(out)!r}", "--teacher")
    words = extract_command.extract_options(there)
    words[words.index("--teacher") + 1] = spec
    at = words.index("--images")
    del words[at : at + 2]
    try:
        return click.Command("extract", params=parameters).make_context("extract", words).params
    except click.ClickException as error:
        raise UserError(
            f"--append: cache {str(out)!r} was extracted with options that this version does not "
            f"take: {error.format_message()}; append with the version that wrote it"
        ) from None


def _is_given(param: click.Parameter, options: ExtractOptions) -> bool:
    """Whether an option was said: on the command line known as such, elsewhere by its value."""
    typed = config_file.given_options()
    if typed is not None and key(param) in typed:
        return True
    value = getattr(options, str(param.name))
    return bool(value != default(param) and value != ())
