"""A loss that is not finite stops the run, its batch is kept and run again, and some may be left
out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

import student.training.train
from featcache.pictures.open_source import open_source
from featcache.views.draw import draw_views
from featcache.views.policy import load_policy
from featcache.views.render import render
from student import checkpoint
from student.config import RecipeConfig
from student.training import metrics, nonfinite, optim, train_state
from student.training.train_state import RunOptions, TrainState
from tests import processes
from tests import student_fixtures as fx

# A recipe whose loss is infinite for one picture alone: `bright` is the only one with a channel
# mean above `limit`.
BRIGHT = '''"""Mine."""
import torch
from pydantic.dataclasses import dataclass
from student.models import vit
from student.config import CHECKED, RecipeConfig
from student.recipes import TargetSpec

@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    limit: float = 2.0
    patience: int = 0  # steps that are fine whatever the picture

def needs(config):
    return TargetSpec(teacher="", levels=(), fields=(), patches=config.patches)

class Head(torch.nn.Module):
    def forward(self, x, bad):
        return x / (1 - bad)

class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = vit.build(
            config.encoder, img_size=config.img_size, patch_size=config.patch_size,
            drop_path=config.drop_path)
        self.limit = config.limit
        self.head = Head()

    def no_weight_decay(self):
        return set()

    def forward(self, batch):
        outputs = vit.encode(self.encoder, batch["images"], batch["ids_keep"])
        bad = (batch["images"].mean((1, 2, 3)) > self.limit).float()
        loss = (self.head(outputs[-1].pow(2).mean((1, 2)), bad)).mean()
        return {"loss": loss, "plain": outputs[-1].mean().detach()}
'''


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, one of them white all over."""
    from PIL import Image

    place = fx.save_pictures(tmp_path_factory.mktemp("bright") / "pictures", 12)
    for path in sorted(place.iterdir())[7:8]:
        Image.new("RGB", (48, 48), (255, 255, 255)).save(path)
    return place


def words(tmp_path: Path, pictures: Path, run: Path, *options: object) -> tuple[object, ...]:
    (tmp_path / "mine.py").write_text(BRIGHT)
    sets = [
        part for text in (*fx.COMMON, "patch_size=8", "drop_path=0.2") for part in ("--set", text)
    ]
    given = (
        "--recipe",
        tmp_path / "mine.py",
        "--images",
        pictures,
        "--policy",
        fx.policy_file(),
        "--out",
        run,
    )
    return (*given, "--batch-size", 4, *sets, *options)


def train(tmp_path: Path, pictures: Path, run: Path, *options: object) -> fx.Ran:
    return fx.stud(
        "train",
        "--device",
        "cpu",
        *words(tmp_path, pictures, run, *options),
        home=tmp_path / "home",
    )


def first_bad_step(run: Path) -> int:
    return next(row["step"] for row in metrics.read(run) if isinstance(row["loss"], str))


@pytest.fixture
def stopped(tmp_path: Path, pictures: Path) -> tuple[Path, fx.Ran]:
    """A run that stopped in its second or a later step (the seed is chosen so), and what it
    said."""
    run = tmp_path / "run"
    for seed in range(10):
        ran = train(tmp_path, pictures, run, "--steps", 3, "--save-every", 1, "--seed", seed)
        assert ran.status == 1
        if first_bad_step(run) > 1:
            return run, ran
        run = tmp_path / f"run{seed}"
    raise AssertionError("the white picture is first in every order")


