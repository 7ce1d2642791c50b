"""The documentation names every command, teacher, recipe, eval and source file, says only what
exists, and each of its command lines is one that the programs take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
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
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = README + "".join(page.read_text() for page in PAGES)  # by hand: the rest is generated
MOST_LINES = 110  # of README: one screen, and what lies below it

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


def test_the_readme_is_one_screen_with_its_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if line.startswith("make ")] == ["make quickstart", "make test"]


@pytest.mark.parametrize(
    "command", [f"{program} {name}" for program in PROGRAMS for name in _names(program)]
)
def test_every_command_is_in_a_page(command: str) -> None:
    assert re.search(rf"(`|^ *){command}\b", WRITTEN, re.M)


@pytest.mark.parametrize("name", teachers.model_cards())
def test_every_teacher_is_in_its_page(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs/guides/teachers.md").read_text()


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_in_its_page(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/guides/recipes.md").read_text()


@pytest.mark.parametrize("name", evals.names())
def test_every_eval_is_in_its_page(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/judging.md").read_text()


@pytest.mark.parametrize("name", masking.MASKS)
def test_every_mask_is_in_its_page(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "docs/guides/recipes.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
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
    generated = {f"reference/{name}.md" for name in ("featcache", "student", *GENERATED)}
    for target in re.findall(r"\]\(([^)#]+)", text):
        path = (page.parent / target).resolve()
        within = path.is_relative_to(ROOT / "docs")
        is_generated = within and path.relative_to(ROOT / "docs").as_posix() in generated
        assert path.exists() or is_generated, target


GENERATED = ("teachers", "recipes", "evals")


def test_the_readme_leads_to_every_guide() -> None:
    """Or to the site's home, whose navigation has all pages: building it tells which it lacks."""
    assert [page for page in LINKED_FROM_README if f"(docs/{page})" not in README] == []


LINKED_FROM_README = [
    "quickstart.md", "concepts.md", "faq.md", "when-it-pays.md", "guides/own-pictures.md",
    "guides/teachers.md", "guides/recipes.md", "guides/many-processes.md", "guides/training.md",
    "guides/own-trainer.md", "judging.md", "comparing.md", "exporting.md", "trust.md", "format.md",
    "architecture.md", "extending.md",
]  # fmt: skip


# --- command lines --------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Each line of a page's code that calls one of the programs, continued lines joined."""
    fenced = re.findall(r"^```(?:|bash|sh|console)\n(.*?)^```$", text, re.M | re.S)
    indented = re.findall(r"(?:^    .*\n)+", text, re.M)
    for block in (*fenced, *indented):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ")
            words = re.sub(r"^(?:accelerate launch|torchrun) .*?-m (student)", r"\1", words)
            words = re.sub(r"^sbatch .*/extract.sbatch", "featcache extract", words)
            words = re.sub(r"^sbatch .*/train.sbatch", "student train", words)
            if re.match(r"(featcache|student) [a-z]", words):
                yield words


LINES = [
    pytest.param(line, id=f"{page.stem}:{line[:60]}")
    for page in (ROOT / "README.md", *PAGES)
    for line in command_lines(page.read_text())
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_one_that_the_program_takes(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no object store is asked
    monkeypatch.setattr("featcache.console.params.mount", lambda url: Path(str(url)))
    parse_line(line)


def parse_line(line: str) -> None:
    """Its options are there, and their values of the right kind; `...` stands for others."""
    words = shlex.split(line.partition(" && ")[0].partition(" > ")[0], comments=True)
    command: click.Command = PROGRAMS[words.pop(0)]
    # with the names of its help option, which a command keeps from the first context it meets
    context = click.Context(command, **command.context_settings)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command, context = found, click.Context(found, parent=context)
    args = ["1" if word.startswith("$") else word for word in words if word != "..."]
    values, _, _ = command.make_parser(context).parse_args(list(args))
    for param in command.params:
        value = values.get(param.name)
        if isinstance(param, click.Option) and not param.is_flag and _is_literal(value):
            param.type_cast_value(context, value)


def _is_literal(value: object) -> bool:
    """Tell a value from a placeholder, such as N, STEP or LOW,HIGH."""
    return isinstance(value, str | list) and not re.fullmatch(r"[A-Z_,/.]+", str(value))


def test_command_lines_are_found_and_wrong_ones_are_noticed() -> None:
    page = "```\nfeatcache ls\n$ student runs \\\n  --json\n```\n\n"
    page += "    accelerate launch -m student train --resume\n"
    page += "    torchrun --nnodes 2 -m student train --resume\n"
    page += "    sbatch --array 0-3 pipelines/slurm/extract.sbatch --out CACHE\n"
    assert list(command_lines(page)) == [
        "featcache ls", "student runs    --json",
        "student train --resume", "student train --resume",
        "featcache extract --out CACHE",
    ]  # fmt: skip
    with pytest.raises(click.UsageError):
        parse_line("featcache ls --no-such-option")
    with pytest.raises(click.UsageError):
        parse_line("student train --steps many")
    assert len(LINES) > 40


# --- the map of files -----------------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def file_map() -> dict[str, set[str]]:
    """Each folder of the map and the words of its lines."""
    block = ARCHITECTURE.split("```")[1]
    found: dict[str, set[str]] = {}
    folders: list[str] = []
    folder = ""
    for line in block.strip().splitlines():
        if match := re.match(r"((?:  )*)(\w+)/ +", line):
            folders = [*folders[: len(match[1]) // 2], match[2]]
            folder = "/".join(folders)
        elif re.match(r" {15}\S", line):
            folder = folders[0]  # a file that lies on top of its package, between two folders
        found.setdefault(folder, set()).update(re.findall(r"\w+", line))
    return found


FOLDERS = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("featcache", "student", "pipelines")
    for path in (ROOT / package, *(ROOT / package).rglob("*"))
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


@pytest.mark.parametrize("package", ["student", "featcache"])
def test_the_drawing_has_the_layers_that_are_checked(package: str) -> None:
    contract = (ROOT / ".importlinter").read_text().split(f"containers = {package}\n")[1]
    layers = contract.split("layers =\n")[1].split("\n\n")[0].splitlines()
    there = [
        [name for name in re.findall(r"\w+", line) if _exists(package, name)] for line in layers
    ]
    drawing = (ROOT / "docs/img/layers.svg").read_text()
    kind = package[0]  # the class of its boxes
    drawn = re.findall(rf'class="{kind}".*?<text class="t"[^>]*>([^<]*)<', drawing)
    assert [line.split(" · ") for line in drawn] == there


def _exists(package: str, name: str) -> bool:
    path = ROOT / package / name
    return path.is_dir() or path.with_suffix(".py").is_file()
