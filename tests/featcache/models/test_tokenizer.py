"""Discrete tokens are stored in a cache: these tests ask which crops a tokenizer sees, and that
what works on parts works here.

The tokenizer is a tiny one whose ids can be computed by hand: the mean red of each patch, divided
by four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import featcache
from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.extraction import extend, extract, plan, teacher_check
from featcache.extraction.forward import run_teacher
from featcache.maintenance import repair, verify
from featcache.models import precision
from featcache.models.contract import ModelCard, Teacher
from featcache.models.tokenizer import TokenizerTeacher
from featcache.models.weights import build_seeded, weight_hash
from featcache.pictures.open_source import open_source
from featcache.pictures.source import Source
from featcache.storage import json_file, manifest
from featcache.storage.store import STORES
from featcache.teachers import load
from featcache.teachers.dvae import Dvae
from featcache.views.policy import Policy
from tests.conftest import SYNTHETIC, Ran, files_below, flip, make_plan

SIZE, GRID = 16, 2  # pixels of an edge, patches of an edge


class Reds(nn.Module):
    """Give four patches of 8 x 8 pixels one of 64 words each."""

    name, weights, pixel_filter = "reds", "none", "lanczos"
    input_px, patches, vocabulary = SIZE, GRID**2, 64

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))

    def forward(self, images: Tensor) -> Tensor:
        edge = SIZE // GRID
        red = (
            images[:, 0]
            .long()
            .unflatten(-1, (GRID, edge))
            .unflatten(-3, (GRID, edge))
            .sum((-1, -3))
            .flatten(1)
        )
        return red // (edge * edge * 4) + self.shift


def make(folder: Path, shift: int = 0, **changes: object) -> plan.Plan:
    options = {"views": 2, "levels": (1,), "rows_per_shard": 5, **changes}
    return plan.Plan(
        source=open_source(folder),
        teacher=TokenizerTeacher(Reds(shift)),
        policy=Policy(size=28),
        **options,
    )


def base(folder: Path, store: str = "zarr") -> plan.Plan:
    return make_plan(folder, SYNTHETIC, views=2, levels=(2, 3), store=store)


def grown(folder: Path, out: Path, store: str = "zarr", **changes: object) -> Path:
    extract.run(base(folder, store), out, batch_size=4)
    part = extend.plan_part(make(folder, store=store, **changes), out)
    assert part is not None
    extract.run(*part, batch_size=4)
    return out


def by_hand(path: Path, crop: list[int], mirrored: int) -> list[int]:
    """Compute ids by Pillow's Lanczos from the stored box to 16 pixels; mean red of each 8 x 8
    block over four."""
    top, left, height, width = crop
    view = Image.open(path).convert("RGB").crop((left, top, left + width, top + height))
    view = view.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    red = np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else view)[
        ..., 0
    ].astype(int)
    return [int(red[y : y + 8, x : x + 8].sum()) // 256 for y in (0, 8) for x in (0, 8)]


@pytest.mark.parametrize("store", STORES)
def test_ids_are_those_of_the_stored_boxes(pictures: Path, tmp_path: Path, store: str) -> None:
    with featcache.open(grown(pictures, tmp_path / "c", store)) as cache:
        assert [name for name in cache.fields if name.startswith("reds/")] == ["reds/token_ids"]
        assert cache.teachers == [SYNTHETIC, "reds"]
        seen = set()
        for view in range(2):
            got = cache.read(range(11), view, ["reds/token_ids", "crop", "flip", "features"])
            assert got["reds/token_ids"].dtype == np.uint16
            for row, key in enumerate(cache.keys):
                if key == "grey16":  # plain PIL clips 16 bits
                    continue
                path = next(path for path in pictures.glob(f"{key}.*"))
                wanted = by_hand(path, got["crop"][row].tolist(), int(got["flip"][row]))
                assert got["reds/token_ids"][row].tolist() == wanted, key
                seen.add(tuple(wanted))
        assert len(seen) > 8
        with pytest.raises(UserError, match="has no beta, eps, gamma"):
            cache.derive("f", teacher="reds")
    assert verify.verify_cache(tmp_path / "c") == ([], 6)


def test_the_manifest_says_what_it_is(photos: Path, tmp_path: Path) -> None:
    part = next((grown(photos, tmp_path / "c") / "parts").iterdir())
    about = manifest.read(part)
    assert about["identity"]["teacher"]["filter"] == "lanczos"
    assert (about["identity"]["teacher"]["input_px"], about["identity"]["levels"]) == (16, [1])
    arrays = set(about["arrays"])
    assert {"token_ids", "crop", "side_crc"} <= arrays
    assert not {"features", "feature_stats", "attention", "mask_order", "row_crc"} & arrays
    ids = about["arrays"]["token_ids"]
    assert (ids["dtype"], ids["item"], ids["dimensions"]) == ("<u2", [4], ["row", "view", "patch"])
    record = json_file.read_json(part / "shards/000000.json")
    assert (
        0
        <= record["statistics"]["token_ids"]["min"]
        < record["statistics"]["token_ids"]["max"]
        < 64
    )


def test_what_is_said_for_features_does_not_change_it(photos: Path, tmp_path: Path) -> None:
    one = grown(photos, tmp_path / "a")
    two = grown(photos, tmp_path / "b", order="topk", tokens="ranked", keep=2, levels=(1,))
    assert files_below(one) == files_below(two)
    assert extend.plan_part(make(photos, order="topk"), one) is None


def test_with_the_teacher_in_one_pass(photos: Path, tmp_path: Path) -> None:
    plans = [base(photos), replace(make(photos), tokens="ranked", keep=1)]
    extract.run_jobs(extend.plan_jobs(plans, tmp_path / "one", add=False), batch_size=4)
    assert files_below(tmp_path / "one") == files_below(grown(photos, tmp_path / "two"))


@pytest.mark.slow
def test_more_views_are_followed(photos: Path, tmp_path: Path) -> None:
    out = grown(photos, tmp_path / "c")
    for wanted in (replace(base(photos), views=3), make(photos, views=3)):
        part = extend.plan_part(wanted, out)
        assert part is not None
        extract.run(*part, batch_size=4)
    with featcache.open(out) as cache:
        assert cache.views_of("reds") == 3
        assert cache.read(range(11), 2, ["reds/token_ids"])["reds/token_ids"].max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_a_flipped_bit_is_found_and_mended(photos: Path, tmp_path: Path, store: str) -> None:
    out = grown(photos, tmp_path / "c", store)
    before = files_below(out)
    part = next((out / "parts").iterdir())
    with featcache.open(out) as cache:
        spec = plan.Plan.arrays.fget(make(photos, store=store))[0]  # type: ignore[attr-defined]
        path, offsets = cache._parts[1].locate(1, spec, 1, np.array([6]))
    flip(Path(path), int(offsets[0]) + 2)
    with featcache.open(out) as cache:
        cache.read([5], 1, ["reds/token_ids"])
        with pytest.raises(UserError, match="parts/reds"):
            cache.read([6], 1, ["reds/token_ids"])
    assert len(verify.verify_cache(out)[0]) == 1

    def load_of(about: dict) -> tuple[Source, Teacher]:
        name = about["identity"]["teacher"]["name"]
        return open_source(photos), TokenizerTeacher(Reds()) if name == "reds" else load(name)

    assert repair.run(out, load_of)["shards"] == [str(part / "shards/000001.json")]
    assert files_below(out) == before


# ---------------------------------------------------------------- what is refused


def test_alone_it_is_no_cache(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"reds: discrete tokens are added to a cache of features.*--add --out CACHE",
    ):
        extend.plan_jobs([make(photos)], tmp_path / "c", add=False)


@pytest.mark.parametrize("shift", [64, -64])
def test_ids_outside_the_vocabulary_are_refused(photos: Path, tmp_path: Path, shift: int) -> None:
    extract.run(base(photos), tmp_path / "c", batch_size=4)
    part = extend.plan_part(make(photos, shift), tmp_path / "c")
    assert part is not None
    with pytest.raises(UserError, match=r"'reds' gave int64 from .*from 0 to 63 are needed"):
        extract.run(*part, batch_size=4)
    with featcache.open(tmp_path / "c") as cache:
        assert cache.teachers == [SYNTHETIC]


def test_other_weights_and_a_check_of_features_are_refused(photos: Path, tmp_path: Path) -> None:
    out = grown(photos, tmp_path / "c")
    with pytest.raises(UsageError, match=r"identity\.teacher\.weight_hash"):
        extend.plan_part(make(photos, 1, views=3), out)
    with pytest.raises(UsageError, match="gives discrete tokens, not features"):
        teacher_check.check(TokenizerTeacher(Reds()), open_source(photos), Policy(size=28), 4)


def test_what_a_teacher_has_a_tokenizer_has() -> None:
    made, pixels = TokenizerTeacher(Reds(5)), torch.full((1, 3, SIZE, SIZE), 80, dtype=torch.uint8)
    assert (made.name, made.weights, made.filter) == ("reds", "none", "lanczos")
    assert (made.input_px, made.patches, made.width, made.depth) == (16, 4, 64, 1)
    assert (made.pixel_mean, made.pixel_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert made.tail() == {}
    assert made.to("cpu") is made
    assert made.ids(pixels).tolist() == [[25, 25, 25, 25]]
    with pytest.raises(TypeError, match="'reds' gives token ids and no levels"):
        made(pixels, (1,))


def test_the_hash_is_the_tokenizers_own() -> None:
    """Its activations count, and so does the code of a user's own file."""
    network = Dvae("random:0", width=4, vocabulary=64, input_px=SIZE)
    assert weight_hash(TokenizerTeacher(network)) == weight_hash(network)
    plain = weight_hash(TokenizerTeacher(Reds()))
    assert plain != weight_hash(TokenizerTeacher(Reds(1)))
    own = Reds()
    own.code = "def load(): ..."  # type: ignore[assignment]
    assert weight_hash(TokenizerTeacher(own)) == weight_hash(own) != plain


