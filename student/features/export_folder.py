"""An exported model is written to a folder beside its place, read back by the library it is for,
compared with the run's own network, and only then renamed into place.

B pictures, S pixels a side.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError, counted
from featcache.pictures.decode import decode
from featcache.pictures.open_source import open_source
from featcache.pictures.source import PictureError
from featcache.storage import manifest
from featcache.storage.new_folder import check_new, new_folder
from featcache.views.render import render_centre
from student.features import exported, model_card
from student.features.comparison import compare
from student.features.exported import MODULE, Exported

PICTURES = 4
CROP_PCT = 0.875


def export(given: Exported, form: ModuleType, out: Path, images: str | None) -> dict[str, Any]:
    """Write a run's encoder to the folder `out` in a format of `student.exporting`, compare it on
    pictures of `images` (None: on made ones), and return what was done. Raises UserError for what
    the format cannot express, a folder in use, and outputs that differ."""
    check_new(out)
    check_family(given, form)
    form.check(given)
    pixels, told = read_pixels(given, images) if images else made_pixels(given.img_size)
    with new_folder(out) as folder:
        form.write(given, folder)
        try:
            found = form.reload(folder, given.classes)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
            raise UserError(
                f"{form.COMPARISON.reader} does not read back what was written for it ({why}); "
                f"nothing is left at {str(out)!r}; take another --format"
            ) from error
        worst = compare(given, form.COMPARISON, found, pixels)
        checked = _checked(given, form, told, worst)
        (folder / "README.md").write_text(card(given, form, out.absolute().name, checked))
    return {
        "out": str(out), "step": given.step, "ema": given.ema, "compared_on": told,
        "pictures": len(pixels), "difference": worst,
    }  # fmt: skip


def check_family(given: Exported, form: ModuleType) -> None:
    """Raise UserError for a family of encoders that a format has not."""
    if given.family not in form.FAMILIES:
        raise UserError(
            f"cannot export run {str(given.run)!r}: {form.LIBRARY} has no encoders of family "
            f"{repr(given.family)[:80]}, allowed: {', '.join(form.FAMILIES)}; take --format onnx "
            f"where it is 'conv_vit', or {MODULE}"
        )


def _checked(given: Exported, form: ModuleType, told: str, worst: float) -> str:
    how = form.COMPARISON
    logits = " and logits" if given.classes and how.logits else ""
    return (
        f"Read back by {how.reader} and compared with the run's network on {told}: {how.tokens}"
        f"{logits} differ by at most {worst:.1e} ({how.numbers})."
    )


def card(given: Exported, form: ModuleType, name: str, checked: str) -> str:
    """Return the text of the model card."""
    facts, scores = exported.facts(given), exported.scores(given)
    command = exported.command(given)
    return model_card.build(name, form.LIBRARY, facts, scores, command, form.usage(given), checked)


# --- pictures -------------------------------------------------------------------------------------


def read_pixels(given: Exported, images: str) -> tuple[Tensor, str]:
    """Return centre crops (B,3,S,S) uint8 of the first pictures of a source that can be decoded,
    and a text that says whether it is the list that the run was trained on."""
    source, crops = open_source(images), list[Tensor]()
    for index in range(len(source)):
        with contextlib.suppress(PictureError):
            crop = render_centre(decode(source.read(index)), given.img_size, CROP_PCT, "bicubic")
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
        if len(crops) == PICTURES:
            break
    if not crops:
        raise UserError(f"--images {images!r}: no picture can be decoded; give others")
    data = given.record.get("data")
    digest = data.get("keys_digest") if isinstance(data, dict) else None
    own = "the run's own list" if digest == manifest.keys_digest(source.keys) else "another list"
    return torch.stack(crops), f"{counted(len(crops), 'picture')} of --images ({own})"


def made_pixels(size: int) -> tuple[Tensor, str]:
    """Return a made picture (1,3,S,S) uint8: waves of three colours, each at its own angle."""
    line = torch.arange(size, dtype=torch.float64) / size
    row, col = line.view(-1, 1), line.view(1, -1)
    waves = [torch.sin(9 * row + 4 * col), torch.sin(3 * row - 11 * col), torch.cos(17 * row * col)]
    pixels = (127.5 + 127.5 * torch.stack(waves)).to(torch.uint8)
    return pixels.unsqueeze(0), "a made picture (no --images given)"
