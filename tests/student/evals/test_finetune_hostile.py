"""A fine-tuned run folder from an attacker: each command ends well or with one line, soon, and
touches nothing but the run's own folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from featcache.errors import UserError
from student.cli import cli
from student.features.finetuned import load_classifier
from tests import finetuning as ft
from tests import hostile_json as hostile
from tests import student_fixtures as fx

CHECKS = list(HealthCheck)
BEST = "best.safetensors"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after the first of its three epochs: it can go on."""
    run = tmp_path_factory.mktemp("origin") / "run"
    fx.good(ft.finetune("cae", run))
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        path.unlink()
    (run / "results.jsonl").unlink()
    return run


class World:
    """A run that is attacked, and files beside it that are nobody's to touch."""

    def __init__(self, root: Path, origin: Path) -> None:
        self.root, self.run = root, root / "runs/odd"
        shutil.copytree(origin, self.run)
        for folder in (root, self.run.parent):
            (folder / "trap").write_text("not yours")

    def command(self, name: str) -> list[str]:
        eval_ = ["eval", "knn", self.run, "--images", ft.train_pictures(), "--k", 1]
        words = {
            "resume": ft.words("cae", self.run, "--resume"),
            "eval": [*eval_, "--device", "cpu", "--no-keep"],
        }[name]
        return [str(word) for word in words]

    def attack(self, name: str) -> hostile.Outcome:
        """Run a command, or load the best weights; nothing but the run may change."""
        fx.fresh_state()
        with hostile.unchanged(self.root, self.run):
            ran = hostile.run(cli, self.command(name))
        hostile.assert_one_line(ran)
        return ran

    def load(self) -> str:
        """Return why the best weights are refused; empty where they are read."""
        with hostile.unchanged(self.root, self.run):
            try:
                load_classifier(self.run, best=True)
            except UserError as error:
                return str(error)
        return ""


@pytest.fixture
def world(tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    ft.pretrained("cae"), ft.train_pictures(), ft.test_pictures()
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path / "world", origin)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "resume"])
def test_the_run_as_it_is_serves_every_command(command: str, world: World) -> None:
    assert world.load() == ""
    assert world.attack(command).status == 0


# --- best.safetensors -----------------------------------------------------------------------------

ABOUT = {"about": json.dumps({"step": 2, "top1": 50.0})}


def header(path: Path, text: bytes, length: int | None = None) -> None:
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text)


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def a_pickle(path: Path, tensors: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def a_pipe(path: Path, tensors: dict[str, Any]) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path, tensors: dict[str, Any]) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def a_link_to_nothing(path: Path, tensors: dict[str, Any]) -> None:
    path.unlink()
    path.symlink_to(path.parents[2] / "made")


def a_device(path: Path, tensors: dict[str, Any]) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_folder(path: Path, tensors: dict[str, Any]) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path, tensors: dict[str, Any]) -> None:
    path.write_bytes(b"")


def cut(path: Path, tensors: dict[str, Any]) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def no_metadata(path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, path)


def no_json(path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, path, metadata={"about": "{"})


def absurd_score(path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, path, metadata={"about": json.dumps({"step": 2, "top1": 1e9})})


def score_nan(path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, path, metadata={"about": '{"step": 2, "top1": NaN}'})


def step_text(path: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, path, metadata={"about": '{"step": "2", "top1": 5.0}'})


def values_nan(path: Path, tensors: dict[str, Any]) -> None:
    tensors["encoder.head.bias"] = torch.full((5,), torch.nan)
    save_file(tensors, path, metadata=ABOUT)


def huge_header(path: Path, tensors: dict[str, Any]) -> None:
    header(path, b"{}", 1 << 62)


def huge_tensor(path: Path, tensors: dict[str, Any]) -> None:
    facts = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
    header(path, json.dumps({"__metadata__": ABOUT, "x": facts}).encode() + b"0000")


