"""The contracts say what teachers and tokenizers give, and a card lists a registered one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # facts of a teacher are listed without torch
    from torch import Tensor

# provenance.weights when none were asked for: those the teacher's name stands for
REGISTERED = "registered"


Option = int | float | bool | str


@dataclass(frozen=True)
class ModelCard:
    """Hold one line of `featcache teachers`: facts known without building the model."""

    source: str  # library and tag of the registered weights
    input_px: int
    patches: int
    width: int
    depth: int  # 0: a tokenizer
    params: int = 0  # of what runs, its end included, a text tower not
    gmac: float = 0.0  # multiply-accumulates of one picture's forward, 10^9
    licence: str = ""  # of the weights
    hub: str = ""  # their repository on the Hugging Face hub
    file: str = ""  # or their file in torch hub's folder

    @property
    def view_bytes(self) -> int:
        """Return the bytes of a view's last five levels in fp16; of a tokenizer, of its uint16
        ids."""
        return (
            min(5, self.depth) * (self.patches + 1) * self.width * 2
            if self.depth
            else 2 * self.patches
        )


def required_members(contract: type) -> tuple[str, ...]:
    """Return the facts and methods of a contract that a family of one's own must give.

    The name is not among them: the spec gives it.
    """
    facts = [fact for fact in contract.__annotations__ if fact != "name"]
    methods = [part for part in ("__call__", "tail", "state_dict", "to") if hasattr(contract, part)]
    return (*facts, *methods)


class Teacher(Protocol):
    """A frozen network in eval mode gives the levels of its blocks and its attention. B batch, S =
    input_px, P patches, D width.

    A model without a [CLS] token says `first_token = "mean"`: row 0 of its levels is then the mean
    of the patches, and its attention is that of its attention pool's query. One that has neither
    says `has_attention = False` and gives an attention of (B, 0).
    """

    name: str
    weights: str  # what to give to `load` again: a path, a tag, random:SEED or REGISTERED
    input_px: int
    patches: int
    width: int
    depth: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __call__(self, images: Tensor, levels: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Map uint8 images (B, 3, S, S) -> [y_k (B, 1 + P, D) for each 1-based level], attention
        (B, P) float32."""
        ...

    def tail(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the final norm and the projection, as `targets.derived` takes them: gamma (D,),
        beta (D,), eps () of a LayerNorm, and proj (D, E) where there is one."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def to(self, device: str) -> Any: ...


def has_attention(teacher: Teacher) -> bool:
    """Return whether a teacher gives an attention over its patches, as all do that do not say
    otherwise."""
    return bool(getattr(teacher, "has_attention", True))


class Tokenizer(Protocol):
    """A frozen network gives each patch the number of a visual word. B batch, S = input_px, P
    patches.

    Its pixels are rendered from the view's own crop box at `input_px` with `pixel_filter`, whatever
    the policy's filter is; the ids fit uint16.
    """

    name: str
    weights: str
    input_px: int
    patches: int
    vocabulary: int  # ids are 0 to vocabulary - 1
    pixel_filter: str  # a filter of `views.render`

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (B, 3, S, S) -> ids (B, P) int64, patches in raster order."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...
    def to(self, device: str) -> Any: ...
