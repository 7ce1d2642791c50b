"""The whole path through the commands: cached equals online, interrupted equals undisturbed, split
equals whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import student.training.train
from featcache import rng
from featcache.reading.cache import Cache
from featcache.views import pixel_path
from student import checkpoint, recipes
from student.data import prefetch
from student.training import metrics
from tests import student_fixtures as fx

STEPS = 20
ALIGNED = ("maskalign", "mralign")
BOTH = ("--steps", str(STEPS), "--batch-size", "8")
ONLINE = ("--teacher", "online")


def alone(*views: str) -> tuple[str, ...]:
    """Online without any cache: pictures, policy and the number of views are told by hand."""
    return (
        *ONLINE,
        "--images",
        str(fx.pictures()),
        "--policy",
        str(fx.policy_file()),
        *views,
    )


def assert_same_losses(here: Path, there: Path, relative: float) -> None:
    ours, theirs = metrics.read(here), metrics.read(there)
    assert (
        [row["step"] for row in ours]
        == [row["step"] for row in theirs]
        == list(range(1, len(ours) + 1))
    )
    parts = [
        name for name in ours[0] if name == "loss" or name.startswith(("level_", "align", "pixel"))
    ]
    for name in parts:
        a, b = (np.array([row[name] for row in rows]) for rows in (ours, theirs))
        assert np.abs(a - b).max() <= relative * np.abs(b).min(), (name, a, b)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("recipe", ALIGNED)
def test_cached_equals_online(recipe: str, tmp_path: Path) -> None:
    """fp16 storage is the only difference: 1e-3 at each of 20 steps at the peak learning rate,
    with drop path 0.1."""
    cached, over, without = tmp_path / "cached", tmp_path / "over", tmp_path / "without"
    fx.good(fx.train(recipe, cached, "--cache", fx.cache_path(), *BOTH))
    fx.good(fx.train(recipe, over, "--cache", fx.cache_path(), *ONLINE, *BOTH))
    fx.good(
        fx.train(
            recipe,
            without,
            *alone("--views", str(fx.VIEWS)),
            *BOTH,
            sets=(f"teacher={fx.TEACHER}",),
        )
    )
    first, *_, last = fx.losses(cached)
    assert last < 0.9 * first
    assert_same_losses(cached, over, 1e-3)
    assert_same_losses(cached, without, 1e-3)
    # the same arithmetic, with and without a cache to look at
    assert fx.losses(over) == fx.losses(without)
    assert fx.losses(cached) != fx.losses(over)  # the cache's fp16 was really read


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALIGNED)
def test_drop_path_is_on_in_these_comparisons(recipe: str, tmp_path: Path) -> None:
    fx.good(fx.train(recipe, tmp_path / "on", "--cache", fx.cache_path(), *BOTH))
    fx.good(
        fx.train(recipe, tmp_path / "off", "--cache", fx.cache_path(), *BOTH, sets=("drop_path=0",))
    )
    on, off = fx.losses(tmp_path / "on"), fx.losses(tmp_path / "off")
    assert max(abs(a - b) / b for a, b in zip(on, off, strict=True)) > 1e-2


@pytest.mark.slow
def test_a_wrong_teacher_online_would_be_seen(tmp_path: Path) -> None:
    """The comparison has teeth: one view fewer gives other losses."""
    fx.good(fx.train("maskalign", tmp_path / "cached", "--cache", fx.cache_path(), *BOTH))
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "two",
            *alone("--views", "2"),
            *BOTH,
            sets=(f"teacher={fx.TEACHER}",),
        )
    )
    a, b = (np.array(fx.losses(tmp_path / run)) for run in ("cached", "two"))
    assert (np.abs(a - b) / b).max() > 1e-2


@pytest.mark.slow
def test_online_without_views_draws_a_fresh_one_each_epoch(tmp_path: Path) -> None:
    """View number = epoch: in the epochs before V the views are those of a cache, in another order,
    and later new."""
    options = ("--steps", "12", "--batch-size", "24")
    fx.good(
        fx.train(
            "maskalign", tmp_path / "fresh", *alone(), *options, sets=(f"teacher={fx.TEACHER}",)
        )
    )
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "one",
            *alone("--views", "1"),
            *options,
            sets=(f"teacher={fx.TEACHER}",),
        )
    )
    fresh, one = fx.losses(tmp_path / "fresh"), fx.losses(tmp_path / "one")
    assert fresh[0] == pytest.approx(one[0], rel=1e-6)  # epoch 0 shows view 0 in both
    assert fresh[1] != pytest.approx(one[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["stored", "uniform"])
def test_other_masks_are_equal_online_too(mask: str, tmp_path: Path) -> None:
    sets = (f"mask={mask}",)
    fx.good(fx.train("mralign", tmp_path / "cached", "--cache", fx.cache_path(), *BOTH, sets=sets))
    fx.good(
        fx.train(
            "mralign", tmp_path / "over", "--cache", fx.cache_path(), *ONLINE, *BOTH, sets=sets
        )
    )
    both = (*sets, f"teacher={fx.TEACHER}")
    fx.good(
        fx.train(
            "mralign", tmp_path / "without", *alone("--views", str(fx.VIEWS)), *BOTH, sets=both
        )
    )
    assert_same_losses(tmp_path / "cached", tmp_path / "over", 1e-3)
    assert_same_losses(tmp_path / "cached", tmp_path / "without", 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "none", "bn"])
def test_other_target_norms_are_equal_online_too(norm: str, tmp_path: Path) -> None:
    """They are made of what is stored, h and its statistics, and online of the same from the
    teacher in the loop."""
    sets = (f"target_norm={norm}",)
    fx.good(
        fx.train("maskalign", tmp_path / "cached", "--cache", fx.cache_path(), *BOTH, sets=sets)
    )
    fx.good(
        fx.train(
            "maskalign", tmp_path / "over", "--cache", fx.cache_path(), *ONLINE, *BOTH, sets=sets
        )
    )
    assert_same_losses(tmp_path / "cached", tmp_path / "over", 1e-3)
    fx.good(
        fx.train("maskalign", tmp_path / "ranked", "--cache", fx.ranked_path(), *BOTH, sets=sets)
    )
    assert fx.losses(tmp_path / "ranked") == fx.losses(tmp_path / "cached")
    # of which the first tokens are read, but for bn, which wants statistics of all
    sets = (*sets, "mask=stored")
    fx.good(fx.train("maskalign", tmp_path / "few", "--cache", fx.ranked_path(), *BOTH, sets=sets))
    fx.good(fx.train("maskalign", tmp_path / "all", "--cache", fx.cache_path(), *BOTH, sets=sets))
    assert checkpoint.read_config(tmp_path / "few")["targets"]["reading"]["tokens"] == (
        "all" if norm == "bn" else 5
    )
    assert fx.losses(tmp_path / "few") == fx.losses(tmp_path / "all")
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "resident",
            "--cache",
            fx.cache_path(),
            *BOTH,
            "--resident",
            sets=sets,
        )
    )
    assert fx.losses(tmp_path / "resident") == fx.losses(tmp_path / "all")


# --- other layouts of the same targets ------------------------------------------------------------

STORED = ("mask=stored",)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALIGNED)
def test_a_prefix_of_ranked_tokens_equals_the_raster_cache(recipe: str, tmp_path: Path) -> None:
    """mask=stored from all tokens in image order, from the first of ranked ones, and from a cache
    that keeps no more: the same losses and weights to the bit, over 20 steps with drop path."""
    caches = {
        "raster": fx.cache_path(),
        "ranked": fx.ranked_path(),
        "kept": fx.kept_path(),
    }
    for name, cache in caches.items():
        fx.good(fx.train(recipe, tmp_path / name, "--cache", cache, *BOTH, sets=STORED))
    visible = 4  # int(16 * 0.3) and int(16 * 0.25)
    for name, tokens in {"raster": "all", "ranked": 1 + visible, "kept": 1 + visible}.items():
        assert checkpoint.read_config(tmp_path / name)["targets"]["reading"]["tokens"] == tokens
        assert fx.losses(tmp_path / name) == fx.losses(tmp_path / "raster")
        assert fx.same_weights(tmp_path / name, tmp_path / "raster")


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["attentive", "uniform"])
def test_other_masks_from_a_ranked_cache_equal_the_raster_cache(mask: str, tmp_path: Path) -> None:
    for name, cache in {"raster": fx.cache_path(), "ranked": fx.ranked_path()}.items():
        fx.good(
            fx.train("mralign", tmp_path / name, "--cache", cache, *BOTH, sets=(f"mask={mask}",))
        )
    assert fx.losses(tmp_path / "ranked") == fx.losses(tmp_path / "raster")


@pytest.mark.slow
def test_the_teacher_in_the_loop_over_a_kept_cache_takes_its_mask(tmp_path: Path) -> None:
    for name, options in {"cached": (), "online": ONLINE}.items():
        fx.good(fx.train("maskalign", tmp_path / name, "--cache", fx.kept_path(), *options, *BOTH))
    assert_same_losses(tmp_path / "cached", tmp_path / "online", 1e-3)


@pytest.mark.slow
def test_a_recipe_that_looks_at_a_token_that_was_not_read_is_noticed(tmp_path: Path) -> None:
    """It says that it looks at visible tokens only, and takes the mean of all: the loss is no
    number."""
    text = (Path(recipes.__file__).parent / "maskalign.py").read_text()
    wrong = text.replace(
        'return outputs, batch["features"], ', 'return outputs, spread(batch["features"]), '
    )
    assert wrong != text
    (tmp_path / "wrong.py").write_text(
        wrong + "\n\ndef spread(x):\n    return x + 0 * x.mean(2, keepdim=True)\n"
    )
    sets = [part for setting in (*fx.RECIPES["maskalign"], *STORED) for part in ("--set", setting)]
    words = ("train", "--recipe", tmp_path / "wrong.py", "--device", "cpu", *sets, *BOTH)
    fx.good(fx.stud(*words, "--cache", fx.cache_path(), "--out", tmp_path / "all"))
    ran = fx.stud(*words, "--cache", fx.ranked_path(), "--out", tmp_path / "few")
    assert ran.status == 1
    assert "loss is nan at step 1" in ran.line


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*ALIGNED, "mae"])
def test_stored_pixels_equal_decoded_ones(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses to the bit without a picture to decode, and without anybody saying where
    pictures are."""
    options = ("--cache", fx.ranked_path(), *BOTH, "--check-pixels", "1")
    fx.good(fx.train(recipe, tmp_path / "raster", "--cache", fx.cache_path(), *BOTH))
    decoding = fx.good(fx.train(recipe, tmp_path / "decoded", *options, "--decode"))
    assert f"pixels are decoded from {fx.pictures()}" in decoding.err
    monkeypatch.setattr(pixel_path, "decode", lambda data: pytest.fail("a picture was decoded"))
    monkeypatch.setattr(pixel_path, "open_source", lambda spec: pytest.fail("pictures were opened"))
    ran = fx.good(fx.train(recipe, tmp_path / "stored", *options))
    assert "note: pixels come from the cache, nothing is decoded" in ran.err
    for name in ("decoded", "stored"):
        assert fx.losses(tmp_path / name) == fx.losses(tmp_path / "raster")
    assert fx.same_weights(tmp_path / "stored", tmp_path / "raster")
    reading = [
        checkpoint.read_config(tmp_path / name)["targets"]["reading"]["pixels"]
        for name in ("decoded", "stored")
    ]
    assert reading == ["decoded", "stored"]


