"""`student recipes` lists the recipes, or shows one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.text import first_paragraph, print_facts
from featcache.errors import UsageError

if TYPE_CHECKING:
    from student.setting_help import SettingHelp


@click.command(
    cls=Command,
    section=Section.LOOK,
    short_help="List the recipes, or show the settings of one.",
    epilog="Examples:\n\n  student recipes\n\n  student recipes mralign --set encoder=large"
    "\n\n  student recipes mralign --json > mralign.json",
)
@click.argument("name", required=False)
@option(
    "--set",
    "settings",
    group=HelpGroup.INPUT,
    multiple=True,
    metavar="KEY=VALUE",
    help="Show the configuration with this change.",
)
@option(
    "--schema",
    group=HelpGroup.REPORT,
    is_flag=True,
    help="Print each setting as JSON: its value, default, type, what is allowed, what it means.",
)
@option("--json", "as_json", group=HelpGroup.REPORT, is_flag=True, help="Print as JSON.")
def command(name: str | None, settings: tuple[str, ...], schema: bool, as_json: bool) -> None:
    """List the recipes, or show one recipe's paper trail and what each of its settings means."""
    if name is not None:
        _show_recipe(name, settings, schema, as_json)
        return
    if schema or settings:
        raise UsageError(
            f"{'--schema' if schema else '--set'} is about one recipe: name it, as in student "
            "recipes mae"
        )
    _list_recipes(as_json)


def _list_recipes(as_json: bool) -> None:
    from student import recipes

    titles = {name: first_paragraph(recipes.load(name).__doc__) for name in recipes.names()}
    text = "\n".join(f"{name:12}{title}" for name, title in titles.items())
    print_facts(titles, as_json, text)


def _show_recipe(name: str, settings: tuple[str, ...], schema: bool, as_json: bool) -> None:
    from student import config, recipes, setting_help

    module = recipes.load(name)
    shown = config.from_overrides(module.Config, settings)
    described = setting_help.describe(shown)
    if schema:
        print_facts({each.key: _facts(each) for each in described}, True, "")
        return
    entries = [setting_help.as_lines(each) for each in described]
    text = "\n".join([f"{(module.__doc__ or '').strip()}\n", *entries])
    print_facts(config.as_dict(shown), as_json, text)


def _facts(setting: SettingHelp) -> dict[str, Any]:
    names = ("value", "default", "type", "allowed", "help")
    return {name: getattr(setting, name) for name in names}