@pytest.mark.slow
def test_precision_and_compilation_reach_the_network() -> None:
    network = Dvae("random:0", width=4, vocabulary=64, input_px=SIZE)
    network.name = "dvae"
    made = precision.configure(TokenizerTeacher(network), "bf16", compiled=True)
    assert precision.execution_config(made) == precision.ExecutionConfig("bf16", True)
    assert precision.device_of(made) == torch.device("cpu")
    assert network._compiled_call_impl is not None
    seen: list[torch.dtype] = []
    network._compiled_call_impl = None  # the compiler takes a minute
    network.blocks[1].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    run_teacher(made, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), (1,))
    assert seen == [torch.bfloat16]


def test_what_is_no_network_runs_in_fp32_alone() -> None:
    facts = {"name": "bare", "weights": "none", "input_px": SIZE, "patches": 4}
    bare = SimpleNamespace(
        **facts, vocabulary=64, pixel_filter="lanczos", state_dict=lambda: {"a": torch.zeros(1)}
    )
    made = precision.configure(TokenizerTeacher(bare))
    assert precision.device_of(made) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--precision bf16: teacher 'bare' is no network"):
        precision.configure(made, "bf16")
    with pytest.raises(UsageError, match=r"--compile: teacher 'bare' is no network"):
        precision.configure(made, compiled=True)


