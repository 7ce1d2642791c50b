"""What a report draws of models, in numbers: W, attention, reconstructions, masks and views,
against what others compute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from featcache import rng
from featcache.pictures.open_source import open_source
from featcache.reading.cache import Cache
from student import masking
from student.config import from_overrides
from student.models import beit, conv_vit, losses, vit
from student.recipes import maskalign
from student.reporting import reported_run, shown_views, student_attention
from student.reporting.reported_run import Mask, ReportedRun
from student.reporting.sections import alignment, masks, reconstructions
from student.targets import assemble
from tests import student_fixtures as fx
from tests.teacher_reference import randomise_parameters

SIZES = {"img_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "maskalign"
    cache = ("--cache", fx.ranked_path(), "--steps", "6", "--batch-size", "8")
    fx.good(fx.train("maskalign", out, *cache))
    return out


# --- W --------------------------------------------------------------------------------------------


def test_w_is_the_tensor_of_the_checkpoint_as_the_loss_uses_it(run: Path) -> None:
    found = reported_run.read(1, run)
    weights = alignment.matrix(found)
    assert weights is not None
    levels, w = weights
    stored = fx.weights(run)["align.mix"]
    assert levels == [2, 3, 4]
    np.testing.assert_array_equal(w, stored.double().numpy())
    head: Any = found.model.align  # type: ignore[union-attr]
    outputs = [torch.randn(2, 5, 48) for _ in range(4)]
    features, ids = torch.randn(2, 3, 17, 24), torch.arange(4).repeat(2, 1)
    for i, (level, predicted, _) in enumerate(head.pairs(outputs, features, ids)):
        mixed = sum(float(w[i, s]) * outputs[s] for s in range(4))
        torch.testing.assert_close(predicted, head.adaptors[str(level)](mixed))


def test_the_table_has_a_row_a_block_and_a_column_a_level() -> None:
    w = np.array([[1.25, -0.5], [0.0, 0.125]])  # levels 3 and 4 of blocks 1 and 2
    table = alignment._table([3, 4], w)
    rows = [line for line in table.splitlines() if line.startswith("<tr>")]
    assert "level 3" in table.partition("level 4")[0]
    assert [row.count("<td") for row in rows] == [2, 2]
    assert "block 1" in rows[0]
    assert [">1.250<" in rows[0], ">0.000<" in rows[0]] == [True, True]
    assert [">-0.500<" in rows[1], ">0.125<" in rows[1]] == [True, True]


def test_w_is_not_there_without_mixing(run: Path) -> None:
    config = from_overrides(
        maskalign.Config, [*fx.RECIPES["maskalign"], "alignment=layer_wise", *_facts()]
    )
    found = reported_run.read(1, run)
    found.__dict__["model"] = maskalign.Model(config)
    assert alignment.matrix(found) is None


def _facts() -> list[str]:
    return ["teacher_depth=4", "teacher_width=24", "img_size=32", "patch_size=8"]


# --- attention ------------------------------------------------------------------------------------


def unfused_attention(blocks: Any, forward: Any) -> Tensor:
    """The last block's whole map (B, H, T, T), where timm's unfused path hands it to dropout."""
    attn, kept = blocks[-1].attn, []
    attn.fused_attn = False
    attn.attn_drop.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        forward()
    return kept[0]


def plain_timm() -> tuple[nn.Module, nn.Module]:
    name = "vit_tiny_patch16_224"
    options = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    ours = vit.build(f"{name},embed_dim=48,depth=3,num_heads=3", drop_path=0.1, **SIZES)
    theirs = timm.create_model(name, num_classes=0, norm_layer=vit.NORM, **SIZES, **options)
    return ours, theirs


def beit_timm(family: str) -> tuple[nn.Module, nn.Module]:
    ours = beit.build("tiny,embed_dim=48,depth=3,num_heads=4", family, **SIZES)
    theirs = timm.create_model(
        "beit_base_patch16_224", num_classes=0, global_pool="token", norm_layer=vit.NORM,
        embed_dim=48, depth=3, num_heads=4, init_values=0.1, **beit.FAMILIES[family], **SIZES,
    )  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize(
    "make", [plain_timm, lambda: beit_timm("cae"), lambda: beit_timm("beit")],
    ids=["mae", "cae", "beit"],
)  # fmt: skip
def test_attention_against_an_unmodified_timm_model_in_float64(make: Any) -> None:
    ours, theirs = make()
    randomise_parameters(ours)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    theirs.double().eval()
    whole = unfused_attention(theirs.blocks, lambda: theirs.forward_features(images.double()))
    looked = student_attention.look(ours.eval(), images)
    expected = whole.mean(1)[:, 0, 1:].numpy()
    assert looked.attention is not None
    np.testing.assert_allclose(looked.attention, expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 1e-3  # and not uniform
    with torch.no_grad():
        tokens = theirs.forward_features(images.double())[:, 1:].numpy()
    np.testing.assert_allclose(looked.tokens, tokens, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls_token", [True, False])
def test_attention_of_masked_convolutions_where_there_is_a_cls(cls_token: bool) -> None:
    text = "tiny,embed_dim=48,depth=2,num_heads=3,stage1=16,stage2=16"
    encoder = conv_vit.build(text, cls_token=cls_token, **SIZES)
    randomise_parameters(encoder, std=0.1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    looked = student_attention.look(encoder.eval(), images)
    assert looked.tokens.shape == (2, 16, 48)
    if not cls_token:
        assert looked.attention is None
        return
    encoder.double()
    whole = unfused_attention(encoder.blocks3, lambda: encoder.forward_features(images.double()))
    expected = whole.mean(1)[:, 0, 1:].numpy()
    np.testing.assert_allclose(looked.attention, expected, rtol=1e-4, atol=1e-6)


def test_attention_of_another_kind_is_not_guessed() -> None:
    encoder: Any = vit.build("tiny,embed_dim=48,depth=1,num_heads=3", **SIZES)

    class Own(type(encoder.blocks[-1].attn)):  # type: ignore[misc]
        """May compute anything."""

    encoder.blocks[-1].attn.__class__ = Own
    images = torch.zeros(1, 3, 32, 32)
    assert student_attention.look(encoder.eval(), images).attention is None


# --- reconstructions ------------------------------------------------------------------------------


class Knowing(nn.Module):
    """Predicts hidden patches as they are, or normalised as MAE's target is."""

    def __init__(self, patch_px: int, norm_pix: bool) -> None:
        super().__init__()
        self.patch_px, self.norm_pix = patch_px, norm_pix

    def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
        true = vit.gather_patches(batch["images"], batch["ids_masked"], self.patch_px)
        return losses.norm_pix(true) if self.norm_pix else true


