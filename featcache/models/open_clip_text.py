"""The text tower of an open_clip network embeds class names, for a teacher whose picture tower is
read elsewhere.

A file of weights must hold both towers: the text space is that of one training.

C classes, E width of the space that pictures and texts share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featcache.errors import UserError
from featcache.models.weights import load_state

# no part of the tower: sizes that OpenAI's archives hold, and the scale and bias of the loss
_ASIDE = (
    "input_resolution", "context_length", "vocab_size", "logit_scale", "logit_bias",
)  # fmt: skip


class TextTower:
    """Holds a text tower with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.vocabulary = next(
            (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)), 0
        )

    def to(self, device: str) -> TextTower:
        self.model.to(device)
        return self

    def embed_class(self, texts: Sequence[str], device: str = "cpu") -> Tensor:
        """Return the embedding (E,) of a class, of length 1: the mean of those of its texts, each
        of length 1. It is open_clip's own function."""
        from open_clip import build_zero_shot_classifier

        templates = [lambda _, text=text: text for text in texts]
        return build_zero_shot_classifier(
            self.model, self._tokens, [""], templates, None, device
        )[:, 0].float()  # fmt: skip

    def _tokens(self, texts: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(texts)
        if self.vocabulary and int(ids.max()) >= self.vocabulary:
            raise UserError(
                f"the tokenizer of {self.name!r} gives token {int(ids.max())}, its text tower "
                f"knows {self.vocabulary}: the config is of another tokenizer; give its own"
            )
        return ids


def wrap(model: Any, make_tokenizer: Any, name: str) -> TextTower:
    """Return the text tower of a network whose embedding of a picture is that of [CLS]; UserError
    for another. The picture tower is left behind."""
    visual = model.visual
    if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "") != "tok":
        raise UserError(
            f"the texts of {name!r} stand beside pictures that are pooled, not beside [CLS], which "
            "a student learns; a CLIP with a class token is needed, such as clip-b16"
        )
    del model.visual
    return TextTower(model, make_tokenizer(), name)


def load_text_state(model: Any, state: Mapping[str, Tensor], path: str, name: str) -> None:
    """Load the weights of all but the picture tower. UserError for a file that has no others."""
    whole = any(key.startswith("visual.") for key in state)
    own = {key: value for key, value in state.items() if _is_text(key)}
    if not whole or not own:
        raise UserError(
            f"weights {path!r} hold the picture tower of {name!r} only; classes are named in its "
            "text space: give a file of the whole CLIP"
        )
    text = nn.Module()
    for key, part in model.named_children():
        if key != "visual":
            text.add_module(key, part)
    for key, parameter in model.named_parameters(recurse=False):
        if _is_text(key):
            text.register_parameter(key, parameter)
    with torch.no_grad():
        load_state(text, own, path, f"the text tower of {name}")


def _is_text(key: str) -> bool:
    return not key.startswith("visual.") and key not in _ASIDE