def test_stored_pixels_of_some_of_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--images chooses among them by key, and no file of it is read."""
    some = tmp_path / "some"
    some.mkdir()
    for name in ("p20", "p03", "p11", "p07"):
        (some / f"{name}.png").write_text("not a picture")
    options = ("--cache", fx.ranked_path(), "--images", some, "--steps", "2", "--batch-size", "4")
    fx.good(fx.train("maskalign", tmp_path / "run", *options))
    assert checkpoint.read_config(tmp_path / "run")["data"]["pictures"] == 4
    ran = fx.train("maskalign", tmp_path / "decoded", *options, "--decode")
    assert ran.status == 1
    assert "cannot be used in training" in ran.line


@pytest.mark.slow
def test_mae_from_the_same_cache_equals_mae_without_any(tmp_path: Path) -> None:
    """mae reads nothing but views: from the cache, or drawn anew, they are the same pixels to the
    last bit."""
    fx.good(fx.train("mae", tmp_path / "cached", "--cache", fx.cache_path(), *BOTH))
    policy = (
        "--policy",
        fx.policy_file(),
        "--views",
        str(fx.VIEWS),
        "--images",
        fx.pictures(),
    )
    fx.good(
        fx.train(
            "mae",
            tmp_path / "without",
            *policy,
            *BOTH,
            sets=("patch_size=8",),
            home=tmp_path / "empty",
        )
    )
    assert fx.losses(tmp_path / "cached") == fx.losses(tmp_path / "without")
    assert fx.same_weights(tmp_path / "cached", tmp_path / "without")


@pytest.mark.slow
def test_mae_with_an_attentive_mask_reads_only_the_attention(tmp_path: Path) -> None:
    sets = ("mask=attentive",)
    fx.good(fx.train("mae", tmp_path / "cached", "--cache", fx.cache_path(), *BOTH, sets=sets))
    fx.good(
        fx.train("mae", tmp_path / "over", "--cache", fx.cache_path(), *ONLINE, *BOTH, sets=sets)
    )
    # attention is stored in fp32: exactly
    assert fx.losses(tmp_path / "cached") == fx.losses(tmp_path / "over")


def test_no_steps_write_the_untrained_student(tmp_path: Path) -> None:
    ran = fx.good(
        fx.train("mralign", tmp_path / "run", "--cache", fx.cache_path(), "--steps", "0", "--json")
    )
    assert ran.json["steps"] == 0
    assert metrics.read(tmp_path / "run") == []
    torch.manual_seed(0)
    from student import config
    from student.setup import cache_match

    recipe = recipes.load("mralign")
    facts = cache_match.cache_facts(fx.open_cache().identity)
    model = recipe.Model(
        config.replace(config.from_overrides(recipe.Config, fx.RECIPES["mralign"]), **facts)
    )
    saved = fx.weights(tmp_path / "run")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("died", "save_every"), [(0, 4), (3, 4), (4, 4), (9, 4), (11, 12), (17, 5)]
)
def test_stopped_at_a_step_and_resumed(
    died: int, save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path on; the process fails inside step `died`, before its optimiser step."""
    options = ("--cache", fx.cache_path(), *BOTH, "--save-every", str(save_every))
    fx.good(fx.train("mralign", tmp_path / "whole", *options))
    seed_of = student.training.train.step_seed

    def dies(seed: int, step: int, micro: int, rank: int) -> int:
        if step == died:
            raise RuntimeError("power cut")
        return seed_of(seed, step, micro, rank)

    monkeypatch.setattr(student.training.train, "step_seed", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        fx.train("mralign", tmp_path / "cut", *options)
    monkeypatch.undo()
    assert [row["step"] for row in metrics.read(tmp_path / "cut")] == list(range(1, died + 1))
    ran = fx.good(fx.train("mralign", tmp_path / "cut", *options, "--resume", "--json"))
    assert ran.json["first_step"] == died // save_every * save_every
    assert_undisturbed(tmp_path / "cut", tmp_path / "whole")


def assert_undisturbed(run: Path, whole: Path) -> None:
    """Each step once, the same numbers as the whole run, and the same weights to the bit."""
    rows, expected = (
        [{k: v for k, v in row.items() if k not in metrics.CLOCKS} for row in metrics.read(place)]
        for place in (run, whole)
    )
    assert rows == expected
    assert fx.same_weights(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param("maskalign", marks=pytest.mark.slow), "mralign"])
