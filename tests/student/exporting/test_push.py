"""`student export --push` uploads the finished folder; whatever fails is one line, and the folder
stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests import student_fixtures as fx
from tests.student.exporting.fake_hub import TOKEN, Hub, serving
from tests.student.exporting.readers import export, run_of

# of huggingface_hub's own calls of its client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol needs its server
    with serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def pushed(out: Path, *options: Any) -> fx.Ran:
    return export(run_of("mae"), "timm", out, *options)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("public", [False, True])
def test_the_folder_is_in_the_repository(hub: Hub, public: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = fx.good(pushed(out, "--push", "me/model", *(["--public"] if public else [])))
    assert ran.out.splitlines()[-1] == f"pushed to {hub.url}/me/model"
    assert hub.files == {each.name: each.read_bytes() for each in out.iterdir()}
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert list(hub.made) == ["me/model"]
    asked = hub.made["me/model"]
    assert (asked.get("private"), asked.get("visibility")) in (
        [(False, None), (None, "public")] if public else [(True, None), (None, "private")]
    )
    assert hub.commits == ["Upload by student export"]
    assert TOKEN not in ran.out + ran.err


def test_the_owner_of_a_bare_name_is_the_tokens(hub: Hub, tmp_path: Path) -> None:
    ran = fx.good(pushed(tmp_path / "out", "--push", "model", "--json"))
    assert ran.json["pushed"] == f"{hub.url}/me/model"


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("status", "where", "why"),
    [
        (401, "", "does not accept the token"),
        (403, "", "may not write"),
        (500, "/create", "answers with status 500"),
        (403, "/commit/", "may not write"),
        (404, "/preupload/", "no such owner or repository"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, status: int, where: str, why: str, tmp_path: Path
) -> None:
    hub.status, hub.fails_at = status, where
    ran = pushed(tmp_path / "out", "--push", "me/model")
    assert ran.status == 1
    assert why in ran.line
    assert f"the export is complete and stays at '{tmp_path / 'out'}'" in ran.line
    assert f"`hf upload me/model {tmp_path / 'out'} . --private`" in ran.line


def test_who_wants_a_public_repository_is_told_how_to_upload_to_one(
    hub: Hub, tmp_path: Path
) -> None:
    hub.status, hub.fails_at = 401, "/api/repos/create"
    ran = pushed(tmp_path / "out", "--push", "me/model", "--public")
    assert f"`hf upload me/model {tmp_path / 'out'} .`" in ran.line
    assert TOKEN not in ran.out + ran.err
    assert "\x1b" not in ran.err
    assert (tmp_path / "out/model.safetensors").exists()
    assert not hub.files


def test_where_nobody_listens(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as gone:
        url = gone.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    ran = pushed(tmp_path / "out", "--push", "me/model")
    assert (ran.status, "the hub cannot be reached" in ran.line) == (1, True)
    assert (tmp_path / "out/README.md").exists()


@pytest.mark.parametrize("name", ["a/b/c", "a b", "../x", "a--b", "", "x\x1b[31m", "-x"])
def test_a_name_that_is_none_is_told_before_any_work(hub: Hub, name: str, tmp_path: Path) -> None:
    ran = pushed(tmp_path / "out", "--push", name)
    assert (ran.status, "is no repository of the hub" in ran.line) == (2, True)
    assert not (tmp_path / "out").exists()
    assert not hub.made


def test_without_a_token_or_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    ran = pushed(tmp_path / "out", "--push", "me/model")
    assert (ran.status, "HF_TOKEN" in ran.line) == (1, True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = pushed(tmp_path / "out", "--push", "me/model")
    assert (ran.status, "HF_HUB_OFFLINE is set" in ran.line) == (1, True)
    assert not (tmp_path / "out").exists()


def test_public_is_of_push(tmp_path: Path) -> None:
    ran = pushed(tmp_path / "out", "--public")
    assert (ran.status, "give --push REPO" in ran.line) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_program_takes_the_server_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    words = ("export", run_of("mae"), "--format", "mae", "--out", tmp_path / "out")
    env = {
        **fx.environment(), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "student", *map(os.fspath, words), "--push", "me/model"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.files
    assert TOKEN not in done.stdout + done.stderr
