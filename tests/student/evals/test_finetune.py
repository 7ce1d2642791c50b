"""`student eval finetune`: the published settings, what it scores, records, leaves and refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from featcache.console.config_file import FileSettings
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.views.render import render_centre
from student import checkpoint, evals, recipes
from student.features.finetuned import load_classifier
from student.setup import finetune_inputs
from student.setup.finetune_inputs import Begun
from student.training import finetune, metrics
from tests import finetuning as ft
from tests import student_fixtures as fx

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NAMES = [f"c{i}" for i in range(ft.CLASSES)]
MOVES = ("head_std=0.2",)  # scores that move, away from the seed's

# --- published settings ---------------------------------------------------------------------------

# recipe, size: rate at a batch -> base rate at 256, epochs, warm-up, layer decay, drop path
PUBLISHED = [
    ("mae", "base", 2e-3, 1024, 100, 5, 0.65, 0.1),
    ("mae", "large", 4e-3, 1024, 50, 5, 0.75, 0.2),
    ("mae", "huge", 4e-3, 1024, 50, 5, 0.75, 0.3),
    ("maskalign", "base", 1.2e-3, 1024, 100, 5, 0.55, 0.2),
    ("maskalign", "large", 1.2e-3, 1024, 50, 5, 0.75, 0.4),
    ("mralign", "base", 1.2e-3, 1024, 100, 5, 0.55, 0.2),
    ("mralign", "large", 1.2e-3, 1024, 50, 5, 0.75, 0.4),
    ("mrmae", "base", 1.2e-3, 1024, 100, 5, 0.6, 0.2),
    ("cae", "small", 1.6e-2, 4096, 200, 5, 0.75, 0.1),
    ("cae", "base", 8e-3, 4096, 100, 5, 0.65, 0.1),
    ("cae", "large", 2e-3, 4096, 50, 5, 0.75, 0.2),
    ("caev2", "tiny", 4e-3, 1024, 100, 5, 0.85, 0.0),
    ("caev2", "small", 4e-4, 1024, 200, 20, 0.75, 0.1),
    ("caev2", "base", 2e-4, 1024, 100, 5, 0.75, 0.1),
    ("caev2", "large", 4e-4, 1024, 50, 5, 0.8, 0.2),
    ("milan", "base", 4e-4, 1024, 100, 5, 0.65, 0.1),
    ("milan", "large", 4e-4, 1024, 100, 5, 0.75, 0.2),
    ("kd", "base", 4e-4, 1024, 100, 5, 0.65, 0.1),
    ("fd", "base", 5e-3, 2048, 100, 20, 0.6, 0.3),
    ("fd", "large", 1e-3, 2048, 50, 5, 0.75, 0.4),
    ("mvp", "base", 4e-3, 1024, 100, 20, 0.65, 0.1),
    ("mvp", "large", 1e-3, 1024, 50, 5, 0.75, 0.2),
]
# what is the same for all but these
SHARED = {
    "min_lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.05, "clip_grad": None, "mixup": 0.8,
    "cutmix": 1.0, "smoothing": 0.1, "erasing": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1",
    "crop_scale": (0.08, 1.0), "pool": "mean", "fc_norm": "fresh", "rel_pos": False,
    "train_positions": True,
}  # fmt: skip
ITS_OWN: dict[str, dict[str, Any]] = {
    "cae": {"fc_norm": "norm", "rel_pos": True, "train_positions": False},
    "caev2": {"fc_norm": "norm", "rel_pos": True, "train_positions": False},
    "caev2 tiny": {"mixup": 0.2, "cutmix": 0.0, "smoothing": 0.0},
    "fd": {"rel_pos": True, "clip_grad": 5.0},
    "fd large": {"min_lr": 2e-6},
    "mvp": {"rel_pos": True},
}


def configured(recipe: str, size: str, *sets: str) -> finetune.Config:
    facts = {"encoder": size, "family": "mae", "patch_size": 16, "img_size": 224}
    begun = Begun(torch.nn.Identity(), "run", facts, {}, recipe, size)
    options: Any = SimpleNamespace(file_settings=FileSettings(), settings=sets, epochs=None)
    return finetune_inputs.configure(options, begun, evals.load("finetune"), 1000)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: " ".join(row[:2]))
def test_published_settings(row: tuple[Any, ...]) -> None:
    recipe, size, lr, batch, epochs, warmup, layer_decay, drop_path = row
    config = configured(recipe, size)
    assert config.lr is None
    assert config.blr == pytest.approx(lr * 256 / batch, rel=1e-12)
    found = (config.epochs, config.warmup_epochs, config.layer_decay, config.drop_path)
    assert found == (epochs, warmup, layer_decay, drop_path)
    own = {**SHARED, **ITS_OWN.get(recipe, {}), **ITS_OWN.get(f"{recipe} {size}", {})}
    assert {name: getattr(config, name) for name in own} == own
    # 2e-5 in two ways, 0.02 by MILAN
    head = 0.02 if recipe in ("milan", "kd") else 2e-5
    assert config.head_std * config.head_scale == pytest.approx(head)


def test_every_recipe_has_an_answer() -> None:
    assert {row[0] for row in PUBLISHED} == set(recipes.names())
    for recipe in recipes.names():
        for size in ("tiny", "small", "base", "large", "huge", ""):
            assert configured(recipe, size).classes == 1000


def test_set_wins_over_what_is_published() -> None:
    config = configured("fd", "large", "blr=0.5", "rel_pos=false", "clip_grad=null", "img_size=384")
    assert (config.blr, config.rel_pos, config.clip_grad, config.img_size) == (
        0.5,
        False,
        None,
        384,
    )
    assert config.layer_decay == 0.75


@pytest.mark.slow
def test_show_prints_the_settings_and_writes_nothing(tmp_path: Path) -> None:
    sets = ("layer_decay=0.9", "img_size=48")
    shown = fx.good(ft.finetune("cae", tmp_path / "run", "--show", sets=sets)).out
    lines = dict(line.split(" = ", 1) for line in shown.splitlines())
    assert set(lines) == {each.name for each in dataclasses.fields(finetune.Config)}
    assert [lines[name] for name in ("layer_decay", "img_size", "rel_pos", "classes")] == [
        "0.9", "48", "true", "5",
    ]  # fmt: skip
    ran = fx.good(ft.finetune("cae", tmp_path / "run", "--show", "--json", sets=sets))
    assert ran.json["fc_norm"] == "norm"
    assert ran.json["epochs"] == 3  # --epochs
    assert not (tmp_path / "run").exists()


# --- what is taken home ---------------------------------------------------------------------------


def images_of(pictures: Path, size: int = 32, crop_pct: float = 0.875) -> tuple[Any, list[str]]:
    """Centre crops (n,3,S,S), normalised by hand, and names of their classes."""
    source = open_source(str(pictures))
    pixels = [
        render_centre(decode(source.read(row)), size, crop_pct, "bicubic")
        for row in range(len(source))
    ]
    images = ((np.stack(pixels) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    return torch.from_numpy(images).float(), [key.split("/")[0] for key in source.keys]


def plain_timm(recipe: str, config: dict[str, Any]) -> Any:
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8}
    if recipe == "mae":
        name: str = "vit_tiny_patch16_224"
        options: dict[str, Any] = {}
    else:
        name = "beit_base_patch16_224"
        options = {"init_values": 0.1, "use_rel_pos_bias": True, "use_abs_pos_emb": recipe == "cae"}
    return timm.create_model(
        name, num_classes=5, global_pool="avg", img_size=config["img_size"], **options, **sizes
    )


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("recipe", ["mae", "cae", "fd"])
def test_it_is_timms_network_with_the_recorded_score(
    recipe: str, size: int, best: bool, tmp_path: Path
) -> None:
    """Strictly by name, the same logits, and the top-1 that the result says; at 48 pixels of the
    whole shorter side, as --crop-pct has it."""
    crop = ("--crop-pct", 1.0) if size == 48 else ()
    run = tmp_path / "run"
    ran = ft.finetune(recipe, run, *crop, "--json", sets=(*MOVES, f"img_size={size}"))
    network, config = load_classifier(run, best=best)
    again = plain_timm(recipe, config)
    again.load_state_dict(network.state_dict(), strict=True)
    images, names = images_of(ft.test_pictures(), size, 1.0 if crop else 0.875)
    with torch.no_grad():
        logits = again.eval()(images)
        torch.testing.assert_close(network(images), logits, rtol=1e-5, atol=1e-5)
        tokens = network.forward_features(images)  # type: ignore[operator]
        torch.testing.assert_close(tokens, again.forward_features(images), rtol=1e-5, atol=1e-5)
    right = [NAMES[row] == name for row, name in zip(logits.argmax(1), names, strict=True)]
    told = fx.good(ran).json["best"]["top1"] if best else ran.json["top1"]
    assert told == pytest.approx(100 * sum(right) / 7, abs=1e-4)


@pytest.mark.slow
def test_the_documentations_lines(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/judging.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
               if "load_classifier" in part)  # fmt: skip
    run = tmp_path / "run"
    fx.good(ft.finetune("mae", run, "--epochs", 1))
    code = code.replace("depth=4,", "depth=4, patch_size=8,")  # that of the small run
    names: dict[str, Any] = {"run": run}
    exec(code, names)
    images, _ = images_of(ft.test_pictures())
    with torch.no_grad():
        torch.testing.assert_close(names["again"].eval()(images), names["network"](images))


# --- test sets ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_of_several_test_sets_by_hand(tmp_path: Path) -> None:
    """All classes; those of a file alone; classes of the set's own by a map, one nowhere."""
    few = fx.save_pictures(tmp_path / "few", 60, seed=7, classes=5)
    for name in ("c1", "c3"):
        shutil.rmtree(few / name)
    warm = fx.save_pictures(tmp_path / "warm", 12, seed=8, classes=2)
    (warm / "c0").rename(warm / "hot")
    (warm / "c1").rename(warm / "cold")
    mapping = {"c0": "hot", "c1": "cold", "c2": "cold", "c3": "hot", "c4": None}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    (tmp_path / "classes.txt").write_text("c0\nc2\nc4\n")
    run = tmp_path / "run"
    tests = ("--test", f"all={ft.test_pictures()}", "--test", f"few={few}", "--test", f"w={warm}")
    cut = ("--subset", f"few={tmp_path / 'classes.txt'}", "--class-map",
           f"w={tmp_path / 'map.json'}")  # fmt: skip
    facts = fx.good(ft.finetune("mae", run, *tests, *cut, "--json", sets=MOVES)).json
    network, _ = load_classifier(run)

    def logits(pictures: Path) -> tuple[np.ndarray, list[str]]:
        images, names = images_of(pictures)
        with torch.no_grad():
            return network(images).numpy(), names

    found, names = logits(ft.test_pictures())
    right = [NAMES[i] == name for i, name in zip(found.argmax(1), names, strict=True)]
    assert facts["tests"]["all"]["top1"] == pytest.approx(100 * np.mean(right), abs=1e-4)
    assert facts["top1"] == facts["tests"]["all"]["top1"]
    found, names = logits(few)
    freely = [NAMES[i] == name for i, name in zip(found.argmax(1), names, strict=True)]
    right = [NAMES[2 * i] == n for i, n in zip(found[:, ::2].argmax(1), names, strict=True)]
    assert sum(right) > sum(freely)  # without the file it would be another score
    assert facts["tests"]["few"]["top1"] == pytest.approx(100 * np.mean(right), abs=1e-4)
    found, names = logits(warm)
    right = [mapping[NAMES[i]] == name for i, name in zip(found.argmax(1), names, strict=True)]
    assert facts["tests"]["w"]["top1"] == pytest.approx(100 * np.mean(right), abs=1e-4)
    row = metrics.read(run)[-1]
    assert [row[f"top1_{name}"] for name in ("all", "few", "w")] == [
        facts["tests"][name]["top1"] for name in ("all", "few", "w")
    ]
    lines = (run / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["all", "few", "w"]


def test_results_lie_in_the_run_in_out_and_at_home(tmp_path: Path) -> None:
    run = Path(shutil.copytree(ft.pretrained("mae"), tmp_path / "pre"))
    (run / "results.jsonl").unlink(missing_ok=True)
    words = [run if word == ft.pretrained("mae") else word
             for word in ft.words("mae", tmp_path / "out", "--epochs", 1)]  # fmt: skip
    fx.good(fx.stud(*words, home=tmp_path / "home"))
    places = [run, tmp_path / "out", tmp_path / "home"]
    texts = [(place / "results.jsonl").read_text() for place in places]
    assert texts[0] == texts[1] == texts[2]
    line = json.loads(texts[0])
    assert [line[name] for name in ("protocol", "recipe", "checkpoint", "test", "n_test")] == [
        "finetune", "mae", 2, "test", 7,
    ]  # fmt: skip
    assert line["run"] == str(run)
    assert line["settings"]["layer_decay"] == 0.65
    assert line["settings"]["classes"] == 5


# --- options --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--checkpoint", 1), ("--ema",), ("--checkpoint", 1, "--ema")]
)
def test_it_begins_with_the_weights_that_were_asked_for(
    options: tuple[Any, ...], tmp_path: Path
) -> None:
    """The first step is at a rate of 0: its checkpoint has them."""
    run = tmp_path / "run"
    one = ("--epochs", 1, "--save-every", 1, "--json")
    facts = fx.good(ft.finetune("mae", run, *one, *options)).json
    step = 1 if "--checkpoint" in options else 2
    saved = torch.load(ft.pretrained("mae") / f"checkpoints/step-{step:08d}.pt", weights_only=True)
    given = saved["ema" if "--ema" in options else "model"]
    own = torch.load(run / "checkpoints/step-00000001.pt", weights_only=True)["model"]
    for name in ("encoder.cls_token", "encoder.blocks.3.mlp.fc2.weight"):
        assert torch.equal(own[name], given[name])
    assert facts["checkpoint"] == step
    assert facts.get("ema", False) == ("--ema" in options)
    begun = checkpoint.read_config(run)["targets"]["begun"]
    assert (begun["checkpoint"], begun["ema"]) == (step, "--ema" in options)


