"""A probe touches nothing of a run: losses, weights and checkpoints are those without it, to the
bit; its own numbers are computed again from the checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featcache import teachers
from featcache.errors import UserError
from featcache.views.render import render_centre
from student import checkpoint, recipes
from student.features.online import ProbeRows
from student.models import vit
from student.setup import probe_inputs
from student.training import metrics, online_probe, set_aside, trackers
from student.training.online_probe import OnlineProbe, ProbePlan
from tests import processes
from tests import student_fixtures as fx
from tests.student.test_masking import numpy_words
from tests.student.training.test_fsdp import TWO
from tests.student.training.test_train_exact import stops_after

SMALL = ("--batch-size", 8)
HALVES = ("drop_path=0.5",)
SCORES = {"probe_knn", "probe_linear", "rankme", "probe_s"}

# Draws from every global generator in training, keeps running statistics, and predicts a level.
MINE = '''"""Mine."""
import random
import numpy as np
import torch
from pydantic.dataclasses import dataclass
from student.models import vit
from student.config import CHECKED, RecipeConfig
from student.recipes import TargetSpec

@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(RecipeConfig):
    drop_path: float = 0.5

def needs(config):
    return TargetSpec(
        teacher=config.teacher, levels=(4,), fields=("features",), patches=config.patches)

class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = vit.build(config.encoder, img_size=config.img_size,
                                 patch_size=config.patch_size, drop_path=config.drop_path)
        self.rest, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(48)
        self.head = torch.nn.Linear(48, 24)
        self.frozen = torch.nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def no_weight_decay(self):
        return set()

    def _predict(self, batch):
        assert not self.frozen.training
        noise = torch.rand(()) + np.random.rand() + random.random()
        tokens = self.rest(self.encoder.forward_features(batch["images"]))[:, 1:]
        return self.head(self.norm(tokens.flatten(0, 1))).view(len(tokens), 16, 24) * (1 + noise)

    def predictions(self, batch):
        return {"cosine_4": (self._predict(batch), batch["features"][:, 0, 1:])}

    def forward(self, batch):
        return {"loss": (self._predict(batch) - batch["features"][:, 0, 1:]).square().mean()}
'''
# numpy's and Python's generators are nobody's to seed but the recipe's
SEEDED = "\nnp.random.seed(1)\nrandom.seed(1)\ntorch.manual_seed(1)\n"


@functools.cache
def labelled() -> Path:
    """40 pictures of four classes, 5 + 5 of each."""
    return fx.save_pictures(fx.root() / "probed", 40, seed=3, classes=4)


def probe(every: int | None = 1) -> tuple[Any, ...]:
    return ("--probe", labelled(), *(("--probe-every", every) if every else ()))


def ran(
    tmp_path: Path,
    name: str,
    *options: Any,
    recipe: str = "maskalign",
    sets: tuple[str, ...] = HALVES,
) -> Path:
    cache = () if "--cache" in options else ("--cache", fx.cache_of(recipe))
    fx.good(fx.train(recipe, tmp_path / name, *cache, *SMALL, *options, sets=sets))
    return tmp_path / name


def mine(tmp_path: Path, name: str, *options: Any) -> Path:
    (tmp_path / "mine.py").write_text(MINE + SEEDED)
    sets = [part for text in fx.COMMON for part in ("--set", text)]
    words = ("--recipe", tmp_path / "mine.py", "--out", tmp_path / name, "--device", "cpu", *sets)
    fx.good(fx.stud("train", *words, "--cache", fx.cache_path(), *SMALL, *options))
    return tmp_path / name


def without_probe(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, less what a probe adds and what a clock gives."""
    timed = set(metrics.CLOCKS)
    return [
        {
            name: value
            for name, value in row.items()
            if name not in SCORES | timed and not name.startswith("cosine_")
        }
        for row in metrics.read(run)
    ]