def test_the_reproducer_holds_that_very_micro_batch(
    stopped: tuple[Path, fx.Ran], pictures: Path, tmp_path: Path
) -> None:
    run, ran = stopped
    step = first_bad_step(run)
    (path,) = (run / "nonfinite").iterdir()
    assert path.name == f"step-{step:08d}.safetensors"
    assert f"loss is inf at step {step}" in ran.line
    assert f"`student replay {path}`" in ran.line
    assert "p07" in ran.line
    with safe_open(str(path), "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (about["step"], about["micro"], about["rank"]) == (step, 0, 0)
    assert "p07" in about["keys"]
    # weights: those of the step before, which its checkpoint has
    saved = torch.load(run / f"checkpoints/step-{step - 1:08d}.pt", weights_only=True)["model"]
    assert {name for name in tensors if name.startswith("model.")} == {
        f"model.{name}" for name in saved
    }
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in saved.items())
    # pictures: drawn here anew from keys, by the policy, in float64
    policy, source = load_policy(str(fx.policy_file())), open_source(str(pictures))
    from featcache import rng
    from featcache.pictures.decode import decode

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for i, key in enumerate(about["keys"]):
        picture = decode(source.read(list(source.keys).index(key)))
        size = np.array([(picture.height, picture.width)])
        drawn = draw_views(policy, rng.key_digests([key]), size, [0])  # epoch 0 shows view 0
        pixels = render(
            picture, drawn.crop[0, 0], drawn.flip[0, 0], drawn.jitter[0, 0], 32, policy.filter
        )
        expected = (pixels / 255 - mean) / std
        np.testing.assert_allclose(
            tensors["batch.images"][i].permute(1, 2, 0).numpy(), expected, atol=1e-5
        )


@pytest.mark.slow
def test_replay_runs_it_again(stopped: tuple[Path, fx.Ran], tmp_path: Path) -> None:
    """The same parts to the bit, drop path drawn alike, and the module where it begins."""
    run, _ = stopped
    row = next(row for row in metrics.read(run) if isinstance(row["loss"], str))
    (path,) = (run / "nonfinite").iterdir()
    ran = fx.good(
        fx.stud("replay", path, "--recipe", tmp_path / "mine.py", "--device", "cpu", "--json")
    )
    facts = ran.json
    assert facts["parts"]["plain"] == facts["parts_then"]["plain"] == row["plain"]
    assert facts["first_nonfinite_module"] == "head"
    assert facts["nonfinite_weights"] == facts["nonfinite_inputs"] == []
    assert "encoder.blocks.3.mlp.fc2.weight" in facts["nonfinite_gradients"]
    assert all("decoder" not in name for name in facts["nonfinite_gradients"])
    told = fx.good(fx.stud("replay", path, "--recipe", tmp_path / "mine.py", "--device", "cpu")).out
    assert "loss: inf then, inf now" in told
    assert "first module with an output that is not finite: head" in told
    other = fx.good(fx.stud("replay", path, "--recipe", tmp_path / "mine.py", "--device", "cpu",
                            "--json", "--precision", "bf16")).json  # fmt: skip
    assert other["parts"]["plain"] != facts["parts"]["plain"]


@pytest.mark.slow
def test_a_reproducer_runs_no_code_and_says_what_is_missing(
    stopped: tuple[Path, fx.Ran], tmp_path: Path
) -> None:
    run, _ = stopped
    (path,) = (run / "nonfinite").iterdir()
    ran = fx.stud("replay", path, "--device", "cpu")
    assert (ran.status, "--recipe" in ran.line, "brings no code" in ran.line) == (2, True, True)
    ran = fx.stud("replay", path, "--recipe", "mae", "--device", "cpu")
    assert ran.status == 1
    assert "do not fit" in ran.line
    ran = fx.stud(
        "replay", path, "--recipe", tmp_path / "mine.py", "--device", "cpu", "--precision", "fp8"
    )
    assert (ran.status, "fp8" in ran.line) == (2, True)


@pytest.mark.parametrize("content", ["nothing", "text", "foreign", "later"])
def test_other_files_are_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if content == "text":
        path.write_text("hello")
    elif content != "nothing":
        about = {"format": 99} if content == "later" else None
        save_file({"a": torch.zeros(2)}, str(path), metadata=about and {"about": json.dumps(about)})
    ran = fx.stud("replay", path)
    assert ran.status == 1
    assert str(path) in ran.line


