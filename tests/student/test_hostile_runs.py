"""A run folder from an attacker: each command ends well or with one line, soon, runs nothing and
touches nothing but the run's own folder.

What a run folder holds is changed at random places: config.json, rows of metrics, checkpoints, and
the files that `student replay` reads.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from student import checkpoint, recipes
from student.cli import cli
from student.config import as_dict, from_overrides
from tests import hostile_json as hostile
from tests import student_fixtures as fx

# few by default, many where minutes are given
EXAMPLES = pytest.mark.parametrize("examples", [2, pytest.param(16, marks=pytest.mark.slow)])
CHECKS = list(HealthCheck)  # a fixture serves all examples, and some of them are slow
TRAINED = ("--cache", fx.cache_path, "--steps", "2", "--batch-size", "8", "--device", "cpu")
TENSORS = (
    torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.ones(2, 2), torch.full((1,), torch.nan),
    torch.zeros(1, dtype=torch.int8), torch.zeros(1).to(torch.float8_e4m3fn),
    torch.zeros(()).bool(),
)  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, and a file of nonfinite/."""
    run = tmp_path_factory.mktemp("origin") / "run"
    fx.good(fx.train("mae", run, *arguments(TRAINED)[:-2], "--ema", "0.9"))
    (run / "nonfinite").mkdir()
    write_reproducer(run / "nonfinite/step-00000001.safetensors", about(), content())
    return run


def arguments(given: tuple[Any, ...]) -> list[str]:
    return [str(each() if callable(each) else each) for each in given]


def about() -> dict[str, Any]:
    return {
        "format": 1, "recipe": "mae", "config": as_dict(_config()), "seed": 0, "precision": "no",
        "step": 1, "micro": 0, "rank": 0, "draw_seed": 5, "keys": ["a", "b"],
        "parts": {"loss": "nan", "pixel": "nan"},
    }  # fmt: skip


def _config() -> Any:
    sets = [*fx.RECIPES["mae"], "img_size=32", "patch_size=8"]
    return from_overrides(recipes.load("mae").Config, sets)


def content() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.arange(16).repeat(2, 1)
    batch = {"images": torch.rand(2, 3, 32, 32), "ids_keep": ids[:, :4], "ids_masked": ids[:, 4:]}
    model = recipes.load("mae").Model(_config()).state_dict()
    named = {f"model.{name}": value for name, value in model.items()}
    named |= {f"batch.{name}": value for name, value in batch.items()}
    return {name: value.contiguous().clone() for name, value in named.items()}


def write_reproducer(path: Path, facts: Any, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"about": json.dumps(facts)})


class World:
    """A run that is attacked, and files beside it that are nobody's to touch."""

    def __init__(self, root: Path, origin: Path) -> None:
        self.root, self.run = root, root / "runs/odd"
        shutil.copytree(origin, self.run)
        for folder in (root, self.run.parent):
            (folder / "trap").write_text("not yours")

    def command(self, name: str) -> list[str]:
        sets = [part for text in fx.RECIPES["mae"] for part in ("--set", text)]
        trained = ["train", "--recipe", "mae", "--out", str(self.run), *arguments(TRAINED), *sets]
        replayed = str(self.run / "nonfinite/step-00000001.safetensors")
        return {
            "resume": [*trained, "--ema", "0.9", "--resume"],
            "again": trained,
            "eval": ["eval", "knn", str(self.run), "--images", str(labelled()), "--k", "1",
                     "--device", "cpu"],
            "eval ema": ["eval", "knn", str(self.run), "--images", str(labelled()), "--k", "1",
                         "--device", "cpu", "--ema"],
            "replay": ["replay", replayed, "--device", "cpu"],
            "config": [*arguments(("train", "--recipe", "mae", *TRAINED)), "--out",
                       str(self.run.parent / "new"), "--config", str(self.run / "config.json"),
                       "--dry-run"],
        }[name]  # fmt: skip

    def attack(self, name: str) -> hostile.Outcome:
        """Run a command; nothing but the run may change, and no file that it names may run."""
        fx.fresh_state()
        with hostile.unchanged(self.root, self.run, self.run.parent / "new"):
            ran = hostile.run(cli, self.command(name))
        hostile.assert_one_line(ran)
        return ran


def labelled() -> Path:
    folder = fx.root() / "labelled"
    return folder if folder.exists() else fx.save_pictures(folder, 8, classes=2)


