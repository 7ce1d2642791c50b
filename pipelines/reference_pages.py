"""The documentation's reference pages are generated as the site is built: from the registries of
teachers, recipes and protocols, the commands, and files that lie outside docs/.

MkDocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`). What is generated is never
committed, so that it cannot be out of date.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.console.command import examples, option_groups

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# files beside docs/ that become pages of the site; links to them are turned there
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/notebook.py": "examples/notebook.md",
    "examples/plain_pytorch.py": "examples/plain_pytorch.md",
    "benchmarks/bench_foreign.py": "examples/bench_foreign.md",
}
MOST_COLUMNS = 110  # of a command line
WIDE = "---\nhide: [toc]\n---\n"  # the column of headings gives its room to the page
_LINK = re.compile(r"\]\((?:\.\./)*([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files beside docs/ to the pages that they become."""
    up = "../" * page.file.src_uri.count("/")

    def turned(match: re.Match[str]) -> str:
        name = OUTSIDE.get(match[1])
        if page.file.src_uri in OUTSIDE.values() and match[1].startswith("docs/"):
            name = match[1].removeprefix("docs/")
        return f"]({up}{name}" if name else match[0]

    return _LINK.sub(turned, markdown)


def pages() -> dict[str, str]:
    """Return every generated page: its path on the site and its Markdown."""
    found = {
        "reference/teachers.md": teachers_page(),
        "reference/recipes.md": recipes_page(),
        "reference/evals.md": evals_page(),
        "reference/featcache.md": commands_page("featcache"),
        "reference/student.md": commands_page("student"),
    }
    for source, name in OUTSIDE.items():
        text = (ROOT / source).read_text()
        title = Path(source).name
        found[name] = text if source.endswith(".md") else f"# {title}\n\n{_fence(text, 'python')}"
    return found


# --- the registries -------------------------------------------------------------------------------


def teachers_page() -> str:
    """Return the teachers that are known by name, with sizes, cost and licence."""
    from featcache import teachers

    rows = [
        (
            f"`{name}`", _cell(card.source), card.input_px or "", card.patches or "",
            card.width or "", card.depth or "", f"{card.params / 1e6:.0f}" if card.params else "",
            f"{card.gmac:.1f}" if card.gmac else "", _cell(card.licence),
        )
        for name, card in teachers.model_cards().items()
    ]  # fmt: skip
    head = (
        "name",
        "network",
        "pixels",
        "patches",
        "width",
        "blocks",
        "M parameters",
        "GMAC",
        "licence",
    )
    intro = (
        "Teachers known by name, as `featcache teachers` lists them. Pixels are the side of a "
        "view, GMAC the multiply-accumulates of one. How other networks are named, and what their "
        "options mean, is on the page about [choosing a teacher](../guides/teachers.md)."
    )
    return f"{WIDE}# Teachers\n\n{intro}\n\n{table(head, rows)}\n"


def recipes_page() -> str:
    """Return each recipe's paper trail and its settings."""
    from student import config, recipes, setting_help

    parts = [
        f"{WIDE}# Recipes",
        "What each recipe is, in its own words, and its settings with their defaults, as "
        "`student recipes NAME` prints them. `--set key=value` changes one.",
        " · ".join(f"[{name}](#{name})" for name in recipes.names()),
    ]
    for name in recipes.names():
        module = recipes.load(name)
        described = setting_help.describe(config.from_overrides(module.Config, ()))
        rows = [
            (
                f"`{each.key}`", f"`{json.dumps(each.value)}`", _cell(each.type),
                _cell(each.allowed), _cell(each.help),
            )
            for each in described
        ]  # fmt: skip
        title, _, rest = (module.__doc__ or "").strip().partition("\n")
        parts += [
            f"## `{name}`", _cell(title), _fence(rest.strip("\n"), "text"),
            table(("setting", "default", "type", "allowed", "meaning"), rows),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def evals_page() -> str:
    """Return each protocol of `student eval` with its options and published settings."""
    from student import evals

    parts = [
        "# Evaluation protocols",
        "The protocols of `student eval`. [Judging a student](../judging.md) says when to take "
        "which.",
    ]
    for name in evals.names():
        module = evals.load(name)
        parts += [f"## `{name}`", (module.__doc__ or "").strip()]
        if options := getattr(module, "OPTIONS", None):
            rows = [
                (f"`--{key.replace('_', '-')}`", _default(value), _cell(text))
                for key, (value, text) in options.items()
            ]
            parts.append(table(("option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _default(value: Any) -> str:
    return "" if value in (None, "") else f"`{value}`"


# --- the commands ---------------------------------------------------------------------------------
# mkdocs-click 0.9 calls every command by its function's name and shows click 8.3's unset defaults.


def commands_page(program: str) -> str:
    """Return the help of each command of a program: text, usage, options and examples."""
    group = _program(program)
    context = click.Context(group, info_name=program, **group.context_settings)
    parts = [f"# {program}", _text(group.help)]
    for name in group.list_commands(context):
        parts += _command(group.get_command(context, name), f"{program} {name}", context, 2)
    return "\n\n".join(part for part in parts if part) + "\n"


def _program(name: str) -> click.Group:
    from featcache import cli as featcache_cli
    from student import cli as student_cli

    return {"featcache": featcache_cli.cli, "student": student_cli.cli}[name]


def _command(
    command: click.Command | None, path: str, parent: click.Context, depth: int
) -> list[str]:
    """Return the parts of a command's section, and of the commands below it."""
    assert command is not None, path
    context = click.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    parts = [f"{'#' * depth} {path}", _text(command.help), _fence(usage, "text")]
    for heading, params in option_groups(command, context).items():
        records = [each for param in params if (each := param.get_help_record(context))]
        rows = [(f"`{name}`", _cell(text)) for name, text in records]
        parts.append(table((heading, "meaning"), rows))
    parts.append(_fence(examples(command.epilog or "", MOST_COLUMNS), "text"))
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            parts += _command(
                command.get_command(context, name), f"{path} {name}", context, depth + 1
            )
    return parts


def _text(text: str | None) -> str:
    """Return help text as paragraphs of Markdown."""
    return _escaped(_plain(text), "*_[")


def _plain(text: str | None) -> str:
    return inspect.cleandoc(text or "").replace("\b\n", "")


# --- Markdown -------------------------------------------------------------------------------------


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _cell(text: object) -> str:
    """Return text that no character of its own ends a cell, or is taken for markup; `code` stays
    code."""
    line = " ".join(str(text).split())
    parts = line.split("`")
    if len(parts) % 2 == 0 or "|" in "".join(parts[1::2]):  # a cell ends at | in code as well
        return _escaped(line, "|*_[]`")
    parts[::2] = [_escaped(part, "|*_[]") for part in parts[::2]]
    return "`".join(parts)


def _escaped(text: str, marks: str) -> str:
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in marks else char for char in plain)


def _fence(text: str, language: str) -> str:
    # docs/site.css wraps plain text, which is read; code scrolls
    info = "{ .text .wrap }" if language == "text" else language
    return f"``` {info}\n{text}\n```" if text.strip() else ""
