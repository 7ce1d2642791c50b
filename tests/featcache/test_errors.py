"""A stranger's text is harmless at a terminal, and stays what it is in a command line."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import featcache
from featcache.errors import UserError, command_line, near, one_line, printable

ROOT = Path(featcache.__file__).parent.parent
# one of each kind that a terminal carries out, or that hides what is there
SHOWN = r"""
\x00 \x07 \x08 \x1b \r \x0b \x7f \x80 \x85 \x9b \xad \u200b \u200e \u2028 \u2029 \u202e \u2066
\u2069 \ufeff \udc9b \ud800 \U000e0041"""


@pytest.mark.parametrize("shown", SHOWN.split())
def test_what_a_terminal_would_carry_out_is_shown(shown: str) -> None:
    raw = ast.literal_eval(f"'{shown}'")
    assert printable(f"a{raw}b") == f"a{shown}b"
    assert str(UserError(f"a{raw}b")) == ("a b" if raw == "\r" else f"a{shown}b")


def test_words_of_every_language_spaces_and_our_own_lines_stay() -> None:
    text = "naïve 写真 фото\u3000صورة\u00a0é\U0001f600 a\\x1b\n\tb  c"
    assert printable(text) == text


@given(st.text())
def test_escaping_twice_is_escaping_once(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    assert one_line(text).isprintable() or any(char.isspace() for char in one_line(text))


def test_an_error_is_one_line_that_keeps_the_spaces_of_names() -> None:
    assert str(UserError(" a\n  b 'two  spaces'\r\nc\t")) == "a b 'two  spaces' c"


@given(st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1))
def test_a_command_line_gives_bash_the_words_that_were_meant(word: str) -> None:
    line = command_line("printf", "%s", word)
    assert printable(line, keep="") == line
    ran = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert ran.stdout == word.encode()


def test_a_command_line_names_files_that_are_no_text() -> None:
    name = os.fsdecode(b"caf\xe9 \x1b[31m$(id)")
    line = command_line("printf", "%s", name)
    assert line == r"printf %s $'caf\xe9 \x1b[31m$(id)'"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert ran.stdout == b"caf\xe9 \x1b[31m$(id)"


ALLOWED = {
    "featcache/console/text.py": {"click.echo", "click.confirm"},
    "featcache/console/progress_bar.py": {"tqdm"},
    "featcache/maintenance/packing.py": {"tqdm"},
    "featcache/runtime/signals.py": {"print"},  # before anything of ours may be imported
    "featcache/errors.py": {"shlex.quote"},
}
FORBIDDEN = """
print tqdm click.echo click.secho click.confirm click.prompt click.progressbar click.echo_via_pager
shlex.join shlex.quote sys.stdout.write sys.stderr.write warnings.warn"""


def test_nothing_but_these_files_prints() -> None:
    for package in ("featcache", "student", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            called = {
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            }
            assert called & set(FORBIDDEN.split()) <= ALLOWED.get(name, set()), name


def test_the_middle_of_a_long_line_is_left_out() -> None:
    line = str(UserError("begin " + "x" * 10**6 + " end"))
    assert line.startswith("begin xxx")
    assert line.endswith("xxx end")
    assert " ... " in line
    assert len(line) < 4100
    assert str(UserError("y" * 4000)) == "y" * 4000


def test_a_long_name_is_near_to_nothing_soon() -> None:
    assert near("x" * 10**6, ["clip-b16"]) == "known: clip-b16"
