"""Only keywords of an architecture reach timm, with sane values, whoever wrote the name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import architecture
from featcache.models.spec import parse_options
from student.models import beit, conv_vit, vit
from student.models.build import build_encoder

FILES = [
    "checkpoint_path=w.pth", "pretrained=true", "pretrained_cfg=x", "pretrained_cfg_overlay=x",
    "cache_dir=/tmp/x", "scriptable=true", "exportable=true", "features_only=true",
    "block_fn=os.system", "mlp_layer=x", "attn_layer=x", "embed_layer=x", "pretrained_strict=false",
    "device=cuda", "dtype=float16", "weight_init=x", "kwargs_filter=x", "__class__=1",
]  # fmt: skip
VALUES = [
    "depth=1000000000", "embed_dim=10000000", "in_chans=0", "depth=-1", "depth=2.0", "depth=true",
    "num_heads=0", "mlp_ratio=1e9", "mlp_ratio=nan", "mlp_ratio=inf", "mlp_ratio=0", "depth=abc",
    "qkv_bias=1", "qkv_bias=no", "class_token=2", "norm_layer=torch.nn.LayerNorm",
    "act_layer=os.system", "global_pool=x", "init_values=nan", "reg_tokens=100000",
]  # fmt: skip


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that says when it is unpickled."""
    monkeypatch.chdir(tmp_path)

    class Touch:
        def __reduce__(self):
            return Path.touch, (Path("ran"),)

    torch.save({"x": Touch()}, "w.pth")
    return tmp_path / "ran"


@pytest.mark.parametrize("option", [*FILES, *VALUES])
def test_a_teacher_takes_no_other_keyword(option: str, opened: Path) -> None:
    spec = f"timm:vit_tiny_patch16_224,img_size=32,patch_size=8,{option}"
    with pytest.raises(UsageError, match=option.partition("=")[0]):
        teachers.load(spec, "random:0")
    assert not opened.exists()


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("option", [*FILES, *VALUES])
@pytest.mark.parametrize("family", ["mae", "cae", "beit", "conv_vit"])
def test_an_encoder_takes_no_other_keyword(option: str, family: str, opened: Path) -> None:
    settings = {"encoder": f"tiny,{option}", "img_size": 32, "patch_size": 16}
    with pytest.raises(UsageError, match=option.partition("=")[0]):
        build_encoder(settings, family)
    assert not opened.exists()


@pytest.mark.parametrize(
    "text",
    [
        "img_size=32,patch_size=4,embed_dim=128,depth=6,num_heads=4", "qkv_bias=false",
        "init_values=1e-5", "init_values=1", "mlp_ratio=4", "reg_tokens=4", "class_token=true",
        "global_pool=token", "act_layer=quick_gelu", "norm_layer=layernorm", "drop_path_rate=0.1",
    ],
)  # fmt: skip
def test_keywords_of_an_architecture_pass(text: str) -> None:
    architecture.check_keywords("a teacher", parse_options(text))


@pytest.mark.parametrize("encoder", ["tiny,depth=0", "tiny,in_chans=1"])
def test_an_encoder_without_blocks_or_colours_is_refused(encoder: str) -> None:
    with pytest.raises(UsageError, match=r"no block|three colours"):
        vit.build(encoder)


def test_an_unknown_keyword_is_met_with_near_ones() -> None:
    with pytest.raises(UsageError, match="did you mean depth"):
        architecture.check_keywords("a teacher", {"dept": 2})


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: vit.build("tiny,depth=48,embed_dim=16384,num_heads=16"),
        lambda: vit.build("base", img_size=1 << 20),
        lambda: beit.build("tiny,depth=48,embed_dim=16384,num_heads=16", "cae"),
        lambda: conv_vit.build("tiny,depth=48,embed_dim=16384,num_heads=16"),
        lambda: teachers.load(
            "timm:vit_tiny_patch16_224,depth=48,embed_dim=16384,num_heads=16", "random:0"
        ),
        lambda: teachers.load_tokenizer("dvae,width=16384", "random:0"),
        lambda: teachers.load_tokenizer("dvae,vocabulary=100000000", "random:0"),
        lambda: teachers.load("synthetic:levels=100000,tokens=1000000,width=100000,size=1000"),
        lambda: teachers.load("timm:vit_tiny_patch16_224,img_size=1000000000", "random:0"),
        lambda: teachers.load("timm:vit_tiny_patch16_224,grid=100000", "random:0"),
        lambda: teachers.load("synthetic:levels=1,tokens=4,width=8,size=1000000000"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_built(make, monkeypatch) -> None:
    memory = type("Memory", (), {"total": 64 << 30})
    monkeypatch.setattr(architecture.psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match=r"GiB|numbers|at most|up to|4096"):
        make()


def test_the_memory_check_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    architecture.check_memory(lambda: nn.Linear(5, 7), "a layer")
    assert torch.equal(torch.rand(4), expected)


def test_an_open_clip_name_takes_no_keyword_of_files() -> None:
    with pytest.raises(UsageError, match="unknown option 'cache_dir'"):
        teachers.load("open_clip:ViT-B-32,cache_dir=/tmp", "random:0")


@pytest.mark.slow
def test_a_runs_encoder_opens_no_file(tmp_path: Path, opened: Path) -> None:
    """As `student eval` meets it: the name lies in config.json."""
    import json

    from student import checkpoint
    from tests import student_fixtures as fixtures

    run = tmp_path / "run"
    shutil.copytree(_run(), run)
    config = json.loads((run / "config.json").read_text())
    config["config"]["encoder"] += f",checkpoint_path={tmp_path / 'w.pth'}"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="checkpoint_path"):
        checkpoint.load_encoder(run)
    ran = fixtures.stud("eval", "knn", run, "--images", fixtures.pictures(), "--device", "cpu")
    assert ran.status != 0
    assert not opened.exists()


def _run() -> Path:
    from tests import student_fixtures as fixtures

    out = fixtures.root() / "untrained"
    if not out.exists():
        fixtures.good(fixtures.train("mae", out, "--cache", fixtures.cache_path(), "--steps", "0"))
    return out