def test_killed_in_training_and_resumed(recipe: str, tmp_path: Path) -> None:
    options = (
        "--cache",
        fx.cache_path(),
        "--steps",
        "60",
        "--batch-size",
        "8",
        "--save-every",
        "7",
    )
    fx.good(fx.train(recipe, tmp_path / "whole", *options))
    settings = [part for text in fx.RECIPES[recipe] for part in ("--set", text)]
    command = [
        sys.executable,
        "-m",
        "student",
        "train",
        "--recipe",
        recipe,
        *map(str, options),
        *settings,
    ]
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(run), "--device", "cpu"],
        env=fx.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while _lines(run) < 10 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 10 <= _lines(run) < 60
    fx.good(fx.train(recipe, run, *options, "--resume"))
    assert_undisturbed(run, tmp_path / "whole")


def _lines(run: Path) -> int:
    path = run / metrics.NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "4", "--batch-size", "8")
    fx.good(fx.train("maskalign", tmp_path / "run", *options))
    before = (tmp_path / "run" / metrics.NAME).read_bytes()
    files = sorted((tmp_path / "run" / "checkpoints").iterdir())
    fx.good(fx.train("maskalign", tmp_path / "run", *options, "--resume"))
    assert (tmp_path / "run" / metrics.NAME).read_bytes() == before
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == files


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["run_folder.environment", "train._record", "train._metrics"])
def test_a_run_stopped_while_its_folder_is_made_can_be_started(
    dies: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process dies before its first step, one of the two ways (--resume or not) takes
    the folder."""
    options = ("--cache", fx.cache_path(), "--steps", "1", "--batch-size", "8")

    def power_cut(*_: Any) -> Any:
        raise RuntimeError("power cut")

    monkeypatch.setattr(f"student.training.{dies}", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fx.train("maskalign", tmp_path / "run", *options)
    monkeypatch.undo()
    assert 0 in [
        fx.train("maskalign", tmp_path / "run", *options, *resume).status
        for resume in (("--resume",), ())
    ]
    assert len(metrics.read(tmp_path / "run")) == 1


# --- split ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*ALIGNED, "mae"])
def test_accumulation_equals_a_larger_batch(recipe: str, tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "10")
    off = ("drop_path=0",)
    fx.good(fx.train(recipe, tmp_path / "whole", *options, "--batch-size", "8", sets=off))
    fx.good(
        fx.train(
            recipe, tmp_path / "parts", *options, "--batch-size", "4", "--accumulate", "2", sets=off
        )
    )
    assert_same_losses(tmp_path / "parts", tmp_path / "whole", 1e-5)


@pytest.mark.slow
def test_accumulation_with_clipping_and_the_scaled_rate(tmp_path: Path) -> None:
    """blr and the clipped norm are those of the global batch."""
    sets = ("drop_path=0", "clip_grad=0.5", "lr=null", "blr=0.05")
    options = ("--cache", fx.cache_path(), "--steps", "6")
    fx.good(fx.train("maskalign", tmp_path / "whole", *options, "--batch-size", "8", sets=sets))
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "parts",
            *options,
            "--batch-size",
            "2",
            "--accumulate",
            "4",
            sets=sets,
        )
    )
    whole, parts = metrics.read(tmp_path / "whole"), metrics.read(tmp_path / "parts")
    assert [row["lr"] for row in whole] == [row["lr"] for row in parts]
    assert whole[0]["lr"] == pytest.approx(0.05 * 8 / 256)
    norms = [[row["grad_norm"] for row in rows] for rows in (whole, parts)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    assert max(norms[0]) > 0.5  # the norm before clipping is what is told
    assert_same_losses(tmp_path / "parts", tmp_path / "whole", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALIGNED)
def test_two_processes_equal_one(recipe: str, tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--steps", "10", "--device", "cpu")
    fx.good(
        fx.train(recipe, tmp_path / "one", *options, "--batch-size", "8", sets=("drop_path=0",))
    )
    settings = [part for text in (*fx.RECIPES[recipe], "drop_path=0") for part in ("--set", text)]
    train = ["student", "train", "--recipe", recipe, *map(str, options), *settings]
    ran = launch([*train, "--batch-size", "4", "--out", str(tmp_path / "two"), "--save-every", "5"])
    assert ran.returncode == 0, ran.stderr
    assert_same_losses(tmp_path / "two", tmp_path / "one", 1e-4)
    assert metrics.read(tmp_path / "two")[0]["images_per_s"] > 0
    one, two = fx.weights(tmp_path / "one"), fx.weights(tmp_path / "two")
    assert one.keys() == two.keys()
    # Softmax takes no notice of a key's bias: its gradient is rounding alone, which Adam's first
    # steps make as large as the learning rate, 3e-3. All else differs by a small part of it.
    apart = {name: (one[name] - two[name]).abs() for name in one}
    for name in [name for name in apart if name.endswith("attn.qkv.bias")]:
        queries, _, values = apart[name].chunk(3)
        apart[name] = torch.cat([queries, values])
    assert max(float(values.max()) for values in apart.values()) < 1e-4


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_with_drop_path(tmp_path: Path) -> None:
    options = (
        "--cache",
        str(fx.cache_path()),
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--steps",
        "12",
    )
    settings = [part for text in fx.RECIPES["mralign"] for part in ("--set", text)]
    train = ["student", "train", "--recipe", "mralign", *options, *settings, "--save-every", "4"]
    assert launch([*train, "--out", str(tmp_path / "whole")]).returncode == 0
    assert launch([*train, "--out", str(tmp_path / "cut")]).returncode == 0
    newest = max((tmp_path / "cut" / "checkpoints").iterdir())
    newest.unlink()  # as if the process had died after step 8
    again = launch([*train, "--out", str(tmp_path / "cut"), "--resume"])
    assert again.returncode == 0, again.stderr
    assert_undisturbed(tmp_path / "cut", tmp_path / "whole")


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes over gloo. (`accelerate launch --cpu --num_processes 2` starts one process,
    without a word.)"""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",  # on a free port
            "-m",
            *command,
        ],
        env=fx.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- real shapes ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ALIGNED)
