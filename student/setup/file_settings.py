"""Settings that a `--config` file holds are read by the types of a recipe's fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from featcache.console.config_file import FileSettings
from featcache.errors import UsageError, near
from student.settings import Settings, check_values, parse_settings, read_settings


def settings_of_file(kind: type[Any], given: FileSettings) -> Settings:
    """Read the settings; UsageError names the file and the key of one that cannot be."""
    names = [each.name for each in fields(kind)]
    unknown = [key for key in given.values if key not in names]
    # those of mixtures have a text of their own
    if unknown and not unknown[0].startswith(("mixup", "cutmix")):
        known = near(unknown[0], [*names, *given.options])
        raise UsageError(
            f"{given}: unknown key {unknown[0]!r}, neither setting nor option: {known}"
        )
    try:
        settings = read_settings(kind, given.values)
        check_values(kind, settings.values)
    except UsageError as error:
        raise UsageError(f"{given}: {error}") from None
    return settings


def merged_values(kind: type[Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that a command was given, in a file and by --set, which wins."""
    settings = settings_of_file(kind, given["file_settings"])
    return settings.merged(parse_settings(kind, given["settings"])).values
