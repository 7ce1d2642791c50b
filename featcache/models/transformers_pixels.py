"""The pixels that a transformers' folder was trained on are what its image processor makes of them:
the teacher's pixels are normalised in the same way.

    pixels 0 to 255  ->  x * rescale_factor  ->  (x - image_mean) / image_std

`processor_config.json` has it under `image_processor`, `preprocessor_config.json` at its top; the
former comes first, as in transformers. Sizes and crops are the view's own business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, UserError
from featcache.models import transformers_folder
from featcache.runtime import strict_json

_LOG = logging.getLogger(__name__)
_NESTED, _PLAIN = "processor_config.json", "preprocessor_config.json"
_CLOSE = 1e-6  # of numbers that were written with another precision
Statistics = tuple[Sequence[float] | None, Sequence[float] | None]  # mean, std; None: unknown


def choose(path: str | None, name: str, own: Callable[[], Statistics]) -> Statistics:
    """Return mean and std of the pixels, in shares of 255, for teacher `name` with the weights in
    `path`: those of a transformers' folder that says them, else the teacher's own. A note tells
    where they are not the teacher's own, and where a folder does not say them."""
    if path is None or not transformers_folder.is_folder(path):
        return own()
    found = read(Path(path), name)
    if found is None:
        mean, std = own()
        _LOG.warning(
            f"weights {path!r} have no {_PLAIN}: pixels are normalised as teacher {name!r} does it "
            f"by itself, by {_told(mean, std)}"
        )
        return mean, std
    try:
        mean, std = own()
    except UsageError:  # several, of which the folder chooses one
        mean, std = None, None
    if mean is not None and std is not None and not _same((mean, std), found):
        _LOG.warning(
            f"pixels are normalised by {_told(*found)}, as the image processor of weights {path!r} "
            f"says; teacher {name!r} by itself has {_told(mean, std)}"
        )
    return found


def read(folder: Path, name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Read mean and std (3,), in shares of 255, of a folder's image processor; None where it has
    none. UserError for one that says something else than this arithmetic."""
    for file, key in ((_NESTED, "image_processor"), (_PLAIN, "")):
        if not (folder / file).exists():
            continue
        try:
            whole = strict_json.as_object(
                strict_json.read_file(transformers_folder.own_file(folder, file))
            )
            about: Any = whole.get(key) if key else whole
            if about is None:
                continue
            if not isinstance(about, dict):
                raise ValueError(f"its {key} is no object")
            return _statistics(about)
        except (OSError, ValueError) as error:
            raise UserError(
                f"weights {str(folder)!r} for {name}: {file} cannot be taken: {error}; fix what it "
                "says of pixels, or take it away: the teacher's own mean and std are used then"
            ) from error
    return None


def _statistics(about: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    flags = {"do_rescale": True, "do_normalize": True}
    flags |= {"do_flip_channel_order": False, "rescale_offset": False}
    for key, default in flags.items():
        flags[key] = default if about.get(key) is None else about[key]
        if not isinstance(flags[key], bool):
            raise ValueError(f"its {key} is {str(flags[key])[:80]!r}")
    for key in ("do_flip_channel_order", "rescale_offset"):
        if flags[key]:
            raise ValueError(f"its {key} is true, which is not done here")
    # what the processor makes of 255, the 1 of the pixels here
    white = 255 * _number(about, "rescale_factor", 1 / 255) if flags["do_rescale"] else 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if flags["do_normalize"]:
        mean, std = _triple(about, "image_mean"), _triple(about, "image_std")
    if white <= 0 or min(std) <= 0:
        raise ValueError("its rescale_factor or image_std is not above 0")
    return tuple(each / white for each in mean), tuple(each / white for each in std)


def _number(about: Mapping[str, Any], key: str, default: float) -> float:
    value = about.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e6:
        raise ValueError(f"its {key} is {str(value)[:80]!r}")
    return float(value)


def _triple(about: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = about.get(key)
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"its {key} is {str(value)[:80]!r}, three numbers are needed")
    return tuple(_number({key: each}, key, math.nan) for each in value)


def _same(own: tuple[Sequence[float], Sequence[float]], found: Sequence[Sequence[float]]) -> bool:
    pairs = zip((*own[0], *own[1]), (*found[0], *found[1]), strict=True)
    return all(abs(here - there) <= _CLOSE for here, there in pairs)


def _told(mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    if mean is None or std is None:
        return "CLIP's mean and std"
    texts = [", ".join(f"{value:.4g}" for value in values) for values in (mean, std)]
    return f"mean {texts[0]} and std {texts[1]}"
