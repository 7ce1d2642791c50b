"""CLIP's picture towers are teachers through open_clip (METHODS 0.8): `clip-b16`, `clip-b32`,
`clip-l14`, and `open_clip:ARCH/TAG`, where ARCH is a name of open_clip's, `local-dir:FOLDER`,
`hf-hub:ORG/NAME` or `CONFIG.json`.

OpenAI's weights were trained with QuickGELU; under plain GELU they are silently wrong and cost
points. So the activation is never guessed: a tag says its own, a folder's config says it, a
scripted archive names it, and for a file that says nothing `quick_gelu=true|false` is asked for;
the `clip-` names stand for OpenAI's weights and run QuickGELU then, with a note. What disagrees is
refused.

Options: `img_size` in pixels or `grid` in patches a side; `pos`, how positions come onto another
grid (`models.position_embedding`); `quick_gelu`; `pixels=imagenet`, which normalises pixels by
ImageNet's statistics in place of the tower's own, as MILAN's released code did. `clip-l14` sees 196
pixels on the 14 x 14 grid of a /16 student by default; `img_size=224` is its own size, and
`img_size=336` is the other network that OpenAI trained for it.

The tower itself is read by `models.open_clip_wrapper`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from featcache.errors import UsageError, UserError, near
from featcache.models import (
    open_clip_config,
    open_clip_text,
    position_embedding,
    quick_gelu,
    transformers_folder,
    transformers_pixels,
)
from featcache.models.contract import REGISTERED, ModelCard, Option
from featcache.models.open_clip_text import TextTower
from featcache.models.open_clip_wrapper import architecture_of, set_positions, wrap
from featcache.models.spec import check_options
from featcache.models.weights import (
    SUFFIXES,
    FilePart,
    build_seeded,
    fetch_pretrained,
    is_random,
    load_state,
    read_part,
    read_state,
    split_part,
    weights_file,
)

_LOG = logging.getLogger(__name__)
PREFIX = "open_clip"
NAMES = {
    "clip-b16": ModelCard(
        "open_clip ViT-B-16 openai (QuickGELU)", 224, 196, 768, 12,
        params=86_192_640, gmac=17.56, licence="mit", hub="timm/vit_base_patch16_clip_224.openai",
    ),
    "clip-b32": ModelCard(
        "open_clip ViT-B-32 openai (QuickGELU)", 224, 49, 768, 12,
        params=87_849_216, gmac=4.41, licence="mit", hub="timm/vit_base_patch32_clip_224.openai",
    ),
    "clip-l14": ModelCard(
        "open_clip ViT-L-14 openai (QuickGELU)", 196, 196, 1024, 24,
        params=303_904_768, gmac=61.52, licence="mit", hub="timm/vit_large_patch14_clip_224.openai",
    ),
}  # fmt: skip
_REGISTERED = {
    "clip-b16": ("ViT-B-16", 224),
    "clip-b32": ("ViT-B-32", 224),
    "clip-l14": ("ViT-L-14", 196),
}
_TAG = "openai"
_OPTIONS = ("img_size", "grid", "pos", "quick_gelu", "pixels")
_IMAGENET: Any = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class _ModelSource:
    """Hold what a name stands for. `quick`: the activation that it says, None where it says
    none."""

    arch: str  # open_clip's name or schema
    tag: str | None
    quick: bool | None
    default_px: int | None = None
    # of a folder or a file, with model_cfg and perhaps preprocess_cfg
    config: dict[str, Any] | None = None


def load(name: str, options: dict[str, Option], weights: str | None) -> nn.Module:
    """Load the tower that `name` stands for. `weights`: None for the tag or folder that the name
    says, a file, a tag, or random:SEED."""
    source, path = _find(name, options, weights)
    if _is_drawn(weights):
        visual = _build_drawn(name, source, options, weights).visual
    elif path:
        visual, used = _load_file(name, source, options, path)
        weights = used if weights else None
    else:
        visual = _load_tag(name, source, options).visual
    own = partial(_pixel_statistics, name, source, visual)
    imagenet = options.get("pixels") == "imagenet"
    mean, std = _IMAGENET if imagenet else transformers_pixels.choose(path, name, own)
    return wrap(visual, name, options, source.default_px, weights or REGISTERED, mean, std)


def load_text(name: str, options: dict[str, Option], weights: str | None) -> TextTower:
    """Load the text tower that belongs to the tower of `load`, by the same names and weights."""
    source, path = _find(name, options, weights)
    if not open_clip_config.has_text(source.config):
        raise UserError(
            f"teacher {name!r}: its config names a text tower or a tokenizer to be fetched, and "
            "none is; a config with a text tower of open_clip's own is needed"
        )
    if _is_drawn(weights):
        model = _build_drawn(name, source, options, weights)
    elif path and transformers_folder.is_folder(path):
        raise UserError(
            f"teacher {name!r}: the text tower is not read from a folder of transformers' "
            f"({path!r}); give the weights in open_clip's layout"
        )
    elif path:
        quick, _ = _file_activation(name, source, options, path)
        model = build_seeded(lambda: _build_model(source, quick), None)
        open_clip_text.load_text_state(model, read_state(path, name), path, name)
    else:
        model = _load_tag(name, source, options)
    return open_clip_text.wrap(model, lambda: _tokenizer(source, name), name)


def _find(
    name: str, options: dict[str, Option], weights: str | None
) -> tuple[_ModelSource, str | None]:
    """Return what a name stands for, and the file of weights where there is one."""
    check_options(name, options, _OPTIONS)
    if (pixels := options.get("pixels", "own")) not in ("own", "imagenet"):
        raise UsageError(
            f"teacher {name!r}: pixels={pixels}; allowed: own, the tower's own statistics, or "
            "imagenet"
        )
    path = weights_file(weights)
    tag = None if path or _is_drawn(weights) else weights
    source = _resolve_source(name, tag, options)
    if weights is not None and source.arch.startswith("hf-hub:"):
        raise UsageError(
            f"teacher {name!r} takes its weights from the hub, --weights {weights!r} is given; "
            "leave it out"
        )
    return source, path or (None if _is_drawn(weights) else _weights_in_folder(source))


def _is_drawn(weights: str | None) -> bool:
    return bool(weights) and is_random(str(weights))


def _build_drawn(
    name: str, source: _ModelSource, options: dict[str, Option], weights: str | None
) -> Any:
    quick = quick_gelu.resolve_activation(name, options, source.quick, "the architecture")
    return build_seeded(lambda: _build_model(source, quick), weights)


def _resolve_source(name: str, tag: str | None, options: dict[str, Option]) -> _ModelSource:
    """Return the architecture and tag of a name, a tag of --weights among them, and refuse an
    activation that would be silently wrong."""
    if name in _REGISTERED:
        arch, px = _REGISTERED[name]
        if arch == "ViT-L-14" and (options.get("img_size") == 336 or options.get("grid") == 24):
            arch, px = "ViT-L-14-336", 336
        tag = tag or _TAG
        return _ModelSource(arch, tag, quick_gelu.from_tag(name, arch, tag).quick, px)
    arch = name.removeprefix(f"{PREFIX}:")
    if arch.startswith(("local-dir:", "hf-hub:")) or arch.endswith(".json"):
        return _source_from_config(name, arch, tag)
    arch, _, own_tag = arch.partition("/")
    _check_arch(name, arch)
    if tag and own_tag and tag != own_tag:
        raise UsageError(
            f"teacher {name!r} names a tag, and --weights {tag!r} another one; give one of them"
        )
    tag = own_tag or tag
    says = quick_gelu.from_architecture(arch)
    if tag is None:
        return _ModelSource(arch, None, says)
    quick, config = quick_gelu.from_tag(name, arch, tag).quick, quick_gelu.model_config(arch)
    # such towers have an activation of their own
    by_timm = "timm_model_name" in config["vision_cfg"]
    if quick != config.get("quick_gelu", False) and not by_timm:
        other = f"{arch}-quickgelu" if quick else arch.removesuffix("-quickgelu")
        raise UsageError(
            f"teacher {name!r}: the weights {tag!r} were trained with "
            f"{quick_gelu.activation_name(quick)}, {arch} runs "
            f"{quick_gelu.activation_name(not quick)} and would be silently wrong; give "
            f"{PREFIX}:{other}/{tag}"
        )
    return _ModelSource(arch, tag, quick)


def _source_from_config(name: str, arch: str, tag: str | None) -> _ModelSource:
    """Return the source of a folder, a hub repository or a config file, whose own config says the
    activation."""
    if tag is not None:
        raise UsageError(
            f"teacher {name!r} has no tags, {tag!r} is given; a file or random:SEED is allowed"
        )
    if arch.startswith("hf-hub:"):
        return _ModelSource(arch, None, None)
    path = (
        Path(arch)
        if arch.endswith(".json")
        else Path(arch.removeprefix("local-dir:")) / open_clip_config.NAME
    )
    config = open_clip_config.read_config(path, name)
    return _ModelSource(
        arch, None, bool(config["model_cfg"].get("quick_gelu", False)), config=config
    )


def _check_arch(name: str, arch: str) -> None:
    import open_clip

    if arch not in open_clip.list_models():
        close = near(arch, open_clip.list_models()).partition("known:")[0]
        raise UsageError(
            f"teacher {name!r}: unknown open_clip architecture {arch!r}: "
            f"{close}open_clip.list_models() lists all; or local-dir:FOLDER, hf-hub:ORG/NAME, "
            "CONFIG.json"
        )


def _load_tag(name: str, source: _ModelSource, options: dict[str, Option]) -> Any:
    """Load the network of a tag or of a hub's repository by open_clip's own reader."""
    import open_clip

    if source.tag is None and not source.arch.startswith("hf-hub:"):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(source.arch))
        raise UsageError(
            f"teacher {name!r} has no weights yet: give {name}/TAG with one of {known or 'none'}, "
            "or --weights FILE"
        )
    if source.tag is not None:
        quick = quick_gelu.resolve_activation(name, options, source.quick, "the tag")
        return fetch_pretrained(
            lambda: _build_model(source, quick, pretrained=True), name, source.tag
        )
    model = fetch_pretrained(
        lambda: _build_model(source, False, pretrained=True), name, source.arch
    )
    found = quick_gelu.uses_quick_gelu(model.visual)
    quick_gelu.resolve_activation(name, options, found, "the hub's config")
    return model


def _load_file(
    name: str, source: _ModelSource, options: dict[str, Option], path: str
) -> tuple[Any, str]:
    """Load a file's picture tower, at the grid of the file's own positions, and return what names
    its weights."""
    quick, note = _file_activation(name, source, options, path)
    if note:
        _LOG.warning(note)
    model: Any = build_seeded(lambda: _build_model(source, quick), None)
    visual = model.visual
    state, weights = _read(visual, path, name)
    own = {
        key.removeprefix("visual."): v for key, v in state.items() if key.startswith("visual.")
    } or state
    there = own.get("positional_embedding")
    if there is not None and hasattr(visual, "positional_embedding") and there.ndim == 2:
        square = position_embedding.grid_side(there.shape[0], (1,))
        # the file's own grid first; it is resized afterwards, in the way that was asked for
        if square is not None:
            set_positions(visual, there.float(), square[0])
    load_state(visual, own, path, name)
    return visual, weights


def _read(visual: Any, path: str, name: str) -> FilePart:
    """Read a file's tensors, or those of a transformers' folder whose config fits the tower; a
    CLIPVisionModel has no projection, and the tower then has none."""
    if not transformers_folder.is_folder(path):
        return read_part(path, name)
    folder = transformers_folder.read_config(path, name, clip=True)
    own = architecture_of(visual, name)
    state = transformers_folder.read_state(folder, name)
    eps = transformers_folder.check(folder, own, state.get("positional_embedding"), name)
    transformers_folder.set_eps(visual, eps)
    if "proj" not in state:
        visual.proj = None
    return FilePart(state, path)


def _file_activation(
    name: str, source: _ModelSource, options: dict[str, Option], path: str
) -> tuple[bool, str]:
    """Return whether QuickGELU runs, and a note. "clip-b16" means OpenAI's, but a file given with
    it may be anyone's: what it says itself counts first."""
    ours = name in _REGISTERED
    by_name, fallback = (None, source.quick) if ours else (source.quick, None)
    return quick_gelu.from_file(name, by_name, options, split_part(path)[0], fallback)


