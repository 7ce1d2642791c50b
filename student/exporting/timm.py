"""timm: a folder that `timm.create_model("local-dir:DIR", pretrained=True)` loads strictly, or the
hub as `hf-hub:`.

The network is the run's own class of timm with its own parameters: LayerScale, tables of relative
positions and biases stay as they are. Nothing is folded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models.spec import parse_options
from student.features.comparison import Comparison
from student.features.exported import MODULE, TIMM_FAMILIES, Exported
from student.models import beit, vit

LIBRARY = "timm"
FAMILIES = TIMM_FAMILIES
COMPARISON = Comparison("timm")
CROP_PCT = 0.875
_GELU = {"act_layer": "gelu"}  # of every encoder of family mae that names no other


def check(given: Exported) -> None:
    """Refuse a network that timm would build with other norms than the run's."""
    name, arguments = architecture(given)
    try:
        with torch.device("meta"):
            found = timm.create_model(name, **arguments)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"timm cannot build {name!r}: {str(error)[:200]}; {MODULE}") from error
    own, theirs = _eps(given.net), _eps(found)
    if own != theirs:
        raise UserError(
            f"timm's config cannot express the eps of the norms: {sorted(own)} here, "
            f"{sorted(theirs)} in timm's {name}; {MODULE}"
        )


def _eps(net: nn.Module) -> set[float]:
    return {float(part.eps) for part in net.modules() if hasattr(part, "eps")}  # type: ignore[arg-type]


def architecture(given: Exported) -> tuple[str, dict[str, Any]]:
    """Return timm's name of the network, and the arguments that build it again, as plain JSON."""
    encoder, settings = str(given.settings["encoder"]), given.settings
    pool = "avg" if given.classes and settings["pool"] == "mean" else "token"
    sizes = {
        "img_size": given.img_size,
        "patch_size": int(settings["patch_size"]),
        "num_classes": given.classes,
        "global_pool": pool,
    }
    if given.family == "mae":
        name, options = vit.parse_encoder(encoder)
        options = {**_GELU, **options}
    elif given.family in beit.FAMILIES:
        name, options = "beit_base_patch16_224", _beit(encoder, given)
    else:
        name, _, tail = encoder.partition(",")
        options = dict(parse_options(tail)) if tail else {}
    return name.partition(".")[0], {**options, **sizes, **_norm_place(given, pool)}


def _beit(encoder: str, given: Exported) -> dict[str, Any]:
    own = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    tables = own if given.settings.get("rel_pos") is True else {}
    family = beit.FAMILIES[given.family]
    return {**beit.parse_encoder(encoder), "init_values": 0.1, **family, **tables}


def _norm_place(given: Exported, pool: str) -> dict[str, bool]:
    """Say whether the last norm is behind the pool, where a classifier's class has a word for it:
    some architectures fix it otherwise."""
    known = inspect.signature(type(given.net).__init__).parameters if given.classes else {}
    return {key: pool == "avg" for key in ("fc_norm", "use_fc_norm") if key in known}


def write(given: Exported, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    name, arguments = architecture(given)
    mean, std = given.pixels
    pretrained = {
        "input_size": [3, given.img_size, given.img_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": CROP_PCT,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": given.classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": name,
        "num_classes": given.classes,
        "num_features": int(given.net.num_features),  # type: ignore[arg-type]
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {key: value.contiguous().clone() for key, value in given.net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reload(folder: Path, classes: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Load the folder by timm, strictly."""
    net: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
    return lambda images: outputs(net, images, classes)


def outputs(net: Any, images: Tensor, classes: int) -> dict[str, Tensor]:
    """Return tokens and logits of one of timm's networks."""
    tokens = net.forward_features(images)
    return {"tokens": tokens, **({"logits": net.forward_head(tokens)} if classes else {})}


def usage(given: Exported) -> str:
    """Return Python that loads the folder."""
    call = "forward_features(images)  # (B, 1 + P, D), after the final norm"
    return 'import timm\n\nmodel = timm.create_model("local-dir:DIR", pretrained=True).eval()\n' + (
        "logits = model(images)  # (B, C)" if given.classes else f"tokens = model.{call}"
    )
