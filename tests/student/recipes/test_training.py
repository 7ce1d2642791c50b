"""Every recipe trains from a small cache by the ordinary command, and leaves an encoder one can
take home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache import rng
from featcache.errors import UserError
from featcache.reading.cache import Cache
from featcache.targets import levels
from student import checkpoint, recipes
from student.recipes import TargetSpec
from student.targets.cached import CachedTargets
from student.targets.online import OnlineTargets
from tests import student_fixtures as fx

STEPS = ("--steps", "12", "--batch-size", "12", "--precision", "fp32")


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("recipe", sorted(fx.RECIPES))
def test_trains_from_a_cache(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fx.good(
        fx.train(recipe, run, "--cache", fx.cache_of(recipe), "--images", fx.pictures(), *STEPS)
    )
    losses = fx.losses(run)
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    encoder, _ = checkpoint.load_encoder(run)
    with torch.no_grad():
        features = encoder.forward_features(torch.zeros(1, 3, fx.SIZE, fx.SIZE))  # type: ignore[operator]
    assert features.shape == (1, 17, 48)
    assert torch.isfinite(features).all()


CONV = ("family=conv_vit", "encoder=tiny,stage1=16,stage2=24,embed_dim=48,depth=2,num_heads=3")


@pytest.mark.slow
@pytest.mark.parametrize("cls_token", [False, True])
def test_masked_convolutions_train_from_a_cache(cls_token: bool, tmp_path: Path) -> None:
    """And their encoder is taken home: 16 patches, and CLS where it was asked for."""
    run, sets = tmp_path / "run", (*CONV, f"conv_cls={str(cls_token).lower()}")
    fx.good(
        fx.train(
            "mrmae",
            run,
            "--cache",
            fx.cache_path(),
            "--images",
            fx.pictures(),
            *STEPS,
            sets=sets,
        )
    )
    losses = fx.losses(run)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    encoder, _ = checkpoint.load_encoder(run)
    with torch.no_grad():
        features = encoder.forward_features(torch.zeros(1, 3, fx.SIZE, fx.SIZE))  # type: ignore[operator]
    assert features.shape == (1, 16 + cls_token, 48)
    labelled = fx.save_pictures(tmp_path / "labelled", classes=2)
    words = ("eval", "knn", run, "--images", labelled, "--device", "cpu", "--json")
    assert 0 <= fx.good(fx.stud(*words, "--pool", "mean")).json["top1"] <= 100
    ran = fx.stud(*words)
    assert ran.status == (0 if cls_token else 2)
    assert cls_token or "its encoder has none; give --pool mean" in ran.line


def test_topk_shows_the_same_in_each_epoch(tmp_path: Path) -> None:
    """The 4 patches of most attention, whatever the epoch; an attentive draw is another each
    time."""
    from student.targets.assemble import draw_masks

    with Cache(fx.cache_path()) as cache:
        module = recipes.load("mrmae")
        digests, attention = (
            cache.keys.digests,
            cache.read(np.arange(len(cache)), 0, ("attention",))["attention"],
        )
        for mask, same in (("topk", True), ("attentive", False)):
            given = module.Config(img_size=32, patch_size=8, mask=mask)
            epochs = [
                draw_masks(
                    given, {"digests": digests, "round": epoch}, {"attention": attention}, 0
                )["ids_keep"]
                for epoch in (0, 1)
            ]
            assert torch.equal(*epochs) is same
            if same:
                expected = [
                    sorted(sorted(range(16), key=lambda j, row=row: (-row[j], j))[:4])
                    for row in attention
                ]
                assert epochs[0].tolist() == expected


@pytest.mark.slow
def test_a_kept_cache_serves_what_reads_visible_tokens_only(tmp_path: Path) -> None:
    """5 of 16 patches are stored, 4 are shown."""
    options = ("--cache", fx.kept_path(), "--images", fx.pictures(), *STEPS)
    ran = fx.good(fx.train("kd", tmp_path / "run", *options))
    assert "mask=stored" in ran.err
    assert np.isfinite(fx.losses(tmp_path / "run")).all()
    fx.good(fx.train("mrmae", tmp_path / "c", *options))
    assert np.isfinite(fx.losses(tmp_path / "c")).all()
    assert (
        "and the recipe reads all"
        in fx.train("mrmae", tmp_path / "d", *options, sets=("mimic_at=decoder",)).line
    )
    assert "and the recipe reads all" in fx.train("milan", tmp_path / "b", *options).line


def test_colours_that_deviate_from_the_publication_are_called_so(tmp_path: Path) -> None:
    """The cache is not jittered, CAE v2 was published with 0.4: either the cache or the setting is
    said to differ."""
    options = ("--cache", fx.cache_path(), "--images", fx.pictures(), "--steps", "0")
    asked = fx.good(fx.train("caev2", tmp_path / "a", *options, sets=("jitter=0",)))
    assert "note: jitter=0 deviates from the recipe, which was published with 0.4\n" in asked.err
    assert "colours jittered" not in asked.err
    plain = fx.good(fx.train("caev2", tmp_path / "b", *options))
    assert "note: colours jittered by 0; the recipe was published with 0.4\n" in plain.err
    assert "jitter=" not in plain.err
    assert "jitter" not in fx.good(fx.train("kd", tmp_path / "c", *options)).err


def test_every_recipe_is_among_them() -> None:
    assert sorted(fx.RECIPES) == recipes.names()


# --- targets that derive from what is stored ------------------------------------------------------

CPU = torch.device("cpu")


def spec_of(derive: str, **more: Any) -> TargetSpec:
    return TargetSpec(
        teacher=fx.TEACHER, levels=(4,), fields=("features",), patches=16, derive=derive, **more
    )


class Projecting(Cache):
    """Leave the test cache as a teacher with a projection, or with a norm of another eps, would
    have left it."""

    eps = 1e-5

    def tail(self, teacher: str | None = None) -> dict[str, Any]:
        proj = np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
        return {**super().tail(teacher), "proj": proj, "eps": np.array(self.eps, np.float32)}


class OtherEps(Projecting):
    eps = 1e-6


@pytest.mark.parametrize("kind", [Projecting, OtherEps])
@pytest.mark.parametrize("derive", ["z", "f", "fd"])
@pytest.mark.parametrize("path", [fx.cache_path, fx.ranked_path])
def test_derived_targets_equal_numpys(kind: type[Projecting], derive: str, path: Any) -> None:
    """In float64 from what the cache stores: y = h std + mean, the teacher's own norm of it, its
    projection."""
    cache = kind(path())
    rows, view = np.arange(5), np.array([0, 1, 2, 0, 1])
    source = CachedTargets(cache, spec_of(derive), np.arange(len(cache)))
    assert ("feature_stats" in source.fields) == (kind is OtherEps)
    got, _ = source.to_device(source.fetch(rows, view), CPU)
    assert set(got) == {"targets"}

    stored = cache.read(rows, view, ("features", "feature_stats", "mask_order"), [4])
    stats = stored["feature_stats"][:, 0].astype(np.float64)
    y = stored["features"][:, 0].astype(np.float64) * stats[..., 1:] + stats[..., :1]
    tail = {name: value.astype(np.float64) for name, value in cache.tail().items()}
    centred = y - y.mean(-1, keepdims=True)
    variance = stats[..., 1:] ** 2 - 1e-5
    f = (y - stats[..., :1]) / np.sqrt(variance + tail["eps"]) * tail["gamma"] + tail["beta"]
    assert abs(centred).max() > 0
    expected = {"f": f, "z": f @ tail["proj"], "fd": (f - f.mean(-1, keepdims=True)) / np.sqrt(
        f.var(-1, keepdims=True) + 1e-5
    )}[derive]  # fmt: skip
    if cache.identity["tokens"] == "ranked":  # stored by rank: token 1 + j is patch order[j]
        image_order = np.empty_like(expected)
        for i, order in enumerate(stored["mask_order"]):
            image_order[i, 0] = expected[i, 0]
            image_order[i, 1 + order.astype(int)] = expected[i, 1:]
        expected = image_order
    np.testing.assert_allclose(got["targets"].numpy(), expected, rtol=2e-4, atol=2e-4)

    ids_keep = np.array([[3, 0, 15], [7, 8, 9], [1, 14, 2], [0, 1, 2], [15, 14, 13]])
    some = CachedTargets(cache, spec_of(derive, visible_only=True), np.arange(len(cache)))
    host = some.fetch(rows, view) | {"drawn": {"ids_keep": torch.from_numpy(ids_keep)}}
    seen = some.to_device(host, CPU)[0]["targets"].numpy()
    known = np.zeros((5, 17), bool)
    known[:, 0] = True
    np.put_along_axis(known, 1 + ids_keep, True, axis=1)
    np.testing.assert_allclose(seen[known], expected[known], rtol=2e-4, atol=2e-4)
    assert np.isnan(seen[~known]).all()


@pytest.mark.slow
def test_derived_targets_of_the_teacher_in_the_loop_equal_the_cached_ones(tmp_path: Path) -> None:
    options = ("--cache", fx.cache_path(), "--images", fx.pictures(), *STEPS)
    fx.good(fx.train("kd", tmp_path / "a", *options, sets=("drop_path=0",)))
    fx.good(fx.train("kd", tmp_path / "b", *options, "--teacher", "online", sets=("drop_path=0",)))
    np.testing.assert_allclose(fx.losses(tmp_path / "a"), fx.losses(tmp_path / "b"), rtol=2e-3)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_teacher_without_a_projection_is_refused_for_z(mode: str, tmp_path: Path) -> None:
    options = (
        "--cache",
        fx.cache_path(),
        "--images",
        fx.pictures(),
        *STEPS,
        "--teacher",
        mode,
    )
    ran = fx.train("milan", tmp_path / "run", *options, sets=("target=z",))
    assert ran.status == 1
    assert "has no projection" in ran.line
    assert "--set target=f" in ran.line


def test_channels_of_the_output_are_a_fact_of_the_cache(tmp_path: Path) -> None:
    fx.good(
        fx.train(
            "kd",
            tmp_path / "run",
            "--cache",
            fx.cache_path(),
            "--images",
            fx.pictures(),
            *STEPS,
        )
    )
    # its width: it has no projection
    assert checkpoint.read_config(tmp_path / "run")["config"]["teacher_out"] == 24
    ran = fx.train(
        "kd",
        tmp_path / "b",
        "--cache",
        fx.cache_path(),
        "--images",
        fx.pictures(),
        *STEPS,
        sets=("teacher_out=7",),
    )
    assert "--set teacher_out=7 does not fit: the targets have teacher_out=24" in ran.line


def test_stats_of_online_and_cached_targets_share_one_function() -> None:
    """f of the last level, online, in float64 from the teacher's own y."""
    from featcache import teachers
    from featcache.views.policy import Policy

    teacher = teachers.load(fx.TEACHER)
    pixels = (
        rng.words(rng.key_digests(["a"]), rng.stream("t", 0), 32 * 32 * 3) % np.uint64(256)
    ).astype(np.uint8)
    online = OnlineTargets(Policy(size=32), spec_of("f"), teacher, None)
    host = {
        "pixels": pixels.reshape(1, 32, 32, 3),
        "digests": rng.key_digests(["a"]),
        "view": np.zeros(1, np.int64),
    }
    got, _ = online.to_device(host, CPU)
    y = teacher(torch.from_numpy(host["pixels"]).permute(0, 3, 1, 2), [4])[0][0].double().numpy()
    h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + levels.EPS)
    expected = h * teacher.tail()["gamma"] + teacher.tail()["beta"]
    np.testing.assert_allclose(got["targets"].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_fields_that_no_teacher_in_the_loop_gives_are_refused() -> None:
    from featcache.views.policy import Policy

    spec = TargetSpec(teacher="dvae", levels=(), fields=("token_ids",), patches=16, vocabulary=8)
    with pytest.raises(UserError, match=r"--teacher online computes no token_ids; .* with --cache"):
        OnlineTargets(Policy(size=32), spec, None, None)
