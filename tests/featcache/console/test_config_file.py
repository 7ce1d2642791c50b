"""Options of a file are those of a command line, and what is printed reads back to the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from featcache.commands.derive import command as derive
from featcache.commands.extract import command as extract
from featcache.console import config_file
from featcache.console.params import COUNT, FiniteRange, FloatPair, LocalPath, LocalText
from featcache.errors import UserError
from tests.featcache.runtime.test_strict_yaml import ODD


def build(**rules: Any) -> click.Command:
    """A command of each kind of option, which prints what it was given as JSON."""

    def body(**given: Any) -> None:
        given["recorded"] = config_file.given_options()
        given.pop("file_settings", None)
        click.echo(json.dumps(given, default=str))

    def option(*names: str, **more: Any) -> click.Option:
        return click.Option(names, help="Text of it.", **more)

    params: list[click.Parameter] = [
        click.Argument(["run"], required=False),
        option("--count", type=COUNT),
        option("--share", type=FiniteRange(0, 1), default=0.5),
        option("--scale", type=FloatPair()),
        option("--text", "text_name", default="plain"),
        option("--one", type=click.Choice(["a", "b"]), default="a"),
        option("--out", type=LocalPath()),
        option("--name", "names", type=LocalText(), multiple=True),
        option("--flag", is_flag=True),
        option("--keep/--no-keep", default=True),
        *([option("--set", "settings", multiple=True)] if "settings" in rules else []),
    ]
    return config_file.accepts(**rules)(click.Command("toy", params=params, callback=body))


# as the programs have it: a command keeps its help option from the first context it meets
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def run(command: click.Command, *words: object) -> dict[str, Any]:
    """What a command was given."""
    ran = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False, **HELP)
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.output)
    return found


def refusal(command: click.Command, *words: object) -> str:
    """The line of a refused command."""
    error = CliRunner().invoke(command, list(map(str, words)), **HELP).exception
    assert isinstance(error, UserError), error
    return str(error)


def printed(command: click.Command, *words: str) -> str:
    ran = CliRunner().invoke(command, [*words, "--print-config"], catch_exceptions=False, **HELP)
    assert ran.exit_code == 0, ran.output
    return ran.output


FORMS = {
    "a.yaml": "count: 3\nshare: 1e-3\nscale: [0.2, 1]\ntext: on\nname: [x, 1.10]\nflag: true\n"
    "keep: false\nrun: r\n",
    "a.yml": "count: 3\nshare: 0.001\nscale: 0.2,1\ntext: on\nname:\n- x\n- '1.10'\nflag: True\n"
    "keep: false\nrun: r\nout:\n",
    "a.toml": "count = 3\nshare = 1e-3\nscale = [0.2, 1]\ntext = 'on'\nname = ['x', 1.10]\n"
    "flag = true\nkeep = false\nrun = 'r'\n",
    "a.json": '{"count": 3, "share": 1e-3, "scale": [0.2, 1], "text": "on", "name": ["x", "1.10"], '
    '"flag": true, "keep": false, "run": "r", "out": null}',
    "a": '{"count": "3", "share": "1e-3", "scale": "1/5,1", "text": "on", "name": ["x", "1.10"], '
    '"flag": true, "keep": false, "run": "r"}',
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_gives_what_the_command_line_gives(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name])
    words = (
        "r --count 3 --share 0.001 --scale 0.2,1 --text on --name x --name 1.10 --flag --no-keep"
    )
    assert run(build(), "--config", path) == run(build(), *words.split())


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("count: 3\nshare: 0.25\nname: [x, y]\none: b\n")
    found = run(build(), "--count", 4, "--config", path, "--name", "z")
    assert (found["count"], found["share"], found["names"], found["one"]) == (4, 0.25, ["z"], "b")
    assert found["recorded"] == {"count": 4, "share": 0.25, "name": ["z"], "one": "b"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cuont: 3", "unknown key 'cuont': did you mean count?"),
        ("count: 0", "count: 0 is not in the range"),
        ("count: 1.5", "count: '1.5' is not a valid integer"),
        ("count: true", "count: true given; a text or a number is needed"),
        ("count: [3]", "count: [3] given"),
        ("share: 1.5", "share: 1.5 is not in the range"),
        ("share: nan", "share: nan"),
        ("share:", "share: null given"),
        ("scale: [1, 2, 3]", "scale: '1,2,3' given; two numbers"),
        ("one: c", "one: 'c' is not one of 'a', 'b'"),
        ("flag: yes", "flag: 'yes' given; true or false is needed"),
        ("flag: 1", "flag: 1 given"),
        ("out: s3://x/y", "s3:// is no place of this machine"),
        ("out: ''", "can be no path"),
        ("name: [a, {b: 1}]", "name: {'b': 1} given"),
        ('text: "a\\0"', "null characters"),
        ('text: "\\ud800"', "halves of characters"),
        ("set: {lr: 1}", "unknown key 'set'"),
        ("config: b.yaml", "unknown key 'config'"),
        ("print-config: true", "unknown key 'print-config'"),
        ("no-keep: true", "unknown key 'no-keep'"),
        ("text_: 1\ntext: 2", "unknown key 'text_'"),
        ("[a]", "it holds a list"),
        ("", "it holds null"),
        ("a: &x [*x]", "anchors"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "my file.yaml"
    path.write_text(text)
    line = refusal(build(), "--config", path)
    assert line.startswith("--config ")
    assert "my file.yaml" in line
    assert told in line


def test_a_key_twice_in_two_spellings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("batch-size: 1\nbatch_size: 2")
    assert "batch-size is there twice" in refusal(extract, "--config", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 2024-01-01", "date or time 2024-01-01"),
        ("a = [12:30:00]", "date or time"),
        ("a = inf", "no finite number"),
        ("a = 1e999", "no finite number"),
        ("a = " + "9" * 60, "huge number"),
        ("a = " + "[" * 5000, "nested"),
        ("a" + ".a" * 300 + " = 1", "more than 256 dots"),
        (("a." * 200 + '"\u2028".') * 2 + "a = 1", "line 1 has more than 256 dots"),
        ("\n".join(f"a{i}.b = {i}" for i in range(9000)), "more than 64 KiB"),
        ("a = 1\na = 2", "Cannot overwrite"),
        ("a =", "Invalid value"),
    ],
)
def test_toml_within_bounds(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    assert told in refusal(build(), "--config", tmp_path / "a.toml")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", Path("/dev/null")):
        assert "--config" in refusal(build(), "--config", path)


def test_code_counts_only_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("teacher: ./mine.py\nimages: p\n")
    line = refusal(extract, "--config", tmp_path / "a.yaml")
    assert "'./mine.py': code and files of networks" in line
    assert "give --teacher there" in line
    words = ["--config", str(tmp_path / "a.yaml"), "--teacher", "./mine.py"]
    assert "teacher: [./mine.py]" in printed(extract, *words)


def test_rivals_and_settings_of_the_file_give_way(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []

    def settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(given["file_settings"].values)
        return {}

    rivals = {"count": "share", "share": "count"}
    command = build(
        rivals=rivals, settings=settings, also_settings=("count",), choice_or_setting=("one",)
    )
    (tmp_path / "a.yaml").write_text("count: 3\nlr: 1e-3\none: mine\nset: {x: 1}\n")
    found = run(command, "--config", tmp_path / "a.yaml")
    assert (found["count"], found["one"]) == (3, "a")  # mine is none of its choices
    assert found["recorded"] == {"count": 3, "set": {"lr": 0.001, "one": "mine", "x": 1}}
    assert run(command, "--config", tmp_path / "a.yaml", "--share", 1)["count"] is None
    assert run(command, "--config", tmp_path / "a.yaml", "--set", "count=5")["count"] is None
    printed(command, "--config", str(tmp_path / "a.yaml"), "--share", "1")
    assert seen == [{"lr": 0.001, "one": "mine", "x": 1, "count": 3}]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
ANY = (TEXT | st.sampled_from([odd for odd in ODD if odd])).filter(lambda text: "://" not in text)
PATHS = ANY.filter(lambda text: not text.startswith("~"))
WORDS = st.fixed_dictionaries(
    {},
    optional={
        "--teacher": st.lists(PATHS, min_size=1, max_size=3),
        "--images": PATHS,
        "--out": PATHS,
        "--levels": st.lists(ANY, min_size=1, max_size=3),
        "--order": st.sampled_from(["attentive", "topk", "uniform"]),
        "--codec": st.sampled_from(["fp16", "q8", "t4", "t3"]),
        "--keep": ANY,
        "--views": st.integers(1, 10**9).map(str),
        "--size": st.integers(-(10**12), 10**12).map(str),
        "--flip": st.floats(allow_nan=False, allow_infinity=False).map(repr),
        "--scale": st.tuples(st.floats(0, 1), st.floats(0, 1)).map("{0[0]!r},{0[1]!r}".format),
        "--store": st.sampled_from(["zarr", "webdataset"]),
        "--exif": st.none(),
        "--batch-size": st.integers(1, 64).map(str),
    },
)


def as_words(options: Mapping[str, Any]) -> list[str]:
    """The command line of options; a value that begins with a dash is none of a following one."""
    words = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            words.append(name if each is None else f"{name}={each}")
    return words


@pytest.mark.slow
@given(WORDS)
def test_what_is_printed_reads_back_to_the_very_same_options(
    tmp_path_factory: pytest.TempPathFactory, options: Mapping[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("c") / "a.yaml"
    words = as_words(options)
    path.write_text(printed(extract, *words))
    assert all(char.isprintable() or char == "\n" for char in path.read_text())
    before = extract.make_context("extract", list(words), **HELP).params
    after = extract.make_context("extract", ["--config", str(path)], **HELP).params
    assert after == before
    assert printed(extract, "--config", str(path), *words) == path.read_text()


def test_everything_is_printed_with_what_it_means() -> None:
    text = printed(derive, "a", "b", "--codec", "t4")
    assert "cache: a\n" in text
    assert "codec: t4\n" in text
    assert "# keep:\n" in text
    assert "# Only the first N views. [default: all]\n# views:\n" in text
    assert max(map(len, text.splitlines())) <= 88


def test_a_default_that_gives_way_is_a_comment() -> None:
    assert "\n# batch-size: 32\n" in printed(extract)
    assert "\nbatch-size: 32\n" in printed(extract, "--batch-size", "32")
    assert "\nviews: 1\n" in printed(extract)


def test_nothing_is_recorded_where_no_command_runs() -> None:
    assert config_file.given_options() is None
