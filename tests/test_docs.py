"""The README names every command, teacher, recipe, eval and source file, and says only what
exists."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from featcache import cli as featcache_cli
from featcache import teachers
from featcache.storage import store
from featcache.targets import codecs
from student import cli as student_cli
from student import evals, masking, recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))

PROGRAMS = {"featcache": featcache_cli.cli, "student": student_cli.cli}


def _names(program: str) -> list[str]:
    return PROGRAMS[program].list_commands(click.Context(PROGRAMS[program]))


def _command(program: str, name: str) -> click.Command:
    command = PROGRAMS[program].get_command(click.Context(PROGRAMS[program]), name)
    assert command is not None, f"{program} {name}"
    return command


def _options(command: click.Command) -> set[str]:
    """The options of a command, and of those below it."""
    own = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            own |= _options(below)
    return own


@pytest.mark.parametrize(
    "command", [f"{program} {name}" for program in PROGRAMS for name in _names(program)]
)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"`{command}`" in README


@pytest.mark.parametrize("name", [*teachers.model_cards(), *recipes.names(), *evals.names()])
def test_every_teacher_recipe_and_eval_is_in_the_readme(name: str) -> None:
    assert f"`{name}`" in README


def test_the_readme_names_no_command_that_does_not_exist() -> None:
    for program, command in re.findall(r"`(featcache|student) ([a-z_]+)", README):
        assert command in _names(program), f"{program} {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_commands_options_and_links_that_exist(page: Path) -> None:
    text = page.read_text()
    for program, name, rest in re.findall(r"`(featcache|student) ([a-z_]+)([^`]*)`", text):
        assert name in _names(program), f"{program} {name}"
        options = _options(_command(program, name))
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, (program, name, rest)
    every = {
        opt
        for program in PROGRAMS
        for name in _names(program)
        for opt in _options(_command(program, name))
    }
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= every
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in PAGES if f"(docs/{page.name})" not in README] == []
    assert PAGES


def file_map() -> dict[str, set[str]]:
    """Each folder of README's map and the words of its lines."""
    block = README.split("## Where things are")[1].split("```")[1]
    found: dict[str, set[str]] = {}
    package = folder = ""
    for line in block.strip().splitlines():
        if match := re.match(r"(  )?(\w+)/ +", line):
            package = package if match[1] else match[2]
            folder = f"{package}/{match[2]}" if match[1] else match[2]
        elif re.match(r" {15}\S", line):
            folder = package  # a file that lies on top of its package, between two folders
        found.setdefault(folder, set()).update(re.findall(r"\w+", line))
    return found


FOLDERS = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("featcache", "student", "pipelines")
    for path in (ROOT / package, *(ROOT / package).iterdir())
    if (path / "__init__.py").is_file()
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_source_file_is_in_the_file_map(folder: str) -> None:
    stems = {path.stem for path in (ROOT / folder).glob("*.py")}
    assert {stem for stem in stems if not stem.startswith("__")} <= file_map()[folder]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_file_map_names_no_file_that_does_not_exist(folder: str) -> None:
    words = {word for word in file_map()[folder] if "_" in word}
    assert words <= {path.stem for path in (ROOT / folder).glob("*.py")}


def test_every_option_of_the_readme_exists() -> None:
    commands = "|".join(sorted({name for program in PROGRAMS for name in _names(program)}))
    for program, command, rest in re.findall(
        rf"^(featcache|student) ({commands}) (.*)$", README, re.M
    ):
        if command == "eval":  # its evals have options of their own
            continue
        options = {opt for param in _command(program, command).params for opt in param.opts}
        for option in re.findall(r"(--[a-z-]+)", rest):
            assert option in options, (program, command, option)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_help_with_an_example(program: str) -> None:
    for name in _names(program):
        command = _command(program, name)
        subcommands = (
            [
                command.get_command(click.Context(command), sub)
                for sub in command.list_commands(click.Context(command))
            ]
            if isinstance(command, click.Group)
            else [command]
        )
        for each in subcommands:
            assert each is not None
            assert each.help, name
            assert "Example" in (each.epilog or ""), name
            assert all(
                param.help
                for param in each.params
                if isinstance(param, click.Option) and not _plain(param)
            )


def _plain(option: click.Option) -> bool:
    """Options whose name and type say all: --store zarr, --rows-per-shard, ..."""
    return option.name in {"rows_per_shard", "store_name", "seed", "crop_pct", "embed_batch"}


def test_dictionaries_of_the_seams_hold_what_the_readme_says() -> None:
    assert set(codecs.CODECS) == {"fp16", "q8", "t4", "t3"}
    assert set(store.STORES) == {"zarr", "webdataset"}
    assert {"uniform", "attentive", "stored"} <= set(masking.MASKS)
