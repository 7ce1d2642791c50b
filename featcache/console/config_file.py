"""A file of options stands for a command line: `--config` reads one, `--print-config` writes it.

Keys are the names of options, values are what they take. A value becomes the text that the command
line would have and goes through click from there on: the same types, the same messages. The command
line wins over the file. A file is a stranger's: it names data, but no code (`own_code`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from featcache.console import config_text, config_value, log_file
from featcache.console.command import WORDS
from featcache.console.option import HelpGroup, Option
from featcache.console.params import LocalPath
from featcache.console.text import echo
from featcache.errors import UsageError, UserError, command_line, near, short
from featcache.runtime import strict_json, values_file

_META = "featcache.config_file"
_OWN = ("config", "print_config", "log_file", "resumed")


@dataclass(frozen=True)
class FileSettings:
    """The settings of a `--config` file, or of the run that --resume names, as far as they are no
    options; `options` are those that the command has, `taken` those that were there."""

    path: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()
    option: str = "--config"
    taken: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.option} {self.path!r}"


# Checks the settings of the file and those of --set (`given`), and returns them as one mapping.
SettingsOf = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# Reads the options that a run folder records, by their keys.
OptionsOf = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Rules:
    """What a command says of its options to those who fill them from a file."""

    settings: SettingsOf | None = None  # of the recipe that --set speaks of
    # parameter -> whether a file may choose this value: names of networks, and no user's code
    own_code: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)
    # parameters of which one may be given; those of one that is a setting as well
    rivals: Mapping[str, str] = field(default_factory=dict)
    also_settings: Sequence[str] = ()
    # parameters whose default gives way to what a cache or a publication has
    soft: Sequence[str] = ()
    # reads the options that a run was made with, for a command that goes on with one
    recorded: OptionsOf | None = None
    # parameters with choices: any other value is a setting of that name
    choice_or_setting: Sequence[str] = ()


def accepts(
    settings: SettingsOf | None = None,
    own_code: Mapping[str, Callable[[str], bool]] | None = None,
    rivals: Mapping[str, str] | None = None,
    also_settings: Sequence[str] = (),
    soft: Sequence[str] = (),
    recorded: OptionsOf | None = None,
    choice_or_setting: Sequence[str] = (),
) -> Callable[[click.Command], click.Command]:
    """Give a command the options --config, --print-config and --log-file; the arguments are those
    of Rules."""
    rules = Rules(
        settings, own_code or {}, rivals or {}, also_settings, soft, recorded, choice_or_setting
    )

    def with_file(command: click.Command) -> click.Command:
        body = command.callback
        assert body is not None
        command.callback = functools.partial(_run, body, rules)
        command.params += _options(rules)
        return command

    return with_file


def given_options() -> dict[str, Any] | None:
    """Return the options of the command that runs which are not left to their defaults, by the keys
    of a `--config` file; None where no such command runs."""
    ctx = click.get_current_context(silent=True)
    found: dict[str, Any] | None = ctx.meta.get(_META) if ctx else None
    return found


def _options(rules: Rules) -> list[click.Parameter]:
    held = " or settings" if rules.settings else ""
    run = " A run's config.json is one of settings." if rules.settings else ""
    return [
        Option(
            ["--config"],
            group=HelpGroup.FILE,
            type=LocalPath(),
            is_eager=True,
            expose_value=rules.settings is not None,
            callback=functools.partial(_read_into, rules),
            help=f"YAML, TOML or JSON file of options{held}; the command line wins.{run}",
        ),
        Option(
            ["--print-config"],
            group=HelpGroup.FILE,
            is_flag=True,
            expose_value=False,
            callback=lambda ctx, _, asked: ctx.meta.update({f"{_META}.print": asked}),
            help="Print all options as YAML that --config reads, and stop.",
        ),
        log_file.option(),
        *([_run_argument(rules)] if rules.recorded else []),
    ]


def _run_argument(rules: Rules) -> click.Argument:
    """Return the argument of `--resume RUN`, whose own options are the defaults of the call."""
    return click.Argument(
        ["resumed"],
        type=LocalPath(),
        required=False,
        metavar="[RUN]",
        is_eager=True,
        expose_value=False,
        callback=functools.partial(_resume, rules),
    )


def is_registered(spec: str) -> bool:
    """Tell whether a file may choose this teacher: one of a library's own list."""
    from featcache import teachers

    return teachers.is_registered(spec)


