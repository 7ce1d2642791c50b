"""KD: predict a CLIP's output at the visible patches only; MILAN without its decoder.

Paper:    Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation" (arXiv
          2208.06049), Table 10
Command:  student train --recipe kd --cache CACHE --images SRC --batch-size 512
          (8 processes: 4,096)
Cost:     ViT-B, 49 of 196 patches: 13.0 GMAC a picture forward and backward; the teacher's 17.6 are
          in the cache
Expected: ImageNet-1k, ViT-B from CLIP-B/16, 400 epochs: 84.0 fine-tuned, beside MILAN's 85.4
          (published, not yet ours)
Code:     none was released

Reference global batch: 4,096, so blr 1.5e-4 is lr 2.4e-3.

What differs from the paper's text, which leaves these open: one Linear maps the normed tokens to
the target's width; CLS is among the tokens, as it is in MILAN's loss; the squared distance of two
vectors of length 1 is 2 - 2 cos, meant over pictures and tokens. cls_token is not decayed
(decay_tokens=true decays it).

Shapes: B batch, V visible, P patches, E target width.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from student import masking
from student.config import CHECKED, Mask, NotNegative, OutputConfig, Positive
from student.models import losses, vit
from student.recipes import TargetSpec

SERVED_BY = {  # by default; `featcache info` and `extract --for` read this
    "teacher": "clip-b16",
    "fields": ("features", "attention"),
    "levels": "last:1",
    "mask_ratio": 0.75,
    "derive": "z",
}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Config(OutputConfig):
    """Hold the settings of MILAN."""

    mask: Mask = "attentive"
    epochs: Positive = 400
    warmup_epochs: NotNegative = 40


def needs(config: Config) -> TargetSpec:
    """Say what is read: the teacher's last level, and what the mask is drawn from."""
    return TargetSpec(
        teacher=config.teacher,
        levels=(config.teacher_depth,),
        fields=("features", *masking.fields(config.mask)),
        patches=config.patches,
        visible_only=True,
        derive=config.target,
    )


class Model(nn.Module):
    """Combine the encoder and one Linear; only the encoder is taken home."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = vit.build(
            config.encoder,
            img_size=config.img_size,
            patch_size=config.patch_size,
            drop_path=config.drop_path,
        )
        self.head = nn.Linear(self.encoder.embed_dim, config.target_width)
        vit.init_linear_and_norm(self.head)
        self.target = config.target

    def no_weight_decay(self) -> set[str]:
        """Return none beyond the rule for 1-D parameters and tokens."""
        return set()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss, and that of CLS and of visible patches, from images (B,3,H,W), targets
        (B,1+P,E), ids_keep (B,V)."""
        pred, target = self._pair(batch)
        distance = 2 * losses.cosine_distance(pred, target)  # (B,1+V)
        parts = {"cls": distance[:, 0].mean().detach(), "visible": distance[:, 1:].mean().detach()}
        return {"loss": distance.mean(), **parts}

    def predictions(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the prediction and the target, (B,1+V,E) both, at CLS and the visible patches."""
        return {f"cosine_{self.target}": self._pair(batch)}

    def _pair(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids_keep = batch["ids_keep"]
        pred = self.head(self.encoder.norm(vit.encode(self.encoder, batch["images"], ids_keep)[-1]))
        return pred, vit.gather_tokens(batch["targets"], vit.prepend_cls_id(ids_keep))