@pytest.fixture
def world(tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEATCACHE_IMAGES", raising=False)
    labelled()
    monkeypatch.chdir(tmp_path)
    return World(tmp_path / "world", origin)


@pytest.fixture
def fresh(tmp_path: Path, origin: Path, world: World) -> Any:
    """Make a new world for an example."""

    def make() -> World:
        shutil.rmtree(world.root)
        return World(world.root, origin)

    return make


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("command", ["resume", "eval", "eval ema", "replay", "config"])
def test_the_run_as_it_is_serves_every_command(command: str, world: World) -> None:
    assert world.attack(command).status == 0


@pytest.mark.slow_after(1)
@EXAMPLES
@pytest.mark.parametrize("command", ["resume", "eval", "config"])
def test_config_json(command: str, examples: int, fresh: Any) -> None:
    @settings(max_examples=examples, suppress_health_check=CHECKS)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        world = fresh()
        path = world.run / "config.json"
        if data.draw(st.integers(0, 3)):
            value = data.draw(hostile.mutations(json.loads(path.read_text())))
            path.write_text(json.dumps(value))
        else:
            path.write_bytes(data.draw(hostile.raw_bytes(path.read_bytes())))
        world.attack(command)

    attacked()


@pytest.mark.slow
@EXAMPLES
def test_rows_of_metrics(examples: int, fresh: Any) -> None:
    @settings(max_examples=examples, suppress_health_check=CHECKS)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        world = fresh()
        path = world.run / "metrics.jsonl"
        if data.draw(st.booleans()):
            first, *rest = path.read_text().splitlines()
            first = json.dumps(data.draw(hostile.mutations(json.loads(first))))
            path.write_text("\n".join([first, *rest]) + "\n")
        else:
            path.write_bytes(data.draw(hostile.raw_bytes(path.read_bytes())))
        world.attack("resume")

    attacked()


@st.composite
def objects(draw: st.DrawFn, value: dict[str, Any]) -> Any:
    """Change a checkpoint at one place: a tensor or a value of another kind, a name, nothing."""
    places = sorted(set(hostile.places(value)) - {()}, key=repr)
    depth = draw(st.integers(1, max(map(len, places))))
    where = draw(st.sampled_from([each for each in places if len(each) >= depth]))
    what = draw(st.sampled_from(("tensor", "value", "name", "nothing")))
    if what == "tensor":
        return hostile.changed(value, where, draw(st.sampled_from(TENSORS)))
    if what == "value":
        return hostile.changed(value, where, draw(hostile.hostile))
    if what == "name":
        return hostile.renamed(value, where, draw(st.sampled_from(hostile.NAMES)))
    return hostile.removed(value, where)


@pytest.mark.slow
@EXAMPLES
@pytest.mark.parametrize("command", ["resume", "eval", "eval ema"])
def test_checkpoints(command: str, examples: int, fresh: Any) -> None:
    @settings(max_examples=examples, suppress_health_check=CHECKS)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        world = fresh()
        path = world.run / "checkpoints/step-00000002.pt"
        if data.draw(st.integers(0, 4)):
            torch.save(data.draw(objects(torch.load(path, weights_only=True))), path)
        else:
            path.write_bytes(data.draw(hostile.raw_bytes(path.read_bytes())))
        world.attack(command)

    attacked()


@EXAMPLES
def test_reproducers(examples: int, fresh: Any) -> None:
    @settings(max_examples=examples, suppress_health_check=CHECKS)
    @given(st.data())
    def attacked(data: st.DataObject) -> None:
        world = fresh()
        path = world.run / "nonfinite/step-00000001.safetensors"
        facts, tensors = about(), content()
        what = data.draw(st.integers(0, 3))
        if what == 0:
            path.write_bytes(data.draw(hostile.raw_bytes(path.read_bytes())))
        elif what == 1:
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = data.draw(st.sampled_from(TENSORS)).clone()
            write_reproducer(path, facts, tensors)
        else:
            write_reproducer(path, data.draw(hostile.mutations(facts)), tensors)
        world.attack("replay")

    attacked()


# ------------------------------------------------------------ cases by hand


@pytest.mark.parametrize(
    "name",
    ["config.json", "metrics.jsonl", "environment.json", "checkpoints", "nonfinite", "tracking"],
)
def test_a_link_in_a_run_folder_leads_nowhere(name: str, world: World) -> None:
    place, elsewhere = world.run / name, world.root / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.mkdir()
    place.symlink_to(elsewhere)
    ran = world.attack("resume")
    assert ran.status == 1
    assert f"{name}' is a link" in ran.line


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_link_to_nothing_makes_no_file_elsewhere(name: str, world: World) -> None:
    place = world.run / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(world.root / "made")
    assert "is a link" in world.attack("resume").line
    assert not (world.root / "made").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(name: str, world: World) -> None:
    (world.run / name).unlink(missing_ok=True)
    os.mkfifo(world.run / name)
    assert f"{name}' is no plain file" in world.attack("resume").line


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("what", ["model", "exp_avg"])
@pytest.mark.parametrize("command", ["resume", "eval"])
def test_quantised_values_in_a_checkpoint_are_one_line(
    what: str, command: str, world: World
) -> None:
    path = checkpoint.list_checkpoints(world.run)[-1]
    saved = torch.load(path, weights_only=True)
    values = saved["model"] if what == "model" else saved["optimizer"]["state"][0]
    name = next(key for key in values if key == what or what == "model")
    values[name] = values[name].to(torch.float8_e4m3fn)
    torch.save(saved, path)
    ran = world.attack(command)
    if (what, command) != ("exp_avg", "eval"):
        assert path.name in ran.line


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"architectures": ["CLIPModel"], "model_type": "clip"}', "is not of a run"),
        ("[]", "a list"), ("[" * 100_000, "nested"), ('{"config": NaN}', "NaN"), ("", "Expecting"),
        ('{"recipe": "mae", "config": []}', "is not of a run"),
        ('{"recipe": 3, "config": {}}', "is not of a run"),
        ('{"recipe": "mae", "config": {}}', "encoder is None"),
        ('{"recipe": "mae", "config": {"encoder": "tiny", "img_size": 1e9, "patch_size": 8}}',
         "img_size"),
        ('{"recipe": "mae", "config": {"encoder": "tiny", "img_size": 33, "patch_size": 8}}',
         "no multiple"),
        ('{"recipe": "x", "config": {"encoder": "./x.py", "img_size": 32, "patch_size": 8}}',
         "unknown encoder"),
        ('{"recipe": "mae", "config": {"encoder": "tiny,depth=24,embed_dim=12288", '
         '"img_size": 32, "patch_size": 8}}', "config.json"),
        ('{"recipe": "mae", "config": {"encoder": "tiny", "img_size": 32, "patch_size": 8, '
         '"family": "../x"}}', "family"),
    ],
)  # fmt: skip
def test_a_config_of_another_program_is_named(text: str, told: str, world: World) -> None:
    (world.run / "config.json").write_text(text)
    ran = world.attack("eval")
    assert ran.status in (1, 2)
    assert "config.json" in ran.line
    assert told in ran.line


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "other name"])
def test_a_checkpoint_that_is_no_file(kind: str, world: World) -> None:
    path = world.run / "checkpoints/step-00000009.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    else:
        shutil.copy(world.run / "checkpoints/step-00000002.pt", path)
    ran = world.attack("eval")
    assert ran.status == (1 if kind in ("empty", "other name") else 0)
    if kind == "other name":
        assert "holds step 2, its name another" in ran.line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step-x.pt", "step--1.pt", "step-00000001.pt.bak", "step-9.pt"])
