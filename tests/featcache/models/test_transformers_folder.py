"""Folders that transformers' `save_pretrained` writes are teachers, and give what transformers'
own models give on the same pixels."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from featcache import teachers
from featcache.errors import UsageError, UserError
from tests import teacher_reference

CLOSE = 1e-5
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32}
VIT = {**SIZES, "patch_size": 8, "intermediate_size": 96}
DINOV2 = {**SIZES, "patch_size": 8, "mlp_ratio": 4}
CLIP = {**VIT, "projection_dim": 12}
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 99,
    "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL = "img_size=32,patch_size=8,embed_dim=24,depth=2,num_heads=3"
SPEC = {
    "vit": f"timm:vit_small_patch16_224,{SMALL}",
    "dinov2": f"timm:vit_small_patch14_dinov2.lvd142m,{SMALL}",
    "registers": f"timm:vit_small_patch14_reg4_dinov2.lvd142m,{SMALL}",
    "dinov3": f"timm:vit_base_patch16_dinov3_qkvb.lvd1689m,{SMALL}",
}


def _clip_spec(folder: Path) -> str:
    """Return the spec of open_clip's tower of the sizes of `CLIP`."""
    tower = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 99, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": tower, "text_cfg": text, "quick_gelu": True}
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return f"open_clip:{path}"


def _model(kind: str) -> Any:
    made: dict[str, Any] = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
        "classifier": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**VIT, layer_norm_eps=1e-6)
        ),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**DINOV2)
        ),
        "dinov3": lambda: transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4)
        ),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=CLIP, text_config=TEXT, projection_dim=12)
        ),
        "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)),
        "clip-projected": lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**CLIP)
        ),
    }
    model = made[kind]().eval()
    model.set_attn_implementation("eager")
    return teacher_reference.randomise_parameters(model)


def _blocks(model: nn.Module) -> Any:
    """Return the picture tower's blocks, whatever the model calls them."""
    lists = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and not name.startswith("text_model")
    }
    return next(iter(lists.values()))


