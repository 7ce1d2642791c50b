"""`student recipes` lists the recipes, or shows one of them."""

from __future__ import annotations

import json

import click


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
    """The recipes, or one recipe's paper trail and its flattened configuration."""
    from student import config, recipes

    if name is None:
        lines = {
            each: (recipes.load(each).__doc__ or "").strip().splitlines()[0]
            for each in recipes.names()
        }
        click.echo(
            json.dumps(lines)
            if as_json
            else "\n".join(f"{each:12}{line}" for each, line in lines.items())
        )
        return
    module = recipes.load(name)
    values = config.as_dict(config.from_overrides(module.Config, settings))
    if as_json:
        click.echo(json.dumps(values))
        return
    click.echo((module.__doc__ or "").strip() + "\n")
    click.echo("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