def odd_kinds(path: Path, tensors: dict[str, Any]) -> None:
    """Kinds that torch has only in part."""
    facts = {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}
    text = json.dumps({"__metadata__": ABOUT, "x": facts}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\xff" * 4)


def half_bytes(path: Path, tensors: dict[str, Any]) -> None:
    facts = {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}
    text = json.dumps({"__metadata__": ABOUT, "x": facts}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x00" * 4)


Forge = Callable[[Path, dict[str, Any]], None]
UNREADABLE: list[Forge] = [
    a_pickle, a_pipe, a_link, a_device, a_folder, empty, cut, no_metadata, no_json, absurd_score,
    score_nan, step_text, values_nan, huge_header, huge_tensor,
]  # fmt: skip


def forged(world: World, forge: Forge) -> None:
    forge(world.run / BEST, load_file(world.run / BEST))


@pytest.mark.slow
@pytest.mark.parametrize("forge", UNREADABLE, ids=lambda each: each.__name__)
def test_best_weights_that_are_none(forge: Forge, world: World) -> None:
    forged(world, forge)
    assert "best.safetensors' cannot be read: " in world.load()
    ran = world.attack("resume")
    assert ran.status == 1
    assert "best.safetensors' cannot be read: " in ran.line
    assert world.attack("eval").status == 0  # which needs them not
    assert not Path("ran").exists()


def a_float8(path: Path, tensors: dict[str, Any]) -> None:
    tensors["encoder.head.bias"] = torch.zeros(5).to(torch.float8_e4m3fn)
    save_file(tensors, path, metadata=ABOUT)


def a_complex(path: Path, tensors: dict[str, Any]) -> None:
    tensors["encoder.head.bias"] = torch.zeros(5, dtype=torch.complex64)
    save_file(tensors, path, metadata=ABOUT)


def an_integer(path: Path, tensors: dict[str, Any]) -> None:
    tensors["encoder.head.bias"] = torch.zeros(5, dtype=torch.int64)
    save_file(tensors, path, metadata=ABOUT)


def other_shapes(path: Path, tensors: dict[str, Any]) -> None:
    tensors["encoder.head.bias"] = torch.zeros(6)
    save_file(tensors, path, metadata=ABOUT)


def one_missing(path: Path, tensors: dict[str, Any]) -> None:
    del tensors["encoder.head.bias"]
    save_file(tensors, path, metadata=ABOUT)


def one_more(path: Path, tensors: dict[str, Any]) -> None:
    save_file({**tensors, "../../trap": torch.zeros(1)}, path, metadata=ABOUT)


MISFITS = [
    other_shapes, one_missing, one_more, a_complex, an_integer, a_float8, odd_kinds, half_bytes,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("forge", MISFITS, ids=lambda each: each.__name__)
def test_best_weights_of_another_network(forge: Forge, world: World) -> None:
    """They are not loaded; a run that goes on replaces them where it scores higher, or says so."""
    forged(world, forge)
    assert "best.safetensors' " in world.load()
    world.attack("resume")


@pytest.mark.slow
def test_a_link_to_nothing_makes_no_file_elsewhere(world: World) -> None:
    forged(world, a_link_to_nothing)
    world.attack("resume")
    assert not (world.root / "made").exists()


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": 10**9}, "classes is 1000000000"),
        ({"classes": 10**6}, "head"),
        ({"classes": None}, "classes is None"),
        ({"classes": 6}, "head.weight is (5, 48), (6, 48) is needed"),
        ({"family": "mae"}, "rel_pos=true: encoders of family 'mae'"),
        ({"family": "conv_vit"}, "rel_pos=true"),
        ({"family": "timm"}, "config.json"),
        ({"family": "../x"}, "family"),
        ({"family": ["cae"]}, "config.json"),
        ({"family": None}, "config.json"),
        ({"pool": "cls"}, "config.json"),
        ({"pool": ["mean"]}, "pool is ['mean']"),
        ({"rel_pos": False}, "config.json"),
        ({"drop_path": 1e300}, "drop_path"),
        ({"encoder": "tiny,depth=24,embed_dim=12288"}, "config.json"),
        ({"encoder": 3}, "encoder is 3"),
        ({"img_size": 1 << 24}, "config.json"),
        ({"img_size": 64}, "config.json"),
    ],
)
def test_a_forged_config_is_named(changes: dict[str, Any], told: str, world: World) -> None:
    path = world.run / "config.json"
    record = json.loads(path.read_text())
    record["config"] |= changes
    path.write_text(json.dumps(record))
    ran = world.attack("eval")
    assert ran.status in (1, 2)
    assert "config.json" in ran.line
    assert told in ran.line
    assert "config.json" in world.load()
    assert world.attack("resume").status == 1


@pytest.mark.slow
@pytest.mark.parametrize("examples", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["eval", "resume"])
def test_config_changed_at_random(command: str, examples: int, world: World, origin: Path) -> None:
    @settings(max_examples=examples, suppress_health_check=CHECKS)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        shutil.rmtree(world.root)
        fresh = World(world.root, origin)
        path = fresh.run / "config.json"
        path.write_text(json.dumps(data.draw(hostile.mutations(json.loads(path.read_text())))))
        fresh.attack(command)
        fresh.load()

    attacked()