def probed(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> what a probe added to its row."""
    plain = without_probe(run)
    found = {
        row["step"]: {name: row[name] for name in row.keys() - kept.keys()}
        for row, kept in zip(metrics.read(run), plain, strict=True)
    }
    timed = set(metrics.CLOCKS)
    return {
        step: {name: value for name, value in values.items() if name not in timed}
        for step, values in found.items()
        if values.keys() - timed
    }


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A checkpoint's leaves by their dotted names."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, each in items for k, v in flat(each, f"{name}.{key}").items()}
    return {name: value}


def assert_same(a: Path, b: Path) -> None:
    """Every number that is not a probe's or a clock's, and every leaf of the checkpoint."""
    assert without_probe(a) == without_probe(b)
    one, two = (flat(checkpoint.load_latest(run)) for run in (a, b))
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        assert same, name
    assert checkpoint.read_config(a) == checkpoint.read_config(b)


# --- nothing of the run changes -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(fx.RECIPES))
def test_every_recipe_makes_the_same_numbers_with_a_probe(recipe: str, tmp_path: Path) -> None:
    """Drop path at a half, an average of the weights; probes after steps 3, 6 and the last."""
    options = ("--steps", 7, "--ema", 0.9)
    plain = ran(tmp_path, "plain", *options, recipe=recipe)
    watched = ran(tmp_path, "watched", *options, *probe(), recipe=recipe)
    assert_same(plain, watched)
    found = probed(watched)
    assert list(found) == [3, 6, 7]
    levels = {
        "maskalign": {"cosine_2", "cosine_3", "cosine_4"},
        "mralign": {"cosine_2", "cosine_3", "cosine_4"},
        "mae": set(),
        "cae": set(),
        "fd": {"cosine_fd"},
        "mrmae": {"cosine_fd"},
    }.get(recipe, {"cosine_f"})
    for values in found.values():
        assert values.keys() == SCORES | levels
        assert all(math.isfinite(value) for value in values.values())
        assert all(-1 <= values[name] <= 1 for name in levels)
    assert probed(plain) == {}


@pytest.mark.slow
def test_a_recipe_that_draws_and_keeps_statistics_is_left_alone(tmp_path: Path) -> None:
    """Dropout and its own draws of torch, numpy and Python; BatchNorm's running mean is in the
    checkpoint; a module that the recipe keeps in eval mode stays in it."""
    plain = mine(tmp_path, "plain", "--steps", 7)
    watched = mine(tmp_path, "watched", "--steps", 7, *probe())
    assert_same(plain, watched)
    assert "norm.running_mean" in fx.weights(watched)
    assert list(probed(watched)) == [3, 6, 7]


@pytest.mark.slow
def test_the_comparison_sees_a_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the generators' being kept the two runs differ."""
    plain = mine(tmp_path, "plain", "--steps", 7)
    for module in (online_probe, set_aside):
        monkeypatch.setattr(module, "generators_kept", lambda device: torch.no_grad())
    watched = mine(tmp_path, "watched", "--steps", 7, *probe())
    assert without_probe(plain) != without_probe(watched)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["with", "without"])
def test_interrupted_and_resumed_with_a_probe_or_without(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps, then five: one part with the probe and one without is the whole run."""
    whole = ran(tmp_path, "whole", "--steps", 9)
    before, after = (probe(), ()) if first == "with" else ((), probe())
    with monkeypatch.context() as patch:
        stops_after(patch, 4)
        given = ("--cache", fx.cache_path(), *SMALL, "--steps", 9)
        assert fx.train("maskalign", tmp_path / "cut", *given, *before, sets=HALVES).status == 75
    ran(tmp_path, "cut", "--steps", 9, "--resume", *after)
    assert_same(whole, tmp_path / "cut")
    assert list(probed(tmp_path / "cut")) == ([3] if first == "with" else [6, 9])


@pytest.mark.slow
@pytest.mark.parametrize("sets", [HALVES, (*HALVES, "target_norm=bn")])
def test_two_processes_make_the_same_numbers(sets: tuple[str, ...], tmp_path: Path) -> None:
    """The first probes, the other waits; with target_norm=bn targets of a step are a collective."""
    for name, given in (("plain", ()), ("watched", probe())):
        options = ("--cache", fx.cache_path(), "--batch-size", 4, "--steps", 6, *given)
        done = processes.train(2, *options, "--out", tmp_path / name, recipe="maskalign", sets=sets)
        processes.good(done)
        assert ["note: probe:" in said for said in done.said] == [bool(given), False]
    assert_same(tmp_path / "plain", tmp_path / "watched")
    assert list(probed(tmp_path / "watched")) == [3, 6]


# --- its own numbers ------------------------------------------------------------------------------


def held_out(seed: int = 0) -> list[str]:
    """The keys of the held-out pictures: of each class's ten the five of the lowest words."""
    keys = [f"c{i % 4}/p{i:02d}" for i in range(40)]
    word = {key: int(numpy_words(key, "probe", seed, 0, 1)[0]) for key in keys}
    of_class = [sorted((k for k in keys if k[:2] == f"c{c}"), key=word.__getitem__) for c in "0123"]
    return sorted((key for some in of_class for key in some[:5]), key=word.__getitem__)


def crops(keys: list[str], size: int = fx.SIZE) -> torch.Tensor:
    """uint8 (n,3,S,S)."""
    pictures = [Image.open(labelled() / f"{key}.png").convert("RGB") for key in keys]
    rendered = [render_centre(picture, size, 0.875, "bicubic") for picture in pictures]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)


