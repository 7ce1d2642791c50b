"""These tests ask what runs at a precision, what is stored of it, what recomputes it, and what is
said where fp16 ends."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import featcache
from featcache import teachers
from featcache.catalog import extract_command
from featcache.errors import IdentityError, UsageError, UserError
from featcache.extraction import extend, extract, plan
from featcache.models import precision as running
from featcache.models import weights
from featcache.models.contract import Teacher
from featcache.models.timm_wrapper import TimmVit
from featcache.pictures.open_source import open_source
from featcache.storage import identity
from featcache.views.policy import Policy
from student.recipes import TargetSpec
from student.targets.online import OnlineTargets
from tests.conftest import Ran, files_below, flip, make_plan, python

VIT = "timm:vit_tiny_patch16_224,img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"
MANTISSA = {"bf16": 2.0**-8, "fp16": 2.0**-11}  # half a unit of the last place
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def vit(precision: str = "fp32") -> Teacher:
    return running.configure(teachers.load(VIT, "random:0"), precision)


def made(folder: Path, precision: str, **changes: object) -> plan.Plan:
    options = {"views": 2, "levels": (2, 3), "rows_per_shard": 5, **changes}
    return plan.Plan(
        source=open_source(folder), teacher=vit(precision), policy=Policy(size=32), **options
    )


def batch() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8))


# ---------------------------------------------------------------- what runs


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_is_the_librarys_own(precision: str, photos: Path, tmp_path: Path) -> None:
    """Bit for bit timm under torch.autocast, normalised in fp32; as far from fp32 as the mantissa
    is short."""
    extract.run(made(photos, precision, pixels=True), tmp_path / "c", batch_size=4)
    extract.run(made(photos, "fp32"), tmp_path / "full", batch_size=4)
    with featcache.open(tmp_path / "c") as cache:
        got = cache.read(range(2), 0, ["features", "pixels"])
        pair = cache.read(range(2), 1, ["features", "pixels"])
    with featcache.open(tmp_path / "full") as cache:
        full = cache.read(range(2), 0)["features"].astype(np.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 3,
            "num_heads": 3,
            "num_classes": 0,
        }
        model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    seen: list[torch.Tensor] = []
    model.blocks[2].register_forward_hook(lambda _, __, y: seen.append(y))
    # the first batch
    first = np.stack([got["pixels"][0], pair["pixels"][0], got["pixels"][1], pair["pixels"][1]])
    with torch.no_grad(), torch.autocast("cpu", DTYPE[precision]):
        model.forward_features(
            (torch.from_numpy(first).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        )
    y = seen[0].double().numpy()
    h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        got["features"][:, 1].astype(np.float64), h[[0, 2]], rtol=2**-10, atol=2e-6
    )
    error = np.linalg.norm(got["features"].astype(np.float64) - full, axis=-1) / np.linalg.norm(
        full, axis=-1
    )
    assert 0.1 * MANTISSA[precision] < error.max() < 10 * MANTISSA[precision]


def test_threads_that_overlap_leave_what_was_before() -> None:
    """The second comes while the first is inside, and stays when it leaves."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [each.fp32_precision for each in switches]
    first, second = (running.fp32_products(name) for name in ("tf32", "ieee"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert [each.fp32_precision for each in switches] == ["ieee"] * 3
    second.__exit__(None, None, None)
    assert [each.fp32_precision for each in switches] == before


def test_fp32_is_ieee_and_what_was_set_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from inside the forward; cuDNN's convolutions use TF32 unless told otherwise."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in switches]
    teacher = vit()
    seen: list[list[str]] = []
    teacher.vit.blocks[0].register_forward_hook(
        lambda *_: seen.append([each.fp32_precision for each in switches])
    )
    with running.autocast_for(teacher):
        teacher(batch(), (1,))
    teacher.running = running.ExecutionConfig(
        "tf32"
    )  # what `configure` allows where there are such units
    with running.autocast_for(teacher):
        teacher(batch(), (1,))
    assert seen == [["ieee", "ieee"], ["tf32", "tf32"]]
    with pytest.raises(ValueError, match="inside"), running.autocast_for(teacher):
        raise ValueError("inside")
    assert [each.fp32_precision for each in switches] == before
    assert not torch.is_autocast_enabled("cpu")


def test_what_cannot_be_run() -> None:
    with pytest.raises(UsageError, match=r"--precision 'fp8': .*known: bf16, fp16, fp32, tf32"):
        vit("fp8")
    with pytest.raises(UsageError, match=r"cpu has no TF32 units.*--precision fp32"):
        vit("tf32")

    class Plain:
        name = "plain"

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"x": torch.zeros(1)}

    with pytest.raises(UsageError, match="'plain' is no network"):
        running.configure(Plain(), "bf16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--compile: teacher 'plain' is no network"):
        running.configure(Plain(), compiled=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a cache says of it


@pytest.mark.slow
def test_the_precision_is_part_of_the_identity(photos: Path, tmp_path: Path) -> None:
    full, half = (made(photos, precision).manifest() for precision in ("fp32", "bf16"))
    assert [(each.field, each.grade) for each in identity.compare(full, half)] == [
        ("identity.teacher.precision", "fatal")
    ]
    # what makes it again says so
    assert "--precision bf16" in " ".join(extract_command.extract_options(half))
    assert "--precision" not in extract_command.extract_options(full)
    extract.run(made(photos, "bf16"), tmp_path / "c", batch_size=4)
    with pytest.raises(
        IdentityError, match=r"identity\.teacher\.precision \(fatal\): None here, 'bf16' there"
    ):
        extract.run(made(photos, "fp32"), tmp_path / "c", batch_size=4)
    with pytest.raises(
        UsageError, match=r"identity\.teacher\.precision is None, the cache has 'bf16'"
    ):
        extend.plan_part(made(photos, "fp32", levels=(1,)), tmp_path / "c")
    part = extend.plan_part(made(photos, "bf16", levels=(1,)), tmp_path / "c")
    assert part is not None
    extract.run(*part, batch_size=4)
    extract.run(make_plan(photos, policy=Policy(size=32), views=2), tmp_path / "d", batch_size=4)
    # another teacher has its own
    assert extend.plan_part(made(photos, "bf16"), tmp_path / "d") is not None


def test_compiling_is_noted_and_no_part_of_the_identity(photos: Path) -> None:
    one, other = made(photos, "fp32"), made(photos, "fp32")
    running.configure(other.teacher, compiled=True)  # compiles when it first runs
    assert one.manifest()["id"] == other.manifest()["id"]
    assert "compiled" not in one.manifest()["provenance"]
    assert other.manifest()["provenance"]["compiled"] is True
    assert extract_command.extract_options(other.manifest())[-1] == "--compile"
    assert "--compile" not in extract_command.extract_options(one.manifest())
    assert weights.weight_hash(one.teacher) == weights.weight_hash(other.teacher)


@pytest.mark.slow
def test_a_compiled_teacher_gives_the_same_numbers(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path
) -> None:
    base = (
        "extract",
        "--teacher",
        VIT,
        "--weights",
        "random:0",
        "--images",
        photos,
        "--size",
        32,
        "--levels",
        "all",
    )
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        ran = featcache_command(*base, "--batch-size", 4, "--out", tmp_path / name, *more)
        assert ran.status == 0, ran.err
    with featcache.open(tmp_path / "plain") as a, featcache.open(tmp_path / "compiled") as b:
        assert b.manifest["provenance"]["compiled"] is True
        assert a.manifest["id"] == b.manifest["id"]
        for name, bound in (("features", 1e-3), ("attention", 1e-5)):
            x, y = (c.read(range(11), 0, [name])[name].astype(np.float64) for c in (a, b))
            assert np.abs(x - y).max() / np.abs(x).max() < bound


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_verify_and_repair_run_it_alike(
    featcache_command: Callable[..., Ran], photos: Path, tmp_path: Path, precision: str
) -> None:
    base = (
        "--teacher",
        VIT,
        "--weights",
        "random:0",
        "--images",
        photos,
        "--size",
        32,
        "--levels",
        "-1,-2",
    )
    out = tmp_path / "c"
    ran = featcache_command(
        "extract", *base, "--precision", precision, "--rows-per-shard", 5, "--out", out, "--json"
    )
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["levels"] == [2, 3]
    before = files_below(out)
    told = json.loads(featcache_command("verify", out, "--recompute", 11, "--json").out)[
        "recompute"
    ]
    assert told["problems"] == []
    # this CPU gives a row the same bits in any batch
    assert told["feature_error"] < 0.1 * MANTISSA[precision]
    flip(out / "shards/000001.zarr/features/c.0.0.0.0.0", 100)
    ran = featcache_command("repair", out)
    assert ran.status == 0, ran.err
    assert files_below(out) == before


# ---------------------------------------------------------------- where fp16 ends


def test_an_overflow_is_told_by_picture_and_level_with_the_cure(tmp_path: Path) -> None:
    """The last block's second layer gives 70000 times its input: beyond fp16, nothing for bf16."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        folder / "noise.png"
    )

    def large(precision: str) -> plan.Plan:
        teacher = TimmVit(vit().vit, "random:0")
        teacher.name = "large"
        teacher.vit.blocks[2].mlp.fc2.weight.data.fill_(7e4)
        teacher.vit.blocks[2].mlp.fc1.bias.data.fill_(1.0)
        configured = running.configure(teacher, precision)
        return plan.Plan(
            source=open_source(folder),
            teacher=configured,
            policy=Policy(size=32),
            views=1,
            levels=(2, 3),
        )

    told = (
        r"'large' gave non-finite features for picture 'noise', view 0, level 3; --precision fp16 "
        r"ends at 65504.*bf16"
    )
    with pytest.raises(UserError, match=told):
        extract.run(large("fp16"), tmp_path / "fp16", batch_size=2)
    for precision in ("bf16", "fp32"):
        extract.run(large(precision), tmp_path / precision, batch_size=2)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_in_the_loop_runs_as_the_caches_did(
    precision: str, photos: Path, tmp_path: Path
) -> None:
    """Whatever the student's own autocast: the fp16 of the store is the only difference."""
    extract.run(made(photos, precision, pixels=True), tmp_path / "c", batch_size=4)
    with featcache.open(tmp_path / "c") as cache:
        stored = cache.read(range(11), 1, ["features", "pixels"])
        teacher = running.configure_like(teachers.load(VIT, "random:0"), cache.identity)
    spec = TargetSpec(teacher=VIT, levels=(2, 3), fields=("features",), patches=16)
    online = OnlineTargets(Policy(size=32), spec, teacher, 2)
    with torch.autocast("cpu", torch.float16):
        found, _ = online.to_device({"pixels": stored["pixels"]}, torch.device("cpu"))
    assert found["features"].dtype == torch.float32
    np.testing.assert_allclose(
        found["features"].numpy(), stored["features"].astype(np.float32), rtol=2**-10, atol=2e-6
    )


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's allocator is the one that gives memory back"
)
def test_freed_memory_is_kept_for_the_next_batch() -> None:
    """Pages that the kernel has to hand out again and again, counted."""
    code = """
import resource
import torch
from featcache.models import precision

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
precision.keep_freed_memory()
faults(), faults()  # it takes a few rounds until blocks are found again
kept = faults()
print(given_back, kept)
assert kept * 5 < given_back
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_fp32_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that lose bits although IEEE arithmetic was set, as a library's own variable makes
    them: here autocast stands for it."""
    cpu = torch.device("cpu")
    running.check_fp32(cpu)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UsageError, match=r"fp32 cannot be had on cpu.*NVIDIA_TF32_OVERRIDE='1'"),
    ):
        running.check_fp32(cpu)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="cannot be had"):
        vit("fp32")