def test_loading_tells_tokenizers_apart() -> None:
    found = teachers.load_any("dvae,width=8,vocabulary=24", "random:0", "cpu")
    assert isinstance(found, TokenizerTeacher)
    assert not isinstance(teachers.load_any(SYNTHETIC, None, "cpu"), TokenizerTeacher)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_it_is_converted_copied_and_shown(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path, store: str
) -> None:
    out, other = (
        grown(photos, tmp_path / "c", store),
        next(name for name in STORES if name != store),
    )
    for args in (("convert", out, tmp_path / "d", "--store", other), ("copy", out, tmp_path / "e")):
        ran = featcache_command(*args)
        assert ran.status == 0, ran.err
    with (
        featcache.open(out) as a,
        featcache.open(tmp_path / "d") as b,
        featcache.open(tmp_path / "e") as c,
    ):
        wanted, *got = (
            cache.read(range(11), 1, ["reds/token_ids"])["reds/token_ids"] for cache in (a, b, c)
        )
        for each in got:
            np.testing.assert_array_equal(each, wanted)
    ran = featcache_command("info", out)
    assert ran.status == 0, ran.err
    assert "reds/token_ids" in ran.out
    assert "added: reds" in ran.out
    assert featcache_command("verify", tmp_path / "d").status == 0