@pytest.mark.slow
def test_the_average_is_scored(tmp_path: Path) -> None:
    run = tmp_path / "run"
    facts = fx.good(ft.finetune("mae", run, "--keep-ema", 0.5, "--json", sets=MOVES)).json
    network, _ = checkpoint.load_encoder(run, ema=True)
    last, _ = checkpoint.load_encoder(run)
    images, names = images_of(ft.test_pictures())
    with torch.no_grad():
        found = network(images)
        assert not torch.equal(found, last(images))
    right = [NAMES[i] == name for i, name in zip(found.argmax(1), names, strict=True)]
    assert facts["average"]["test"] == pytest.approx(100 * sum(right) / 7, abs=1e-4)
    assert metrics.read(run)[-1]["ema_top1"] == facts["average"]["test"]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "n"), [(("--shots", 2), 10), (("--fraction", 0.5), 10)])
def test_few_pictures_a_class(options: tuple[Any, ...], n: int, tmp_path: Path) -> None:
    facts = fx.good(ft.finetune("mae", tmp_path / "run", *options, "--json", "--epochs", 1)).json
    assert facts["n_train"] == n
    assert checkpoint.read_config(tmp_path / "run")["data"]["pictures"] == n


@pytest.mark.slow
def test_without_test_pictures_a_fifth_is_held_out(tmp_path: Path) -> None:
    words = list(ft.words("mae", tmp_path / "run", "--epochs", 1, "--json"))
    at = words.index("--test")
    ran = fx.good(fx.stud(*words[:at], *words[at + 2 :]))
    assert "are held out" in ran.err
    assert ran.json["n_train"] + ran.json["n_test"] == 20