def shown_by(model: nn.Module, settings: dict[str, Any]) -> ReportedRun:
    found = ReportedRun(1, Path("r"), {"config": settings}, {}, None, {})  # type: ignore[arg-type]
    found.__dict__["model"] = model
    return found


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_student_that_knows_the_picture_gives_it_back(norm_pix: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    ids = masking.split(np.stack([np.random.default_rng(i).permutation(16) for i in range(2)]), 5)
    found = shown_by(Knowing(8, norm_pix), {**SIZES, "norm_pix": norm_pix})
    made = reconstructions.reconstruct(found, pixels, ids)
    assert made is not None
    np.testing.assert_array_equal(made, pixels)


def test_patches_are_put_where_they_belong_and_restored_by_hand() -> None:
    images = torch.zeros(1, 3, 4, 4)
    patches = torch.arange(24.0).view(1, 2, 12)  # of 2 x 2 pixels, three channels each
    filled = reconstructions.fill(images, patches, torch.tensor([[3, 0]]), 2)
    assert filled[0, :, 2, 2].tolist() == [0, 1, 2]  # patch 3 is below, at the right
    assert filled[0, :, 2, 3].tolist() == [3, 4, 5]
    assert filled[0, :, 3, 2].tolist() == [6, 7, 8]
    assert filled[0, :, 0, 0].tolist() == [12, 13, 14]
    assert filled[0, :, 0, 2:].eq(0).all()
    assert images.eq(0).all()
    true = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])  # mean 3, squares 4 + 1 + 0 + 9, over 3
    restored = reconstructions.restored(torch.tensor([[[0.0, 1.0, -1.0, 2.0]]]), true)
    std = (14 / 3 + 1e-6) ** 0.5
    np.testing.assert_allclose(restored[0, 0], [3, 3 + std, 3 - std, 3 + 2 * std], rtol=1e-6)


def test_what_is_seen_stays_and_what_is_hidden_is_predicted() -> None:
    pixels = np.full((1, 32, 32, 3), 200, np.uint8)
    ids = masking.split(np.arange(16)[None], 4)  # the first row is seen

    class Zero(nn.Module):
        def reconstruct(self, batch: dict[str, Tensor]) -> Tensor:
            return torch.zeros(1, 12, 8 * 8 * 3)

    found = shown_by(Zero(), {**SIZES, "norm_pix": False})
    made = reconstructions.reconstruct(found, pixels, ids)
    assert made is not None
    assert (made[0, :8] == 200).all()
    # zero of normalised pixels is ImageNet's mean
    assert made[0, 20, 20].tolist() == [round(255 * x) for x in (0.485, 0.456, 0.406)]