@pytest.mark.slow
def test_two_processes_the_one_that_had_it_keeps_it(tmp_path: Path, pictures: Path) -> None:
    """The loss of all is not finite; the micro-batch is that of one, the second of its two."""
    run = tmp_path / "run"
    options = ("--batch-size", 2, "--accumulate", 2, "--steps", 1)
    found = {}
    for seed in range(6):
        ran = processes.train(
            2, *words(tmp_path, pictures, run / str(seed), *options, "--seed", seed)
        )
        if ran.status == [0, 0]:
            continue  # one of the four that are left out of the epoch
        assert ran.status == [1, 1], ran.said
        assert all("loss is inf at step 1" in said for said in ran.said)
        (path,) = (run / str(seed) / "nonfinite").iterdir()
        with safe_open(str(path), "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert "p07" in about["keys"]
        assert len(about["keys"]) == 2
        assert path.name == f"step-00000001{'-rank1' if about['rank'] else ''}.safetensors"
        assert all(f"`student replay {path}`" in said for said in ran.said)
        assert "p07" in ran.said[about["rank"]]
        assert f"(pictures those of process {about['rank']})" in ran.said[1 - about["rank"]]
        facts = fx.good(
            fx.stud("replay", path, "--recipe", tmp_path / "mine.py", "--device", "cpu", "--json")
        ).json
        then = facts["parts_then"]["plain"]
        assert facts["parts"]["plain"] == pytest.approx(then, rel=1e-6)
        found[about["rank"], about["micro"]] = seed
        if len(found) == 2:
            return
    raise AssertionError(found)


def test_a_loss_that_is_finite_the_second_time(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batch, weights and draws give another number: that is the machine's fault, and no
    file would help."""
    plain, once = student.training.train._gradients, [True]

    def faulty(*args: Any) -> Any:
        parts, waited, keys = plain(*args)
        if args[-1] == 0 and once.pop():
            parts = {**parts, "loss": parts["loss"] * float("nan")}
        return parts, waited, keys

    monkeypatch.setattr(student.training.train, "_gradients", faulty)
    others = fx.pictures()  # none is white
    ran = train(tmp_path, others, tmp_path / "run", "--steps", 1)
    assert ran.status == 1
    assert (
        "loss is nan at step 1 and finite when the step is run again: suspect the machine"
        in ran.line
    )
    assert not (tmp_path / "run/nonfinite").exists()


# --- left out -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_some_steps_may_be_left_out(tmp_path: Path, pictures: Path) -> None:
    """Twelve pictures in steps of four: the white one is in one step of each of four epochs."""
    run = tmp_path / "run"
    ran = fx.good(
        train(
            tmp_path,
            pictures,
            run,
            "--steps",
            12,
            "--save-every",
            1,
            "--skip-nonfinite",
            4,
            "--json",
        )
    )
    rows = metrics.read(run)
    bad = [row["step"] for row in rows if isinstance(row["loss"], str)]
    assert [(step - 1) // 3 for step in bad] == [0, 1, 2, 3]
    assert [row["skipped"] for row in rows] == [
        sum(each <= row["step"] for each in bad) for row in rows
    ]
    assert ran.json["skipped"] == 4
    assert ran.json["loss"] == rows[-1]["loss"]  # JSON, whatever it is
    assert checkpoint.load_latest(run)["skipped"] == 4
    assert all(value.isfinite().all() for value in fx.weights(run).values())
    assert len(list((run / "nonfinite").iterdir())) == 1  # of the first
    # the bound, over an interruption: the count is resumed
    cut = tmp_path / "cut"
    options = ("--steps", 12, "--save-every", 1)
    ran = train(tmp_path, pictures, cut, *options, "--skip-nonfinite", 2)
    assert ran.status == 1
    assert f"at step {bad[2]}" in ran.line
    assert "the 3 steps left out are more than --skip-nonfinite 2" in ran.line
    assert checkpoint.latest_step(cut) == bad[2] - 1
    ran = train(tmp_path, pictures, cut, *options, "--skip-nonfinite", 3, "--resume")
    assert f"at step {bad[3]}" in ran.line
    fx.good(train(tmp_path, pictures, cut, *options, "--skip-nonfinite", 4, "--resume"))
    assert fx.same_weights(cut, run)


@pytest.mark.slow
def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, pictures: Path) -> None:
    """Weights, moments, counts of steps and the average are those of the checkpoint before it."""
    run = tmp_path / "run"
    options = ("--steps", 12, "--skip-nonfinite", 9, "--ema", 0.9, "--save-every", 1)
    fx.good(train(tmp_path, pictures, run, *options, "--keep-checkpoints", 99))
    bad = next(
        step
        for step in (row["step"] for row in metrics.read(run) if isinstance(row["loss"], str))
        if step > 1
    )
    before, after = (
        torch.load(run / f"checkpoints/step-{s:08d}.pt", weights_only=True) for s in (bad - 1, bad)
    )
    for part in ("model", "ema"):
        assert all(torch.equal(before[part][name], value) for name, value in after[part].items())
    for number, state in after["optimizer"]["state"].items():
        assert all(
            torch.equal(before["optimizer"]["state"][number][name], value)
            for name, value in state.items()
        )


# --- on a GPU the host does not wait --------------------------------------------------------------


def test_the_fused_kernel_holds_the_weights_from_the_first_bad_loss_on() -> None:
    """The kernel of the CPU takes the same flag: weights and moments stay, without the host having
    looked."""
    fx.fresh_state()
    acc = Accelerator(cpu=True)
    module = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    model, optimizer = acc.prepare(module, optimizer)
    state = TrainState(acc, module, model, optimizer, RunOptions())
    assert state._held is None  # a CPU looks at each loss
    state._held = torch.zeros(())
    seen = []
    for factor in (1.0, 1.0, float("nan"), 1.0, 1.0):
        loss = (model(torch.ones(2, 3)) * factor).mean()
        acc.backward(loss)
        assert state.update(loss, 0)
        seen.append([value.detach().clone() for value in module.parameters()])
    assert not torch.equal(seen[0][0], seen[1][0])
    for later in seen[2:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[1], later, strict=True))


def test_losses_that_arrive_late_still_give_the_right_reproducer(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rows are looked at 16 steps later, the kernel holds the weights, the reproducer
    is the same."""

    def fused(model: torch.nn.Module, config: RecipeConfig, lr: float) -> torch.optim.AdamW:
        groups = optim.param_groups(model, config.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)

    monkeypatch.setattr(optim, "adamw", fused)
    options = ("--steps", 9, "--save-every", 9, "--seed", 2)
    train(tmp_path, pictures, tmp_path / "prompt", *options)
    build = train_state.build_train_state

    def late(*args: object) -> TrainState:
        state = build(*args)  # type: ignore[arg-type]
        state._held = torch.zeros(())
        return state

    plain = student.training.train.Metrics
    monkeypatch.setattr(train_state, "build_train_state", late)
    monkeypatch.setattr(
        student.training.train, "Metrics", lambda run, lag, log: plain(run, 16, log)
    )
    ran = train(tmp_path, pictures, tmp_path / "late", *options)
    step = first_bad_step(tmp_path / "prompt")
    assert f"loss is inf at step {step}" in ran.line
    assert len(metrics.read(tmp_path / "late")) == 9  # it went on, without effect
    one, two = (
        nonfinite.load(next((tmp_path / name / "nonfinite").iterdir()))
        for name in ("prompt", "late")
    )
    assert one.about == two.about
    for a, b in ((one.model, two.model), (one.batch, two.batch)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