@pytest.mark.slow
def test_the_command_adds_it_by_name(
    featcache_command: Callable[..., Ran],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a family of its own would be found: alone, later, and in one pass with a teacher."""
    row = ModelCard("by hand", SIZE, GRID**2, 64, 1)
    family = SimpleNamespace(
        NAMES={"reds": row},
        TOKENIZER=True,
        load=lambda name, options, weights: Reds(),
        __name__="reds",
    )
    known = teachers.modules()
    monkeypatch.setattr(teachers, "modules", lambda: [*known, family])
    base = (
        "--images",
        photos,
        "--size",
        28,
        "--views",
        2,
        "--rows-per-shard",
        5,
        "--batch-size",
        4,
    )
    first = ("--teacher", SYNTHETIC, "--levels", f"{SYNTHETIC}=2,3")
    ran = featcache_command("extract", *base, "--teacher", "reds", "--out", tmp_path / "a")
    assert ran.status == 2
    assert "give a teacher first" in ran.error
    for args in (
        (*first, "--out", tmp_path / "a"),
        ("--add", "--teacher", "reds", "--out", tmp_path / "a"),
    ):
        ran = featcache_command("extract", *base, *args)
        assert ran.status == 0, ran.err
    ran = featcache_command("extract", *base, *first, "--teacher", "reds", "--out", tmp_path / "b")
    assert ran.status == 0, ran.err
    assert (
        files_below(tmp_path / "a")
        == files_below(tmp_path / "b")
        == files_below(grown(photos, tmp_path / "c"))
    )


def test_dall_es_encoder_runs_as_a_family_gives_it(photos: Path, tmp_path: Path) -> None:
    """A narrow one: ids are its own answer to the crop that Pillow makes with Lanczos."""
    network = build_seeded(
        lambda: Dvae("random:0", width=4, vocabulary=64, input_px=SIZE), "random:0"
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for value in network.parameters():  # so that ids differ: no biases, weights that keep the scale
        fan = max(value[0].numel(), 1)
        value.data = (
            torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
            if value.ndim > 1
            else 0 * value
        )
    network.name = "dvae"
    extract.run(base(photos), tmp_path / "c", batch_size=4)
    wanted = plan.Plan(
        source=open_source(photos),
        teacher=TokenizerTeacher(network),
        policy=Policy(size=28),
        views=2,
        levels=(1,),
        rows_per_shard=5,
    )
    part = extend.plan_part(wanted, tmp_path / "c")
    assert part is not None
    extract.run(*part, batch_size=4)
    with featcache.open(tmp_path / "c") as cache:
        got = cache.read(range(11), 1, ["dvae/token_ids", "crop", "flip"])
        for row, key in enumerate(cache.keys):
            if key != "grey16":
                top, left, height, width = got["crop"][row].tolist()
                view = Image.open(next(photos.glob(f"{key}.*"))).convert("RGB")
                view = view.crop((left, top, left + width, top + height))
                pixels = np.asarray(view.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
                pixels = pixels[:, ::-1] if got["flip"][row] else pixels
                ids = network(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
                assert got["dvae/token_ids"][row].tolist() == ids[0].tolist(), key
        assert len(np.unique(got["dvae/token_ids"])) > 1