# ---- reading -------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Read a file of named values, TOML or YAML by its suffix, else JSON. Raises UserError."""
    try:
        return strict_json.as_object(values_file.read(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--config {str(path)!r}: {error}; a .yaml, .toml or .json file with an object of "
            "named values is needed, such as --print-config prints"
        ) from error


def _read_into(rules: Rules, ctx: click.Context, param: click.Parameter, path: Any) -> Any:
    """Let what the file holds be the defaults of this call, checked."""
    if path is not None and not ctx.resilient_parsing:
        _take(rules, ctx, read(path), "--config", path)
    return path


def _resume(rules: Rules, ctx: click.Context, param: click.Parameter, run: Any) -> Any:
    """Let the options that a run was made with be the defaults of this call, checked."""
    if run is not None and not ctx.resilient_parsing:
        assert rules.recorded is not None
        if "--resume" not in ctx.meta.get(WORDS, ("--resume",)):
            raise UsageError(
                f"unexpected argument {str(run)!r}: to go on with a run give "
                f"{command_line('--resume', run)}, for the folder of a new one --out; a value is "
                "joined to its name, as in --set lr=1e-3"
            )
        _take(rules, ctx, {**rules.recorded(run), "out": str(run)}, "--resume", run)
    return run


def _take(
    rules: Rules, ctx: click.Context, values: dict[str, Any], option: str, path: Path
) -> None:
    known, where = keys(ctx.command), f"{option} {str(path)!r}"
    if before := ctx.meta.get(f"{_META}.settings"):
        raise UsageError(
            f"{where} and {before}: both say all options, and one of them is allowed; leave "
            "--config out"
        )
    found, settings = _sorted_out(rules, known, values, where)
    ctx.default_map = {
        **(ctx.default_map or {}),
        **{known[key].name: config_value.checked(known[key], key, value, ctx, where)
           for key, value in found.items()},
    }  # fmt: skip
    ctx.meta[f"{_META}.settings"] = FileSettings(
        str(path), settings, tuple(known), option, {**found, **settings}
    )


def _sorted_out(
    rules: Rules, known: Mapping[str, click.Parameter], values: dict[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part what a file holds into options, by their keys, and settings."""
    if rules.settings is None:
        return _by_key(known, values, where), {}
    if isinstance(record := values.get("config"), dict):
        return {}, _settings_of_record(record, values, where)
    named = values.pop("set", {})
    if not isinstance(named, dict):
        raise UsageError(f"{where}: set: {short(named)} given; settings by name are needed")
    flat = {key for key, value in values.items() if _is_setting(rules, known, key, value)}
    if twice := flat & set(named):
        raise UsageError(f"{where}: {min(twice)!r} is there twice, under set and beside it")
    options = {key: value for key, value in values.items() if key not in flat}
    return _by_key(known, options, where), {**{key: values[key] for key in flat}, **named}


def _settings_of_record(
    settings: dict[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the settings of a run's config.json, all else of which is no option."""
    if len(values) > 1 and not {"recipe", "steps"} <= values.keys():
        raise UsageError(
            f"{where}: config holds settings, as in a run's config.json, and "
            f"{short(min(values.keys() - {'config'}))} stands beside it, which no run has alone; "
            "write the settings below set"
        )
    return settings


def _is_setting(rules: Rules, known: Mapping[str, click.Parameter], key: str, value: Any) -> bool:
    """Tell settings from options: `teacher: cached` is the option, and `teacher: dino-b16` the
    setting, since it is none of the option's choices."""
    param = known.get(key.replace("_", "-"))
    if param is None:
        return True
    if param.name not in rules.choice_or_setting or not isinstance(param.type, click.Choice):
        return False
    return isinstance(value, str) and value not in param.type.choices


def _by_key(
    known: Mapping[str, click.Parameter], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in values.items():
        key = given.replace("_", "-")
        if key not in known:
            raise UsageError(f"{where}: unknown key {given!r}: {near(key, known)}")
        if key in found:
            raise UsageError(f"{where}: {key} is there twice, as {given!r} too; leave one out")
        found[key] = value
    return {key: value for key, value in found.items() if not _is_left_out(known[key], value)}


def _is_left_out(param: click.Parameter, value: Any) -> bool:
    """Tell whether null is given where the option has no default."""
    return value is None and not param.required and config_text.default(param) in (None, ())


def read_settings(path: Path) -> FileSettings:
    """Read a file of nothing but settings, as a Python call names one. Raises UserError."""
    where = f"--config {str(path)!r}"
    _, settings = _sorted_out(Rules(settings=dict), {}, read(path), where)
    return FileSettings(str(path), settings)


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """Return the parameters that a file may give, by their keys: long names, without dashes."""
    return {config_text.key(param): param for param in command.params if param.name not in _OWN}


# ---- running -------------------------------------------------------------------------------------


def _run(body: Callable[..., Any], rules: Rules, /, **given: Any) -> Any:
    """Run a command's own function on what the command line and the file say together."""
    ctx = click.get_current_context()
    found: FileSettings = ctx.meta.get(f"{_META}.settings", FileSettings())
    given, found = _prefer_command_line(ctx, rules, given, found)
    _refuse_code(ctx, rules, given, found)
    if found.option == "--resume":
        _check_resumed(ctx, found, given)
    if rules.settings is not None:
        given["file_settings"] = found
    resolved = _resolved(ctx, rules, given)
    ctx.meta[_META] = {
        key: value for key, (value, is_default) in resolved.items() if not is_default
    }
    if not ctx.meta[f"{_META}.print"]:
        return body(**given)
    if rules.settings is not None and resolved["set"][0]:
        resolved["set"] = (dict(rules.settings(given)), False)
    echo(config_text.document(ctx, resolved, rules.soft))
    return None


def _check_resumed(ctx: click.Context, found: FileSettings, given: Mapping[str, Any]) -> None:
    """Raise UsageError where RUN stands beside another --out."""
    if ctx.get_parameter_source("out") is ParameterSource.COMMANDLINE:
        raise UsageError(
            f"{found} and --out {str(given['out'])!r}: a run goes on in its own folder; leave "
            "--out out"
        )


def _prefer_command_line(
    ctx: click.Context, rules: Rules, given: dict[str, Any], found: FileSettings
) -> tuple[dict[str, Any], FileSettings]:
    """Let an option of the file give way to the command line's rival of it, or to its --set; one
    that is a setting as well becomes that."""
    named = {text.partition("=")[0].strip() for text in given.get("settings", ())}
    for name in {*rules.rivals, *rules.also_settings}:
        rival = ctx.get_parameter_source(rules.rivals.get(name, ""))
        overruled = rival is ParameterSource.COMMANDLINE or (
            name in rules.also_settings and name in named
        )
        if not overruled or ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            continue
        if name in rules.also_settings:
            found = replace(found, values={name: given[name], **found.values})
        given = {**given, name: None}
        ctx.set_parameter_source(name, ParameterSource.DEFAULT)
    return given, found


def _refuse_code(
    ctx: click.Context, rules: Rules, given: Mapping[str, Any], found: FileSettings
) -> None:
    for name, may_choose in rules.own_code.items():
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT_MAP:
            continue
        values = given[name] if isinstance(given[name], tuple) else (given[name],)
        for value in values:
            if value is not None and not may_choose(value):
                param = next(each for each in ctx.command.params if each.name == name)
                option = max(param.opts, key=len)
                raise UsageError(
                    f"{found}: {option.lstrip('-')}: {value!r}: code and files of networks are "
                    "taken only from your own command line, never from what a file says; give "
                    f"{option} there as well"
                )


def _resolved(
    ctx: click.Context, rules: Rules, given: Mapping[str, Any]
) -> dict[str, tuple[Any, bool]]:
    """Return every option's plain value by its key, and whether it is left to its default."""
    resolved = {}
    for key, param in keys(ctx.command).items():
        is_default = ctx.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT
        value = config_text.plain(given[str(param.name)])
        if key == "set" and rules.settings is not None:
            value = {**given["file_settings"].values, **dict(map(_split, value))}
            is_default = not value
        resolved[key] = (value, is_default)
    return resolved


def _split(text: str) -> tuple[str, Any]:
    """Return key and value of a `--set` as far as they are told without the setting's type."""
    key, _, value = text.partition("=")
    try:
        return key.strip(), strict_json.parse(value)
    except ValueError:
        return key.strip(), value
