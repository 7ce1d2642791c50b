"""One cache of `clip-b16`, seven levels over crops of 0.08 to 1, from which every recipe that
learns from a CLIP is trained.

The architecture is the real one and its weights are drawn (random:0), which is said wherever the
cache is shown; what is compared here is which numbers are taken. Students keep twelve blocks, so
that student block k stands beside level k.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import skimage
import torch
import torch.nn.functional as F
import zarr
from PIL import Image

from featcache import teachers
from student import checkpoint, config, recipes
from tests import student_fixtures as fx

pytestmark = pytest.mark.slow

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# whose two views, under this seed, are of a fifth of the area or more
WIDE = ("astronaut", "coffee")
SEED = 8
STUDENT = (
    "encoder=tiny,embed_dim=48,depth=12,num_heads=4",
    "drop_path=0",
    "warmup_epochs=0",
    "lr=0.001",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Every recipe but cae, whose tokens come from another network; and MaskAlign's Table 3.
ONE = {name: (name, ()) for name in recipes.names() if name not in ("cae", "caev2", "maskalign")}
ONE |= {f"maskalign-top-{k}": ("maskalign", (f"level_weights=top:{k}",)) for k in (1, 3, 5, 7)}
ONE |= {"caev2-unjittered": ("caev2", ("jitter=0",))}
LEVELS = {f"maskalign-top-{k}": set(range(13 - k, 13)) for k in (1, 3, 5, 7)} | {
    "fd": {12},
    "kd": {12},
    "milan": {12},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        (folder / name).write_bytes((Path(skimage.__file__).parent / "data" / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def cache(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "clip"
    given = (
        "--teacher",
        "clip-b16",
        "--weights",
        "random:0",
        "--images",
        str(photos),
        "--out",
        str(out),
    )
    drawn = (
        "--views",
        "2",
        "--levels",
        "last:7",
        "--scale",
        "0.08,1",
        "--seed",
        str(SEED),
        "--batch-size",
        "4",
    )
    ran = fx.good(fx.feat("extract", *given, *drawn))
    assert "random:0" in ran.err
    return out


def digests(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.blake2b(path.read_bytes()).hexdigest() for path in paths}


def train(recipe: str, out: Path, cache: Path, *options: Any, sets: tuple[str, ...] = ()) -> fx.Ran:
    settings = [word for text in (*STUDENT, *sets) for word in ("--set", text)]
    given = ("--cache", cache, "--out", out, "--device", "cpu", "--precision", "fp32", *options)
    return fx.good(fx.stud("train", "--recipe", recipe, *given, *settings))


@pytest.mark.parametrize("case", sorted(ONE))
def test_it_serves_each_without_the_teacher(
    case: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, sets = ONE[case]
    before = digests(cache)
    monkeypatch.setattr(
        teachers, "load", lambda *args, **options: pytest.fail("the teacher was loaded")
    )
    ran = train(recipe, tmp_path / "run", cache, "--steps", "2", sets=sets)
    monkeypatch.undo()
    assert digests(cache) == before
    losses = fx.losses(tmp_path / "run")
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    record = checkpoint.read_config(tmp_path / "run")
    assert record["targets"]["kind"] == "cached"
    assert record["targets"]["identity"]["levels"] == [6, 7, 8, 9, 10, 11, 12]
    module = recipes.load(recipe)
    spec = module.needs(config.from_overrides(module.Config, [*STUDENT, *sets]))
    assert set(spec.levels) == LEVELS.get(case, set(spec.levels))
    assert ("RANDOM WEIGHTS random:0" in ran.err) == bool(spec.fields)
    deviates = "note: jitter=0 deviates from the recipe, which was published with 0.4"
    assert (deviates in ran.err) == (recipe == "caev2")


def test_top_8_needs_a_level_that_is_not_there(cache: Path, tmp_path: Path) -> None:
    settings = [word for text in (*STUDENT, "level_weights=top:8") for word in ("--set", text)]
    ran = fx.stud(
        "train", "--recipe", "maskalign", "--cache", cache, "--out", tmp_path / "run", *settings
    )
    assert ran.status == 1
    assert "level 5 is missing, it has 6, 7, 8, 9, 10, 11, 12" in ran.line
    assert "--add" in ran.line


def clip_z(
    photos: Path, cache: Path, view: dict[str, int]
) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
    """Of each picture's view: its 224 pixels, and z (197, 512) float64 of open_clip's own network
    and projection."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).visual.eval()
    ys: list[torch.Tensor] = []
    visual.transformer.resblocks[-1].register_forward_hook(lambda _, __, y: ys.append(y))
    group = zarr.open_group(cache / "shards/000000.zarr", mode="r")
    found = {}
    for row, name in enumerate(sorted(NAMES)):
        key = name.partition(".")[0]
        if key not in view:
            continue
        top, left, height, width = group["crop"][row, view[key]].tolist()
        picture = (
            Image.open(photos / name).convert("RGB").crop((left, top, left + width, top + height))
        )
        picture = picture.resize((224, 224), Image.Resampling.BICUBIC)
        if group["flip"][row, view[key]]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(((np.asarray(picture) / 255 - MEAN) / STD).astype(np.float32)).permute(
            2, 0, 1
        )[None]
        with torch.no_grad():
            own = visual(x)[0].double()
            norm = visual.ln_post
            f = F.layer_norm(
                ys.pop()[0].double(), (768,), norm.weight.double(), norm.bias.double(), 1e-5
            )
            z = f @ visual.proj.double()
        # [CLS] is what the network itself gives
        torch.testing.assert_close(z[0], own, rtol=1e-4, atol=1e-5)
        found[key] = np.asarray(picture), z
    return found


def test_z_is_learnt_end_to_end(cache: Path, photos: Path, tmp_path: Path) -> None:
    """kd with nothing hidden, all pictures in each batch: its first loss is that of plain timm and
    open_clip."""
    two = tmp_path / "two"
    two.mkdir()
    for name in NAMES:
        if name.partition(".")[0] in WIDE:
            (two / name).write_bytes((photos / name).read_bytes())
    sets = ("mask_ratio=0", "mask=uniform")
    train(
        "kd",
        tmp_path / "run",
        cache,
        "--images",
        two,
        "--batch-size",
        "2",
        "--steps",
        "12",
        sets=sets,
    )
    losses = fx.losses(tmp_path / "run")

    # the stored views take turns; a picture begins at the first word of its key's digest
    words = {key: hashlib.blake2b(key.encode(), digest_size=16).digest()[:8] for key in WIDE}
    teacher = clip_z(
        photos, cache, {key: int.from_bytes(word, "little") % 2 for key, word in words.items()}
    )
    module = recipes.load("kd")
    torch.manual_seed(0)
    model = module.Model(config.from_overrides(module.Config, [*STUDENT, *sets])).double()
    parts = []
    for pixels, z in teacher.values():
        x = (pixels / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        with torch.no_grad():
            pred = model.head(
                model.encoder.forward_features(torch.from_numpy(x).permute(2, 0, 1)[None])
            )[0]
        parts.append((2 - 2 * F.cosine_similarity(pred, z)).mean().item())
    assert losses[0] == pytest.approx(float(np.mean(parts)), rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
