"""Imports, command lines and entry points stay: other people's code and scripts rely on them.

`golden/command_lines.json` lists every option of version 0.1 with its kind and its default; it was
written from that version's own commands. Options may be added, none may go or change. Written by
hand since: `--sampling` has no one default, which is random for a cache on disk, as it was.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

import featcache.cli
import student.cli

LINES = json.loads((Path(__file__).parent / "golden/command_lines.json").read_text())
PROGRAMS = {"featcache": featcache.cli.cli, "student": student.cli.cli}

IMPORTS = {
    "featcache": ["open", "Cache", "IdentityError", "StoppedError", "UsageError", "UserError"],
    "featcache.errors": [
        "COMMAND_WRONG", "STOPPED", "WORK_FAILED", "IdentityError", "StoppedError",
        "UnreadableError", "UsageError", "UserError", "near",
    ],
    "featcache.torch": ["Dataset"],
    "featcache.derive": ["target", "read"],
    "featcache.joining": ["pair"],
    "featcache.teachers": [
        "REGISTERED", "Option", "Row", "Tap", "Teacher", "Tokenizer", "build", "family", "fetch",
        "file_weights", "is_random", "is_tokenizer", "load", "load_state", "load_tokenizer",
        "modules", "parse_options", "pixels", "read_state", "rows", "split", "weight_hash",
    ],
    "student.recipes": ["TargetSpec", "load", "names"],
    "student.checkpoint": ["load_encoder"],
    "student.config": [
        "CHECKED", "OutputConfig", "RecipeConfig", "as_dict", "check_choice",
        "check_hides_patches", "from_overrides",
    ],
    "student.masking": [
        "attentive", "blockwise", "draw", "fields", "kept_count", "split", "stored", "topk",
        "uniform",
    ],
}  # fmt: skip


@pytest.mark.parametrize("module", IMPORTS)
def test_public_imports(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in IMPORTS[module] if not hasattr(found, name)] == []


def test_the_cache_of_the_package_is_the_readers() -> None:
    from featcache.reading.cache import Cache

    assert featcache.Cache is Cache


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by its whole name."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def described(param: click.Parameter) -> tuple[str, str]:
    """A parameter's name, and its kind and default as the golden file has them."""
    if isinstance(param, click.Argument):
        many, optional = "s" * (param.nargs != 1), ", optional" * (not param.required)
        return str(param.name).upper(), f"argument{many}{optional}"
    assert isinstance(param, click.Option)
    kind = "flag" if param.is_flag else "values" if param.multiple else "value"
    default = list(param.default) if isinstance(param.default, tuple) else param.default
    if param.name == "workers" or default in (None, [], False) or "Sentinel" in repr(default):
        default = None  # the workers' is the number of cores
    name = max(param.opts, key=len)
    names = sorted([*param.opts, *param.secondary_opts])
    more = "" if len(names) == 1 else f", {' '.join(names)}"
    return name, kind + ("" if default is None else f", default {json.dumps(default)}") + more


@pytest.mark.parametrize("line", LINES)
def test_command_lines(line: str) -> None:
    program = line.split()[0]
    found = dict(commands(PROGRAMS[program], program))
    assert line in found
    here = dict(described(param) for param in found[line].params)
    assert {name: here.get(name) for name in LINES[line]} == LINES[line]


def test_entry_points() -> None:
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert scripts["featcache"] == "featcache.__main__:main"
    assert scripts["student"] == "student.__main__:main"
    assert "student.recipes" in {p.value for p in entry_points(group="featcache.recipes")}
