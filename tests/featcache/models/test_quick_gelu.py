"""CLIP weights run with their own activation: every pair that is silently wrong is refused, and
nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from featcache.models import quick_gelu, weights
from tests.featcache.teachers.test_families import small_clip

MISMATCHED = [
    (arch, tag)
    for arch, tag in open_clip.list_pretrained()
    if bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu"))
    and not open_clip.get_model_config(arch).get("quick_gelu")
]


def test_the_table_still_has_pairs_that_would_be_wrong() -> None:
    assert ("ViT-B-16", "openai") in MISMATCHED
    assert len(MISMATCHED) > 10


@pytest.mark.parametrize(("arch", "tag"), MISMATCHED)
def test_every_mismatched_pair_is_refused_with_the_right_one(arch: str, tag: str) -> None:
    with pytest.raises(
        UsageError, match=f"QuickGELU, {arch} runs GELU.*give open_clip:{arch}-quickgelu/{tag}"
    ):
        teachers.load(f"open_clip:{arch}/{tag}")


def test_an_option_against_the_tag_is_refused() -> None:
    with pytest.raises(UsageError, match="quick_gelu=false, but the tag says QuickGELU"):
        teachers.load("open_clip:ViT-B-16-quickgelu/openai,quick_gelu=false")
    with pytest.raises(UsageError, match="quick_gelu=true, but the tag says GELU"):
        teachers.load("clip-b16,quick_gelu=true", "laion2b_s34b_b88k")
    with pytest.raises(UsageError, match="true or false"):
        teachers.load("clip-b16,quick_gelu=3", "random:0")


def _weights(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual = open_clip.create_model("ViT-B-32", load_weights=False).visual
    save_file(visual.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def _quick(teacher: Any) -> bool:
    kinds = {type(block.mlp.gelu) for block in teacher.visual.transformer.resblocks}
    assert len(kinds) == 1
    return kinds == {QuickGELU}


@pytest.mark.slow
def test_a_file_that_does_not_say_is_asked_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless its teacher's name says whose weights they are; that is told."""
    path = str(_weights(tmp_path))

    def told() -> list[str]:
        return [
            record.getMessage() for record in caplog.records if record.name.startswith("featcache")
        ]

    name = "open_clip:ViT-B-32"
    with pytest.raises(
        UsageError, match=f"give {name},quick_gelu=true .* or {name},quick_gelu=false"
    ):
        teachers.load(name, path)
    assert told() == []
    assert _quick(teachers.load("clip-b32", path))
    (note,) = told()
    assert f"{path} does not say its activation; clip-b32 runs QuickGELU" in note
    assert "give clip-b32,quick_gelu=false if these are others" in note
    caplog.clear()
    assert _quick(teachers.load("clip-b32,quick_gelu=true", path))
    assert not _quick(teachers.load("clip-b32,quick_gelu=false", path))
    assert told() == []
    assert _quick(teachers.load("open_clip:ViT-B-32-quickgelu", path))  # the name says it
    # so does the tag
    assert not _quick(teachers.load("open_clip:ViT-B-32/laion2b_s34b_b79k", path))
    with pytest.raises(UsageError, match="quick_gelu=false, but the name says QuickGELU"):
        teachers.load("open_clip:ViT-B-32-quickgelu,quick_gelu=false", path)


@pytest.mark.parametrize("quick", [True, False])
def test_a_folder_says_it(tmp_path: Path, quick: bool) -> None:
    """open_clip's own form of saved models: a config beside the weights."""
    folder = tmp_path / "saved"
    folder.mkdir()
    small = json.loads(small_clip(tmp_path, quick).read_text())
    about = {
        "model_cfg": small,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="holds no weights"):
        teachers.load(f"open_clip:local-dir:{folder}")
    drawn: Any = teachers.load(f"open_clip:local-dir:{folder}", "random:1")
    named = {f"visual.{name}": value for name, value in drawn.visual.state_dict().items()}
    save_file({**named, "logit_scale": torch.ones(())}, folder / "open_clip_model.safetensors")
    read: Any = teachers.load(f"open_clip:local-dir:{folder}")
    assert _quick(read) is _quick(drawn) is quick
    assert read.pixel_mean == (0.1, 0.2, 0.3)
    assert read.pixel_std == (0.5, 0.6, 0.7)
    assert weights.weight_hash(read) == weights.weight_hash(drawn)
    other = small_clip(tmp_path, not quick, "other.json")
    with pytest.raises(
        UsageError, match=r"open_clip_config.json beside the file says .*, the name says "
    ):
        teachers.load(f"open_clip:{other}", str(folder / "open_clip_model.safetensors"))


class _Named(nn.Module):
    """Script like OpenAI's archives: a module whose activation is a class of its own."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(2, 2), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.linear(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("activation", "quick"), [(QuickGELU(), True), (nn.GELU(), False), (nn.Tanh(), None)]
)
def test_a_scripted_archive_names_its_activation(
    tmp_path: Path, activation: nn.Module, quick: bool | None
) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(_Named(activation)), path)
    if quick is None:
        with pytest.raises(UsageError, match="do not say their activation"):
            quick_gelu.from_file("clip-b16", None, {}, str(path))
        return
    assert quick_gelu.from_file("clip-b16", None, {}, str(path), fallback=not quick) == (quick, "")
    with pytest.raises(UsageError, match="the archive says"):
        quick_gelu.from_file("clip-b16", None, {"quick_gelu": not quick}, str(path))


class _Whole(nn.Module):
    """Hold the whole model as OpenAI's archives do, the picture tower as `visual`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.logit_scale = visual, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x) * self.logit_scale


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_traced_clip_is_loaded_with_its_activation(tmp_path: Path) -> None:
    spec = f"open_clip:{small_clip(tmp_path)}"
    drawn: Any = teachers.load(spec, "random:2")
    drawn.visual.transformer.resblocks[-1].attn._forward_pre_hooks.clear()
    whole = _Whole(drawn.visual)
    torch.jit.save(torch.jit.trace(whole, torch.zeros(1, 3, 48, 48)), tmp_path / "clip.pt")
    read: Any = teachers.load(spec, str(tmp_path / "clip.pt"))
    assert _quick(read)
    assert all(
        torch.equal(value, drawn.visual.state_dict()[name])
        for name, value in read.visual.state_dict().items()
    )
    with pytest.raises(UsageError, match="the archive says QuickGELU, the name says GELU"):
        teachers.load(
            f"open_clip:{small_clip(tmp_path, False, 'gelu.json')}", str(tmp_path / "clip.pt")
        )


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{broken")
    (tmp_path / "b.json").write_text('{"embed_dim": 3}')
    (tmp_path / "c.json").write_text(
        json.dumps({"embed_dim": 3, "vision_cfg": {"width": "x"}, "text_cfg": {}})
    )
    for name, told in (
        ("a", "cannot be read"),
        ("b", "lacks embed_dim, vision_cfg or text_cfg"),
        ("c", "cannot build"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            teachers.load(f"open_clip:{tmp_path / name}.json", "random:0")
        assert "\n" not in str(caught.value)