@pytest.mark.slow
def test_an_odd_batch_leaves_its_last_picture_unmixed(tmp_path: Path) -> None:
    ran = ft.finetune("mae", tmp_path / "run", "--batch-size", 7, "--epochs", 1, sets=("cutmix=0",))
    fx.good(ran)
    assert len(fx.losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ran = fx.good(ft.finetune("mae", tmp_path / "run", "--dry-run", "--json", home=home))
    assert ran.json["steps"] == 6
    assert ran.json["pictures"] == 20
    assert not (tmp_path / "run").exists()
    assert not list(home.rglob("*.jsonl"))
    fx.good(ft.finetune("mae", tmp_path / "run", "--dry-run"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mae", "fd", "conv"])
def test_a_loss_that_is_not_finite_is_replayed(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = ft.finetune(recipe, run, sets=("lr=1e30", "warmup_epochs=0", "drop_path=0.3"))
    assert ran.status == 1
    (file,) = (run / "nonfinite").iterdir()
    assert f"`student replay {file}` runs that batch again" in ran.line
    facts = fx.good(fx.stud("replay", file, "--device", "cpu", "--json")).json
    assert facts["recipe"] == "finetune"
    assert len(facts["keys"]) == 8
    assert facts["nonfinite_weights"] == facts["nonfinite_inputs"] == []
    assert facts["first_nonfinite_module"].startswith("encoder.")
    assert not np.isfinite(float(facts["parts"]["loss"]))


@pytest.mark.parametrize(
    ("batch_size", "sets", "told"),
    [
        (8, (), ""),
        (5, (), "batches of 5 a process: the last one of each is not mixed"),
        (1, ("mixup=0",), "batches of 1 a process: no picture is mixed"),
        (5, ("mixup=0", "cutmix=0"), ""),
        (5, ("mix_prob=0",), ""),
    ],
)
def test_batches_of_an_odd_number_are_told(
    batch_size: int, sets: tuple[str, ...], told: str
) -> None:
    loader: Any = SimpleNamespace(batch_size=batch_size)
    notes = finetune_inputs.mix_notes(configured("mae", "base", *sets), loader)
    assert len(notes) == bool(told)
    assert told in "".join(notes)


def test_the_command_tells_what_is_not_mixed(tmp_path: Path) -> None:
    ran = fx.good(ft.finetune("mae", tmp_path / "run", "--dry-run", "--batch-size", 5))
    assert "note: batches of 5 a process" in ran.err