def _weights_in_folder(source: _ModelSource) -> str | None:
    """Return the weights in a folder given as local-dir:, safetensors first."""
    if not source.arch.startswith("local-dir:"):
        return None
    folder = Path(source.arch.removeprefix("local-dir:"))
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    files.sort(key=lambda path: (SUFFIXES.index(path.suffix), "open_clip" not in path.name))
    if not files:
        raise UserError(
            f"folder {str(folder)!r} holds no weights; a file that ends in {', '.join(SUFFIXES)} "
            "is needed"
        )
    return str(files[0])


def _build_model(source: _ModelSource, quick: bool, *, pretrained: bool = False) -> Any:
    """Build open_clip's network; its own reader is used for tags and hubs only."""
    with _schema(source) as arch:
        return _create_model(arch, source.tag if pretrained else None, quick, pretrained)


def _tokenizer(source: _ModelSource, name: str) -> Any:
    import open_clip

    with _schema(source) as arch:  # one of the hub's is fetched as weights are
        return fetch_pretrained(lambda: open_clip.get_tokenizer(arch), name, "tokenizer")


@contextlib.contextmanager
def _schema(source: _ModelSource) -> Iterator[str]:
    """Give the name by which open_clip finds a network: for a config that it does not ship, a
    folder that holds it meanwhile."""
    if not source.config:
        yield source.arch
        return
    with tempfile.TemporaryDirectory() as folder:
        about = json.dumps({"model_cfg": source.config["model_cfg"]})
        Path(folder, open_clip_config.NAME).write_text(about)
        yield f"local-dir:{folder}"