def test_cached_equals_online_with_a_real_vit(recipe: str, tmp_path: Path) -> None:
    """ViT-B/16 at 224 on photographs of scikit-image: 12 blocks, 196 patches, a tiny student, batch
    4, 20 steps."""
    photographs = photos(tmp_path / "photos")
    teacher = "timm:vit_base_patch16_224"
    args = (
        "--teacher",
        teacher,
        "--weights",
        "random:0",
        "--images",
        str(photographs),
        "--views",
        "2",
    )
    assert (
        fx.feat("extract", *args, "--out", str(tmp_path / "cache"), "--batch-size", "4").status == 0
    )
    sets = ["encoder=tiny", "warmup_epochs=0", "lr=0.0005"] + (
        ["decoder_depth=1"] if recipe == "mralign" else []
    )
    settings = [part for text in sets for part in ("--set", text)]
    common = (
        "train",
        "--recipe",
        recipe,
        *settings,
        "--steps",
        str(STEPS),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    )
    fx.good(fx.stud(*common, "--cache", tmp_path / "cache", "--out", tmp_path / "cached"))
    fx.good(fx.stud(*common, "--cache", tmp_path / "cache", *ONLINE, "--out", tmp_path / "online"))
    first, *_, last = fx.losses(tmp_path / "cached")
    assert last < 0.9 * first
    assert_same_losses(tmp_path / "cached", tmp_path / "online", 1e-3)


