"""The words of a command line become the jobs of an extraction, in whatever process they are
carried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from featcache.api.begun_cache import with_shards
from featcache.catalog import home
from featcache.console import extract_parameters, picture_options
from featcache.console.extract_options import ExtractOptions, build_plans
from featcache.errors import UsageError

if TYPE_CHECKING:
    from featcache.extraction.plan import ExtractJob, Plan


def plan_jobs(plans: list[Plan], options: ExtractOptions) -> list[ExtractJob]:
    """Return what is to be extracted and the folders it goes to; nothing where there is nothing to
    add."""
    from featcache.extraction import append, extend
    from featcache.extraction.options import file_name

    if options.append and options.out is not None:
        return [append.plan_append(plans[0], options.out)]
    if options.add and options.out is None:
        raise UsageError("--add adds to a cache: name it with --out CACHE")
    name = f"{file_name(plans[0].teacher.name)}-{plans[0].manifest()['id'][:8]}"
    return extend.plan_jobs(plans, options.out or home.home() / name, add=options.add)


def plan_again(words: Sequence[str]) -> list[ExtractJob]:
    """Load the teachers that the words of a command line name, and plan its extraction. An actor of
    a cluster calls it; what is to be told of the plans, the first process has told."""
    from featcache.models.precision import keep_freed_memory

    keep_freed_memory()
    options = read_words(words)
    plans, _ = build_plans(options, _be_silent)
    if options.rows_per_shard == "auto":
        plans = with_shards(plans, options.out)
    return plan_jobs(plans, options)


def read_words(words: Sequence[str]) -> ExtractOptions:
    """Read the options of a command line as the command does."""
    parameters = extract_parameters.parameters()
    command = click.Command("extract", params=list(parameters))
    context = command.make_context("extract", list(words))
    return ExtractOptions(**picture_options.joined(parameters, context.params))


_be_silent: Callable[[str], None] = lambda text: None  # noqa: E731