def _create_model(arch: str, tag: str | None, quick: bool, pretrained: bool) -> Any:
    import open_clip

    before = logging.root.manager.disable
    # open_clip warns that nothing was loaded, as was asked for
    logging.disable(max(before, logging.WARNING))
    wanted = {
        "load_weights": pretrained,
        "require_pretrained": pretrained,
        "pretrained_text": False,
    }
    try:
        return open_clip.create_model(arch, tag, force_quick_gelu=quick, **wanted)
    except (
        Exception
    ) as error:  # a config of somebody's own, a text tower whose package is not installed, ...
        if pretrained:
            raise
        raise UserError(
            f"open_clip cannot build {arch!r}: {error}; give another architecture or config"
        ) from error
    finally:
        logging.disable(before)


def _pixel_statistics(name: str, source: _ModelSource, visual: Any) -> tuple[Any, Any]:
    """Return pixel mean and std: of the tag, of the config, or the ones that all tags of the
    architecture share."""
    import open_clip

    if source.tag is not None:
        facts = quick_gelu.from_tag(name, source.arch, source.tag)
        return facts.mean, facts.std
    if source.config is not None or source.arch.startswith("hf-hub:"):
        config = source.config
        about = config.get("preprocess_cfg", {}) if config else visual.preprocess_cfg
        return about.get("mean"), about.get("std")
    tags = open_clip.list_pretrained_tags_by_model(source.arch)
    shared = {
        (f.mean, f.std) for f in (quick_gelu.from_tag(name, source.arch, tag) for tag in tags)
    }
    if len(shared) > 1:
        raise UsageError(
            f"teacher {name!r}: its tags differ in pixel mean and std, so a file needs one: give "
            f"{name}/TAG, TAG one of {', '.join(tags)}"
        )
    return shared.pop() if shared else (None, None)