def _run(model: Any, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return transformers' own y_k (B, T, D), and the softmax of its last block, read where its
    attention gives it."""
    kept: list[Tensor] = []
    blocks = _blocks(model)
    attention = next(
        part for name, part in blocks[-1].named_modules()
        if name in ("self_attn", "attention.attention", "attention") and hasattr(part, "q_proj")
    )  # fmt: skip
    handle = attention.register_forward_hook(lambda _, __, out: kept.append(out[1]))
    run = getattr(model, "get_image_features", model)
    ys = teacher_reference.block_outputs(blocks, lambda: run(pixel_values=pixels))
    handle.remove()
    return [y[0] if isinstance(y, tuple) else y for y in ys], kept[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    transformers.utils.logging.disable_progress_bar()
    kinds = (*SPEC, "classifier", "clip", "clip-vision", "clip-projected")
    for kind in kinds:
        _model(kind).save_pretrained(root / kind)
    _model("dinov2").save_pretrained(root / "shards", max_shard_size="10KB")
    return {kind: root / kind for kind in (*kinds, "shards")}


@pytest.mark.slow_after(1)
def test_features_are_those_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    clip = _clip_spec(tmp_path)
    for kind, folder in folders.items():
        model = _model("dinov2" if kind == "shards" else kind)
        spec = {"classifier": SPEC["vit"], "shards": SPEC["dinov2"], **SPEC}.get(kind, clip)
        teacher: Any = teachers.load(spec, str(folder))
        images = teacher_reference.photographs(32)
        pixels = teacher_reference.normalise_in_float64(
            images, teacher.pixel_mean, teacher.pixel_std
        )
        with torch.no_grad():
            wanted, weights = _run(model, pixels.float())
        ys, attention = teacher(images, (1, 2))
        prefix = wanted[0].shape[1] - 16
        for y, own in zip(ys, wanted, strict=True):
            own = torch.cat([own[:, :1], own[:, prefix:]], 1)
            assert float((y - own).abs().max() / own.abs().max()) < CLOSE, kind
        row = weights.mean(1)[:, 0, prefix:]
        assert float((attention - row).abs().max()) < CLOSE, kind
        assert teacher.weights == str(folder)
        if kind.startswith("clip"):
            assert ("proj" in teacher.tail()) == (kind != "clip-vision")


def test_the_biases_of_a_dinov3_are_not_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    """The published ones are zero, and the teachers without such biases take them; others not."""
    from safetensors.torch import load_file, save_file

    bare = SPEC["dinov3"].replace("_qkvb", "")
    with pytest.raises(UserError, match=r"attn\.[qv]_bias is not zero.*dinov3_qkvb"):
        teachers.load(bare, str(folders["dinov3"]))
    folder = Path(shutil.copytree(folders["dinov3"], tmp_path / "zero"))
    state = load_file(folder / "model.safetensors")
    for name, value in state.items():
        if name.endswith(("q_proj.bias", "v_proj.bias")):
            value.zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    images = teacher_reference.photographs(32)
    one, other = (teachers.load(spec, str(folder)) for spec in (bare, SPEC["dinov3"]))
    for y, same in zip(one(images, (1, 2))[0], other(images, (1, 2))[0], strict=True):
        assert torch.allclose(y, same, rtol=CLOSE, atol=CLOSE)


def test_a_projection_is_transposed(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher: Any = teachers.load(_clip_spec(tmp_path), str(folders["clip"]))
    model = _model("clip")
    images = teacher_reference.photographs(32)
    pixels = teacher_reference.normalise_in_float64(images, teacher.pixel_mean, teacher.pixel_std)
    with torch.no_grad():
        found = teacher.visual(pixels.float())
        wanted = model.get_image_features(pixel_values=pixels.float())
    wanted = getattr(wanted, "pooler_output", wanted)
    assert torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE)


def test_a_torch_file_of_a_folder_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders["vit"] / "config.json").read_bytes())
    torch.save(load_file(folders["vit"] / "model.safetensors"), folder / "pytorch_model.bin")
    ours, theirs = (teachers.load(SPEC["vit"], str(each)) for each in (folder, folders["vit"]))
    assert teachers.weight_hash(ours) == teachers.weight_hash(theirs)


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("vit", {"patch_size": 16}, "patch_px 16, the teacher's is 8"),
        ("vit", {"hidden_act": "quick_gelu"}, "activation quick_gelu, the teacher's is gelu"),
        ("vit", {"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001"),
        ("vit", {"num_attention_heads": 4}, "heads 4, the teacher's is 3"),
        ("vit", {"image_size": 64}, "65 positions"),
        ("vit", {"hidden_size": "24"}, "hidden_size is '24'"),
        ("vit", {"patch_size": 0}, "patch_size is 0"),
        ("vit", {"model_type": "swin"}, "model_type is 'swin'"),
        ("clip-vision", {}, "model_type is 'clip_vision_model'"),
        ("dinov2", {"use_swiglu_ffn": True}, "SwiGLU"),
        ("registers", {"num_register_tokens": 3}, "registers 3, the teacher's is 4"),
        ("dinov3", {"use_gated_mlp": True}, "use_gated_mlp is 'True'"),
        ("dinov3", {"rope_theta": 10000.0}, "rope_theta is '10000.0', 100.0 is read here"),
        ("dinov3", {"num_register_tokens": 0}, "registers 0, the teacher's is 4"),
    ],
)
def test_a_config_of_another_network_is_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], told: str
) -> None:
    config = json.loads((folders[kind] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "model.safetensors").write_bytes((folders[kind] / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=told) as error:
        teachers.load(SPEC.get(kind, SPEC["vit"]), str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_configs_activation_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = _clip_spec(tmp_path)
    with pytest.raises(UsageError, match=r"config\.json says QuickGELU"):
        teachers.load(f"{spec},quick_gelu=false", str(folders["clip"]))


def test_shards_lead_nowhere_else(folders: dict[str, Path], tmp_path: Path) -> None:
    source, folder, outside = folders["shards"], tmp_path / "copy", tmp_path / "outside.safetensors"
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) > 2
    index = json.loads((source / "model.safetensors.index.json").read_text())
    places: dict[str, str] = index["weight_map"]
    first = next(name for name in places if list(places.values()).count(places[name]) > 1)
    outside.write_bytes((source / names[0]).read_bytes())

    def refused(told: str, given: object, link: bool = False) -> None:
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "model.safetensors.index.json").write_text(
            given if isinstance(given, str) else json.dumps({"weight_map": given})
        )
        if link:
            (folder / names[0]).unlink()
            (folder / names[0]).symlink_to(outside)
        with pytest.raises(UserError, match=told) as error:
            teachers.load(SPEC["dinov2"], str(folder))
        assert "\n" not in str(error.value)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    moved = {
        tensor: "../outside.safetensors" if s == names[0] else s for tensor, s in places.items()
    }
    refused("no name of a file in the folder", moved)
    refused("no name of a file in the folder", {**moved, first: str(outside)})
    refused("link out of the folder", places, link=True)
    refused("is missing", {**places, "more": "model-00099-of-00003.safetensors"})
    refused("disagree on 'more'", {**places, "more": names[0]})
    refused("disagree on", {name: shard for name, shard in places.items() if name != first})
    refused("the shard of 'more' is no name", {**places, "more": 3})
    refused("has no weight_map", {})
    refused("twice", '{"weight_map": {"a": "x", "a": "y"}}')
    refused("no .safetensors file", {**places, "more": "config.json"})


def test_a_snapshot_of_the_hubs_cache_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(folders["vit"].iterdir()):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    teacher = teachers.load(SPEC["vit"], str(snapshot))
    same = teachers.load(SPEC["vit"], str(folders["vit"]))
    assert teachers.weight_hash(teacher) == teachers.weight_hash(same)


# --- the pixels of a folder -----------------------------------------------------------------------


def _processor(**facts: Any) -> Any:
    """transformers' own image processor at the pictures' size: no resize, no crop."""
    return transformers.ViTImageProcessor(do_resize=False, **facts)


PROCESSORS: dict[str, dict[str, Any]] = {
    "of its class": {},
    "other numbers": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "not normalised": {"do_normalize": False},
    "of 255": {"do_rescale": False, "image_mean": [99, 88, 77], "image_std": [55, 66, 77]},
    "rescaled otherwise": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip-projected"])
def test_pixels_are_normalised_as_the_folders_image_processor_does(
    folders: dict[str, Path], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Features are those of transformers' own model behind its own image processor."""
    spec = SPEC.get(kind) or _clip_spec(tmp_path)
    images, model = teacher_reference.photographs(32), _model(kind)
    for name, facts in PROCESSORS.items():
        folder = Path(shutil.copytree(folders[kind], tmp_path / name))
        processor = _processor(**facts)
        processor.save_pretrained(folder)
        with caplog.at_level(logging.WARNING):
            teacher: Any = teachers.load(spec, str(folder))
        pixels = processor(list(images), return_tensors="pt", input_data_format="channels_first")
        with torch.no_grad():
            wanted, _ = _run(model, pixels["pixel_values"].float())
        ys, _ = teacher(images, (1, 2))
        for y, own in zip(ys, wanted, strict=True):
            error = float((y - own).abs().max() / own.abs().max())
            assert error < 1e-4, (name, error)
        # told where it is not what the teacher would do by itself, as far as that is known
        differs = kind == "dinov2" or (kind == "vit" and name != "of its class")
        assert ("as the image processor of weights" in caplog.text) == differs
        caplog.clear()


def test_a_folder_without_an_image_processor_is_told(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        teacher = teachers.load(SPEC["dinov2"], str(folders["dinov2"]))
    assert "have no preprocessor_config.json" in caplog.text
    assert teacher.pixel_mean == (0.485, 0.456, 0.406)
    caplog.clear()
    # an option of the command line is no accident
    spec = f"{_clip_spec(tmp_path)},pixels=imagenet"
    with caplog.at_level(logging.WARNING):
        assert teachers.load(spec, str(folders["clip"])).pixel_mean == (0.485, 0.456, 0.406)
    assert "preprocessor" not in caplog.text


def test_the_processor_of_a_processor_comes_first(folders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers reads a folder that has both."""
    folder = Path(shutil.copytree(folders["vit"], tmp_path / "both"))
    _processor(image_mean=[0.1, 0.1, 0.1]).save_pretrained(folder)
    nested = {**_processor(image_mean=[0.2, 0.2, 0.2]).to_dict()}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    theirs = transformers.ViTImageProcessor.from_pretrained(folder)
    assert teachers.load(SPEC["vit"], str(folder)).pixel_mean == tuple(theirs.image_mean)
    assert list(theirs.image_mean) == [0.2, 0.2, 0.2]
    (folder / "processor_config.json").write_text("{}")
    assert teachers.load(SPEC["vit"], str(folder)).pixel_mean == (0.1, 0.1, 0.1)


@pytest.mark.slow
def test_an_image_processor_that_says_nonsense_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["vit"], tmp_path / "copy"))
    _processor().save_pretrained(folder)
    whole = json.loads((folder / "preprocessor_config.json").read_text())
    cases: dict[str, Any] = {
        "image_mean is": {"image_mean": None},
        "three numbers are needed": {"image_std": [1, 1]},
        "image_std is 'x'": {"image_std": ["x", 1, 1]},
        "image_mean is 'True'": {"image_mean": [True, 1, 1]},
        "image_std is not above 0": {"image_std": [0.5, 0, 0.5]},
        "rescale_factor or": {"rescale_factor": -1},
        "rescale_factor is": {"rescale_factor": 1e300},
        "do_rescale is": {"do_rescale": 1},
        "do_flip_channel_order is true": {"do_flip_channel_order": True},
        "rescale_offset is true": {"rescale_offset": True},
    }
    for told, facts in cases.items():
        (folder / "preprocessor_config.json").write_text(json.dumps({**whole, **facts}))
        with pytest.raises(UserError, match=told) as caught:
            teachers.load(SPEC["vit"], str(folder))
        assert "\n" not in str(caught.value)
    for text in ("[]", "{", '{"image_mean": [NaN, 1, 1]}', '{"a": 1, "a": 2}'):
        (folder / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be taken"):
            teachers.load(SPEC["vit"], str(folder))
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(whole))
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").symlink_to(outside)
    with pytest.raises(UserError, match="link out of the folder"):
        teachers.load(SPEC["vit"], str(folder))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file, but a folder without config\.json"):
        teachers.load(SPEC["vit"], f"{tmp_path}/")