def photos(folder: Path) -> Path:
    skimage_data = pytest.importorskip("skimage.data")
    from PIL import Image

    folder.mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "page", "moon"):
        try:
            Image.fromarray(getattr(skimage_data, name)()).save(folder / f"{name}.png")
        except OSError:  # not shipped with this version and nothing may be fetched
            continue
    assert len(list(folder.iterdir())) >= 4
    return folder


# --- targets, seen from outside -------------------------------------------------------------------


def test_every_view_and_the_right_rows_reach_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is given what lies in the cache under the picture's key: read by hand,
    for three epochs."""
    seen: list[tuple[list[str], Any, Any, torch.Tensor]] = []
    original = prefetch.to_device

    def watch(config: Any, targets: Any, host: Any, device: Any, seed: int, **more: Any) -> Any:
        batch = original(config, targets, host, device, seed, **more)
        seen.append((host["keys"], host["view"].copy(), host["epoch"], batch["features"].clone()))
        return batch

    monkeypatch.setattr(prefetch, "to_device", watch)
    fx.good(
        fx.train(
            "maskalign",
            tmp_path / "run",
            "--cache",
            fx.cache_path(),
            "--steps",
            "9",
            "--batch-size",
            "8",
        )
    )
    shown: dict[str, list[int]] = {}
    with Cache(fx.cache_path()) as cache:
        row_of = {key: row for row, key in enumerate(cache.keys)}
        for keys, view, epoch, features in seen:
            for key, number, feature in zip(keys, view.tolist(), features, strict=True):
                stored = cache.read([row_of[key]], number, ("features",))["features"][0]
                np.testing.assert_array_equal(feature.numpy(), stored.astype(np.float32))
                offset = int(rng.key_digests([key])[0, 0] % np.uint64(fx.VIEWS))
                assert number == (epoch + offset) % fx.VIEWS
                shown.setdefault(key, []).append(number)
    assert len(shown) == fx.PICTURES
    assert all(sorted(numbers) == [0, 1, 2] for numbers in shown.values())
