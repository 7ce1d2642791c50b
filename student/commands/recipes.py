"""`student recipes` lists the recipes, or shows one of them."""

from __future__ import annotations

import json

import click

from featcache.console.text import first_paragraph, print_facts


@click.command(
    epilog="Examples:\n\n  student recipes\n\n  student recipes mralign --set encoder=large"
)
@click.argument("name", required=False)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Show the configuration with this change.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(name: str | None, settings: tuple[str, ...], as_json: bool) -> None:
    """List the recipes, or show one recipe's paper trail and its flattened configuration."""
    if name is None:
        _list_recipes(as_json)
    else:
        _show_recipe(name, settings, as_json)


def _list_recipes(as_json: bool) -> None:
    from student import recipes

    titles = {name: first_paragraph(recipes.load(name).__doc__) for name in recipes.names()}
    text = "\n".join(f"{name:12}{title}" for name, title in titles.items())
    print_facts(titles, as_json, text)


def _show_recipe(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    from student import config, recipes

    module = recipes.load(name)
    values = config.as_dict(config.from_overrides(module.Config, settings))
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    print_facts(values, as_json, f"{(module.__doc__ or '').strip()}\n\n{lines}")