def test_other_names_are_no_checkpoints(name: str, world: World) -> None:
    (world.run / "checkpoints" / name).write_text("mine")
    for command in ("eval", "resume"):
        assert world.attack(command).status == 0
    assert (world.run / "checkpoints" / name).read_text() == "mine"


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("group", "value"), [("weight_decay", 0.5), ("betas", (0.1, 0.2)), ("eps", 1.0)]
)
def test_settings_of_the_optimizer_come_from_the_run(group: str, value: Any, world: World) -> None:
    """A checkpoint's own would change all that follows, and nobody said so."""
    path = world.run / "checkpoints/step-00000002.pt"
    saved = torch.load(path, weights_only=True)
    saved["optimizer"]["param_groups"][0][group] = value
    torch.save(saved, path)
    ran = world.attack("resume")
    assert ran.status == 1
    assert "another optimizer's settings" in ran.line


def test_a_recipe_that_a_run_names_is_not_run(world: World) -> None:
    """`student eval` needs no recipe, and the others take it from the command line."""
    mine = world.root / "x.py"
    mine.write_text(f"open({str(world.run / 'ran')!r}, 'w')")
    path = world.run / "config.json"
    record = json.loads(path.read_text())
    record["recipe"] = str(mine)
    record["config"]["teacher"] = str(mine)
    path.write_text(json.dumps(record))
    reproducer = world.run / "nonfinite/step-00000001.safetensors"
    write_reproducer(reproducer, {**about(), "recipe": str(mine)}, content())
    assert world.attack("eval").status == 0
    assert world.attack("resume").status == 1
    ran = world.attack("replay")
    assert ran.status == 2
    assert "brings no code" in ran.line
    world.attack("config")
    assert not (world.run / "ran").exists()
