"""DALL-E's discrete tokenizer gives the target of CAE (METHODS 4.2): a picture of 112 pixels -> 14
x 14 words of 8192.

The encoder of Ramesh et al. 2021 (arXiv 2102.12092, appendix A), written from its description: a 7
x 7 convolution to 256 channels; four groups of two residual blocks with 256, 512, 1024 and 2048
channels, each of the first three followed by a 2 x 2 max-pool; ReLU and a 1 x 1 convolution to 8192
logits. A block's branch is three 3 x 3 and one 1 x 1 convolution at a quarter of the width, ReLU
before each, and is added with weight 1 / (number of blocks)^2 to the input, which passes a 1 x 1
convolution where the width changes.

Weights: the published `encoder.pkl`, which is a whole pickled module and is read without running
it, or a state dict of it. Pixels in [0, 1] are mapped to 0.8 x + 0.1; there are no mean and std.
CAE renders the 112 pixels with Lanczos from the same crop box as the student's picture.

A smaller one of the same form is told by options, with weights of one's own (pipelines.tokenizer
trains one on digits): `dvae,img_size=64,width=16,vocabulary=64` reads 64 pixels for a grid of 8 x
8.

B batch, C channels, P patches, S input pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from featcache.errors import UsageError
from featcache.models import architecture, weights
from featcache.models.contract import REGISTERED, ModelCard, Option
from featcache.models.spec import check_options

TOKENIZER = True
NAMES = {
    "dvae": ModelCard(
        "DALL-E's encoder: token ids, Lanczos", 112, 196, 8192, 0,
        params=53_786_240, gmac=26.1, licence="modified MIT", file="dall_e_encoder.pkl",
    )
}  # fmt: skip
_URL = "https://cdn.openai.com/dall-e/encoder.pkl"
_GROUPS, _BLOCKS = 4, 2
_SIZES = {"img_size": 112, "width": 256, "vocabulary": 8192}  # options, with the published values
_STEP = {"img_size": 2 ** (_GROUPS - 1), "width": 4, "vocabulary": 2}  # each is a multiple of it
_SUFFIXES = {".w": ".weight", ".b": ".bias"}  # the published names of a convolution's parameters


class Block(nn.Module):
    """Add a bottleneck branch of four convolutions to its input: (B, C_in, H, W) -> (B, C_out, H,
    W)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        narrow = after // 4
        self.gain = 1 / (_GROUPS * _BLOCKS) ** 2
        self.id_path = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.res_path = nn.Sequential()
        for i, (inputs, outputs, kernel) in enumerate(
            [(before, narrow, 3), (narrow, narrow, 3), (narrow, narrow, 3), (narrow, after, 1)], 1
        ):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(
                f"conv_{i}", nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


class Dvae(nn.Module):
    """Map uint8 pictures to token ids; the sizes are the published ones where nothing else is
    said."""

    name = "dvae"
    pixel_filter = "lanczos"

    def __init__(
        self, weights: str, width: int = 256, vocabulary: int = 8192, input_px: int = 112
    ) -> None:
        super().__init__()
        self.weights, self.vocabulary, self.input_px = weights, vocabulary, input_px
        self.patches = (input_px // 2 ** (_GROUPS - 1)) ** 2
        parts: OrderedDict[str, nn.Module] = OrderedDict(input=nn.Conv2d(3, width, 7, padding=3))
        widths = [width, *(width * 2**i for i in range(_GROUPS))]
        for i, (before, after) in enumerate(pairwise(widths), 1):
            parts[f"group_{i}"] = _group(before, after, pool=i < _GROUPS)
        output = OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], vocabulary, 1))
        self.blocks = nn.Sequential(OrderedDict(parts, output=nn.Sequential(output)))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, S, S) -> ids (B, P) int64, patches in raster order."""
        return self.logits(0.8 * (images.float() / 255) + 0.1).argmax(1).flatten(1)

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute the logits (B, vocabulary, S / 8, S / 8) of mapped pixels (B, 3, S, S).

        The last layer is float32 under autocast too, as in the released code: half precision there
        moves the argmax.
        """
        *body, output = self.blocks
        for part in body:
            pixels = part(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            out: Tensor = output(pixels.float())
        return out


def _group(before: int, after: int, *, pool: bool) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, _BLOCKS + 1):
        parts[f"block_{i}"] = Block(before if i == 1 else after, after)
    if pool:
        parts["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(parts)


def load(name: str, options: dict[str, Option], given: str | None) -> Dvae:
    """Load the tokenizer. `given`: None for the published file in torch hub's folder, fetched if
    need be; else a file or random:SEED."""
    sizes = _parse_sizes(name, options)
    architecture.check_memory(lambda: _build(REGISTERED, sizes), f"teacher {name!r}")
    if given is not None and weights.is_random(given):
        drawn = weights.build_seeded(lambda: _build(given, sizes), given)
        assert isinstance(drawn, Dvae)
        return drawn
    path = weights.weights_file(given)
    if given is not None and path is None:
        raise UsageError(
            f"unknown weights {given!r} of {name}: a file or random:SEED is allowed; none has a tag"
        )
    file = path or str(
        weights.fetch_pretrained(lambda: weights.download(_URL, NAMES[name].file), name, _URL)
    )
    with torch.device("meta"):
        encoder = _build(given or REGISTERED, sizes)
    encoder.to_empty(device="cpu")
    used = load_weights(encoder, file, name)
    encoder.weights = used if given else REGISTERED
    return encoder


def _parse_sizes(name: str, options: dict[str, Option]) -> dict[str, int]:
    """Return the published sizes, changed by the options; a size that cannot be built is a
    UsageError."""
    check_options(name, options, _SIZES)
    sizes = dict(_SIZES)
    for key, value in options.items():
        most = 64 * _SIZES[key]
        if type(value) is not int or not 1 <= value <= most or value % _STEP[key]:
            raise UsageError(
                f"teacher {name!r}: {key}={value}; a multiple of {_STEP[key]} is needed, as "
                f"{_SIZES[key]}, up to {most}"
            )
        sizes[key] = value
    return sizes


def _build(given: str, sizes: dict[str, int]) -> Dvae:
    return Dvae(given, sizes["width"], sizes["vocabulary"], sizes["img_size"])


def load_weights(encoder: Dvae, path: str, name: str) -> str:
    """Load a state dict, with the published names or with torch's own, or the published module;
    return what names these weights again."""
    tensors, used = weights.read_part(path, name)
    state = {_torch_name(key): value for key, value in tensors.items()}
    weights.load_state(encoder, state, path, name)
    return used


def _torch_name(key: str) -> str:
    """Map 'blocks.input.w' to 'blocks.input.weight'."""
    for short, long in _SUFFIXES.items():
        if key.endswith(short):
            return key.removesuffix(short) + long
    return key