@pytest.mark.parametrize("recipe", ["mae", "mralign", "mrmae", "cae"])
def test_reconstruct_predicts_what_the_loss_compares(recipe: str) -> None:
    """The loss of pixels of each recipe, from what `reconstruct` gives."""
    from student import recipes

    module = recipes.load(recipe)
    sets = [*fx.RECIPES[recipe], "img_size=32", "patch_size=8", "drop_path=0"]
    sets += {"cae": ["target=pixels"], "mrmae": ["target=h", "teacher_width=24"],
             "mralign": ["teacher_depth=4", "teacher_width=24"], "mae": []}[recipe]  # fmt: skip
    torch.manual_seed(0)
    model = module.Model(from_overrides(module.Config, sets)).eval()
    order = torch.randperm(16).repeat(2, 1)
    batch = {"images": torch.randn(2, 3, 32, 32), "features": torch.randn(2, 3, 17, 24)}
    batch |= {"ids_keep": order[:, :6].sort().values, "ids_masked": order[:, 6:].sort().values}
    if recipe == "mrmae":
        batch["features"] = batch["features"][:, :1]
    with torch.no_grad():
        predicted, parts = model.reconstruct(batch), model(batch)
    true = vit.gather_patches(batch["images"], batch["ids_masked"], 8)
    assert torch.isclose(losses.pixel_mse(predicted, true), parts["pixel"])


# --- views and masks ------------------------------------------------------------------------------


def views(path: Path, images: Path | None = None, count: int = 3) -> shown_views.ShownViews:
    source = None if images is None else open_source(images)
    return shown_views.of_cache(Cache(path), source, count, seed=0)


def test_views_are_those_of_the_cache_from_pictures_or_stored() -> None:
    stored, rendered = views(fx.ranked_path()), views(fx.ranked_path(), fx.pictures())
    assert stored.keys == rendered.keys
    at_size = stored.pixels(32), rendered.pixels(32)
    assert at_size[0] is not None
    np.testing.assert_array_equal(*at_size)
    assert stored.pixels(48) is None
    larger = rendered.pixels(48)
    assert larger is not None
    assert larger.shape == (3, 48, 48, 3)
    rendered.check_pixels()
    assert rendered.missing == []


def test_other_pictures_under_the_same_names_are_told(tmp_path: Path) -> None:
    other = fx.save_pictures(tmp_path / "other", seed=1)
    shown = views(fx.cache_path(), other)
    shown.check_pixels()
    assert len(shown.missing) == 1


def test_the_teachers_tokens_are_in_image_order_whatever_the_cache() -> None:
    raster, ranked, kept = (
        views(path).teacher_tokens for path in (fx.cache_path(), fx.ranked_path(), fx.kept_path())
    )
    with Cache(fx.cache_path()) as cache:
        rows = views(fx.cache_path()).rows
        plain = cache.read(rows, 0, ("features",), (4,))["features"][:, 0, 1:]
    assert raster is not None
    np.testing.assert_array_equal(raster, plain.astype(np.float32))
    np.testing.assert_array_equal(ranked, raster)
    known = np.isfinite(kept).all(-1)
    assert known.sum(1).tolist() == [5, 5, 5]
    np.testing.assert_array_equal(kept[known], raster[known])


@pytest.mark.parametrize("name", masking.MASKS)
def test_masks_are_those_of_the_first_epoch_of_training(name: str) -> None:
    shown = views(fx.ranked_path())
    mask = Mask(name, 0.6, 6, 4, seed=7)
    config = SimpleNamespace(mask=name, visible=6, patches=16)
    zeros = np.zeros(3, np.int64)
    host = {"digests": rng.key_digests(shown.keys), "view": zeros, "round": zeros}
    rows = {field: shown.stored[field] for field in masking.fields(name)}
    trained = assemble.draw_masks(config, host, rows, seed=7)  # type: ignore[arg-type]
    np.testing.assert_array_equal(masks.drawn(shown, mask)[0], trained["ids_keep"].numpy())
    seen = masks.visible(shown, mask)
    assert seen.shape == (3, 4, 4)
    assert [np.flatnonzero(each).tolist() for each in seen] == trained["ids_keep"].tolist()


def test_a_mask_says_what_it_lacks() -> None:
    shown = shown_views.of_pictures(
        open_source(fx.pictures()), views(fx.cache_path()).policy, 2, seed=0
    )
    assert masks.lacks(shown, Mask("uniform", 0.5, 8, 4, 0)) == ""
    assert "attention of 4 x 4" in masks.lacks(shown, Mask("topk", 0.5, 8, 4, 0))
    assert "attention of 7 x 7" in masks.lacks(views(fx.cache_path()), Mask("topk", 0.5, 8, 7, 0))


def test_views_without_a_cache_are_drawn_as_a_run_draws_them() -> None:
    shown = views(fx.cache_path(), fx.pictures())
    fresh = shown_views.of_pictures(open_source(fx.pictures()), shown.policy, 3, seed=0)
    assert fresh.keys == shown.keys
    pixels = fresh.pixels(32), shown.pixels(32)
    assert pixels[0] is not None
    np.testing.assert_array_equal(*pixels)


def test_pictures_are_chosen_by_seed() -> None:
    chosen = [shown_views.choose(5, 100, seed) for seed in range(20)]
    assert all(len(set(each)) == 5 and each == sorted(each) for each in chosen)
    assert len({tuple(each) for each in chosen}) == 20
    assert shown_views.choose(5, 3, 0) == [0, 1, 2]