def levels_of(pixels: torch.Tensor, wanted: tuple[int, ...]) -> list[np.ndarray]:
    """h = (y - mean) / sqrt(var + 1e-5) of the teacher's levels, float64."""
    ys = teachers.load(fx.TEACHER)(pixels, wanted)[0]
    arrays = [y.numpy().astype(np.float64) for y in ys]
    return [
        (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5) for y in arrays
    ]


def visible(key: str, count: int) -> list[int]:
    words = numpy_words(key, "mask:uniform", 0, 0, 16)
    return sorted(sorted(range(16), key=words.__getitem__)[:count])


def test_alignment_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """maskalign with mask=uniform: the last row's cosine of each level, from the saved weights, the
    teacher's own levels and the masks of epoch 0, token by token."""
    sets = ("mask=uniform", "drop_path=0")
    run = ran(tmp_path, "run", "--steps", 6, *probe(), sets=sets)
    given = checkpoint.read_config(run)["config"]
    module = recipes.load("maskalign")
    pairs = {name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
    settings = module.Config(**pairs)
    model = module.Model(settings).eval()
    model.load_state_dict(fx.weights(run))
    keys = held_out()
    pixels = crops(keys)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((pixels / 255).permute(0, 2, 3, 1) - mean).div(std).permute(0, 3, 1, 2)
    ids = torch.tensor([visible(key, settings.visible) for key in keys])
    assert len(keys) == 20
    with torch.no_grad():
        outputs = torch.stack(vit.encode(model.encoder, images, ids))  # (S,n,1+V,D)
    state = {name: value.double() for name, value in model.align.state_dict().items()}
    last = probed(run)[6]
    for i, (level, h) in enumerate(zip((2, 3, 4), levels_of(pixels, (2, 3, 4)), strict=True)):
        mixed = (state["mix"][i][:, None, None, None] * outputs.double()).sum(0)
        q = mixed @ state[f"adaptors.{level}.weight"].T + state[f"adaptors.{level}.bias"]
        cosines = []
        for n in range(len(keys)):
            tokens = [0, *(1 + ids[n]).tolist()]
            target = h[n][tokens]
            norms = np.linalg.norm(q[n], axis=-1) * np.linalg.norm(target, axis=-1)
            cosines.append((q[n].numpy() * target).sum(-1) / norms)
        assert last[f"cosine_{level}"] == pytest.approx(np.mean(cosines), abs=1e-3)
        assert abs(last[f"cosine_{level}"]) > 0.05


def still(tmp_path: Path, name: str, *options: Any, recipe: str = "maskalign") -> dict[str, Any]:
    """What a probe says after a step at a learning rate of 0: of the untrained student."""
    sets = ("warmup_epochs=1", "drop_path=0")
    run = ran(tmp_path, name, "--steps", 1, *probe(), *options, recipe=recipe, sets=sets)
    values = probed(run)[1]
    values.pop("probe_s")
    return values


@pytest.mark.slow
def test_any_way_to_the_teacher_gives_the_same_alignment(tmp_path: Path) -> None:
    """From the cache, with the teacher in the loop, and from a cache in a lossy codec: the targets
    are the teacher's own."""
    wide = "synthetic:levels=4,tokens=16,width=64,size=32"  # which a codec can rotate
    plain, lossy = (
        fx.extract(fx.pictures(), tmp_path / codec, "--codec", codec, teacher=wide)
        for codec in ("fp16", "q8")
    )
    cached = still(tmp_path, "cached", "--cache", plain)
    assert still(tmp_path, "online", "--cache", plain, "--teacher", "online") == cached
    assert still(tmp_path, "lossy", "--cache", lossy) == cached
    assert still(tmp_path, "both", "--cache", lossy, "--teacher", "online") == cached
    assert {name for name in cached if name.startswith("cosine_")}


@pytest.mark.slow
def test_the_teacher_of_absent_shards_is_that_of_the_probe(tmp_path: Path) -> None:
    """--fallback online: the same cosines, and the same losses as without a probe."""
    cache = fx.extract(fx.pictures(), tmp_path / "cache", "--rows-per-shard", "5")
    cached = still(tmp_path, "whole", "--cache", cache)
    shutil.rmtree(cache / "shards" / "000001.zarr")
    options = ("--cache", cache, "--fallback", "online", "--fallback-limit", 0.3)
    assert still(tmp_path, "some", *options) == cached
    plain = ran(tmp_path, "plain", *options, "--steps", 4)
    assert_same(plain, ran(tmp_path, "watched", *options, "--steps", 4, *probe()))


def test_a_teacher_that_cannot_be_had_leaves_alignment_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a note that names the option; where that was given it is an error."""

    def gone(*given: Any) -> Any:
        raise UserError("weights are gone")

    monkeypatch.setattr(probe_inputs, "load_teacher", gone)
    options = ("--cache", fx.cache_path(), *SMALL, "--steps", 1, *probe())
    done = fx.good(fx.train("kd", tmp_path / "run", *options))
    assert (
        "note: --probe leaves alignment out, as the teacher cannot be had: weights are gone; "
        "--weights FILE gives it" in done.err
    )
    assert probed(tmp_path / "run")[1].keys() == SCORES
    done = fx.train("kd", tmp_path / "other", *options, "--weights", "random:0")
    assert (done.status, done.line) == (1, "error: weights are gone")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_weights_of_a_cached_run_are_the_probes(tmp_path: Path) -> None:
    """They are compared with those of the cache; without a probe a cache wants none."""
    teacher = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=4,num_heads=2"
    cache = fx.extract(fx.pictures(), tmp_path / "cache", "--weights", "random:0", teacher=teacher)
    options = ("--cache", cache, *SMALL, "--steps", 1)
    done = fx.train("kd", tmp_path / "run", *options, "--weights", "random:5", *probe())
    assert done.status == 1
    assert "weights 'random:5' have hash" in done.line
    done = fx.train("kd", tmp_path / "run", *options, "--weights", "random:5")
    assert "does not go with a cache" in done.line
    fx.good(fx.train("kd", tmp_path / "run", *options, *probe()))  # those that the cache names
    assert "cosine_f" in probed(tmp_path / "run")[1]


# --- when -----------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(OnlineProbe):
    """A probe whose pictures cost nothing and whose probes take a second by a clock of ours."""

    cost = 1.0

    def _measure(self) -> dict[str, float]:
        self.clock.now += self.cost  # type: ignore[attr-defined]
        return {"probe_knn": 50.0}


def timed_probe(
    tmp_path: Path, every: int | None, total: int, per_epoch: int
) -> tuple[Timed, Clock]:
    from featcache.pictures.open_source import open_source

    source = open_source(labelled())
    none = np.zeros(1, np.int64)
    plan = ProbePlan(source, ProbeRows(none, none, none, none, 2), 32, every, lambda crops: [])
    encoder = SimpleNamespace(forward_features=None)
    state: Any = SimpleNamespace(
        module=SimpleNamespace(encoder=encoder), acc=SimpleNamespace(device=torch.device("cpu"))
    )
    clock = Clock()
    return Timed(plan, state, total, per_epoch, clock), clock


def probed_steps(tmp_path: Path, every: int | None, step_s: float, total: int) -> list[int]:
    """The steps of `total`, ten an epoch, that a probe follows."""
    own, clock = timed_probe(tmp_path, every, total, 10)
    found = []
    for step in range(1, total + 1):
        clock.now += step_s
        if own.after(step):
            found.append(step)
    return found


def test_three_per_cent_of_the_time(tmp_path: Path) -> None:
    """An epoch is 20 s, a probe one, and one was before the first step: with the next two seconds
    are spent, which is 3 % of 66.7 s, three of 100 s, four of 133.3 s."""
    assert probed_steps(tmp_path, None, 2.0, 70) == [40, 50, 70]


def test_the_last_step_keeps_to_the_budget_too(tmp_path: Path) -> None:
    """An epoch is 200 s: each end of one, and the step that a run ends with in the middle of one.
    A run of some seconds has none."""
    assert probed_steps(tmp_path, None, 20.0, 35) == [10, 20, 30, 35]
    assert probed_steps(tmp_path, None, 0.1, 35) == []


def test_a_probe_that_has_become_slow_waits_longer(tmp_path: Path) -> None:
    """The last cost counts: 10 s now, 1 + 1 + 10 spent, the next would make 22: 733 s."""
    own, clock = timed_probe(tmp_path, None, 10**6, 10)
    clock.now += 100
    own.cost = 10.0
    assert own.after(10)["probe_s"] == 10.0
    clock.now += 590  # of training, 690 in all: 21 spent with the next
    assert own.after(20) == {}
    clock.now += 20
    assert own.after(30)


def test_every_two_epochs_and_the_last_step(tmp_path: Path) -> None:
    assert probed_steps(tmp_path, 2, 1e-3, 55) == [20, 40, 55]
    assert probed_steps(tmp_path, 1, 1e-3, 20) == [10, 20]


def test_notes_say_pictures_time_and_share(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), *SMALL, "--steps", 4)
    done = fx.good(fx.train("kd", tmp_path / "run", *options, *probe(None)))
    first, last = (line for line in done.err.splitlines() if "probe" in line)
    assert first.startswith(
        f"note: probe: 20 + 20 held-out pictures of 4 classes of {labelled()}; after epochs, at "
        "most 3% of the time; "
    )
    assert "before the first step probe_knn " in first
    assert last.startswith("note: 1 probe took ")
    assert last.endswith("% of the time of training")
    assert probed(tmp_path / "run") == {}  # a second of training is not enough for one
    done = fx.good(fx.train("kd", tmp_path / "two", *options, *probe(2), "--dry-run"))
    assert "probe: 20 + 20 held-out pictures of 4 classes" in done.out
    assert "every 2 epochs and at the end" in done.out
    assert not (tmp_path / "two").exists()


def test_no_step_no_probe(tmp_path: Path) -> None:
    done = fx.train("kd", tmp_path / "run", "--cache", fx.cache_path(), "--steps", 0, *probe())
    assert "note: probe" not in fx.good(done).err


def test_a_tracker_gets_what_the_row_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(
        trackers, "start_trackers", lambda *given: contextlib.nullcontext(shown.append)
    )
    run = ran(tmp_path, "run", "--steps", 3, *probe(), recipe="kd")
    assert shown == metrics.read(run)
    assert shown[-1].keys() > SCORES


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (("--probe-every", 2), 2, "--probe-every 2 says how often --probe is done, which is not"),
        (("--probe", "labelled", "--probe-every", 0), 2, "--probe-every"),
        (("--probe", fx.pictures), 1, "its 24 pictures have no labels"),
        (("--probe", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_no_probe_can_be_made_of_is_told_before_training(
    options: tuple[Any, ...], status: int, text: str, tmp_path: Path
) -> None:
    given = [
        labelled() if each == "labelled" else each() if callable(each) else each for each in options
    ]
    done = fx.train("kd", tmp_path / "run", "--cache", fx.cache_path(), "--steps", 1, *given)
    assert done.status == status
    assert text in done.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_decoded_leaves_no_run(tmp_path: Path) -> None:
    broken = fx.save_pictures(tmp_path / "broken", 8, classes=2)
    (broken / "c1/p03.png").write_bytes(b"no picture")
    options = ("--cache", fx.cache_path(), *SMALL, "--steps", 1, "--probe", broken)
    done = fx.train("kd", tmp_path / "run", *options)
    assert (done.status, "cannot decode the picture 'c1/p03'" in done.line) == (1, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fsdp_is_refused(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--batch-size", 4, "--steps", 2, *probe())
    done = processes.train(
        2, *options, "--out", tmp_path / "run", recipe="kd", sets=HALVES, before=TWO
    )
    assert done.status == [2, 2]
    assert "--probe does not go with FSDP" in done.said[0]


def test_an_encoder_without_tokens_is_one_line(tmp_path: Path) -> None:
    bare = "self.plain, self.encoder = self.encoder, torch.nn.Identity()"
    text = MINE.replace("self.frozen = ", f"{bare}\n        self.frozen = ", 1)
    text = text.replace("self.encoder.forward_features", "self.plain.forward_features")
    (tmp_path / "mine.py").write_text(text)
    sets = [part for each in fx.COMMON for part in ("--set", each)]
    words = ("--recipe", tmp_path / "mine.py", "--out", tmp_path / "run", "--device", "cpu", *sets)
    done = fx.stud("train", *words, "--cache", fx.cache_path(), *SMALL, "--steps", 2, *probe())
    assert (done.status, "has no forward_features(images)" in done.line) == (1, True)


def test_modes_are_put_back_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    state: Any = SimpleNamespace(
        module=module,
        acc=SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.no_grad()),
    )
    seen = []
    with contextlib.suppress(RuntimeError), set_aside.set_aside(state):
        seen += [each.training for each in module]
        raise RuntimeError
    assert seen == [False, False]
    assert [each.training for each in module] == [True, False]
    assert torch.is_grad_enabled()
