"""Draw one picture of a cache's views, attention and masks, and of the losses of runs on it.

    | picture, crop boxes | views 1..V | attention 1..V | mask 1..V |      one row a sample
    | loss over steps     | its parts, where runs have them         |

    python -m pipelines.overview CACHE OUT.png [--images SRC] [--key KEY ...] [--run RUN ...]

Everything is replayed from the cache: the boxes, the mirrored views, the teacher's attention, the
stored mask order.

V views shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, GridSpecFromSubplotSpec
from matplotlib.patches import Rectangle
from PIL import Image

from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.picture_options import with_pictures
from featcache.console.text import echo
from featcache.drawing import pictures
from featcache.drawing.panels import visible
from featcache.errors import UsageError, UserError
from featcache.pictures.decode import decode
from featcache.pictures.source import Source
from featcache.reading.cache import Cache
from featcache.storage import manifest
from featcache.views import pixel_path
from featcache.views.policy import policy_from_dict
from featcache.views.render import render
from student import checkpoint
from student.training import metrics

VIEWS_SHOWN = ROWS_SHOWN = 4  # more would be too small to read
SUFFIXES = (".png", ".pdf")
FIELDS = ("crop", "flip", "jitter", "attention", "mask_order")
PANELS = {
    "loss": "loss",
    "align": "its part: alignment with the teacher",
    "pixel": "its part: hidden pixels",
}
VIEW_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd")
RUN_COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e")


def draw(
    source: Source,
    cache: Cache,
    keys: Sequence[str],
    runs: Mapping[str, Path],
    path: Path,
    *,
    visible_ratio: float = 0.25,
) -> None:
    """Write the picture to `path` (its suffix is the format): samples `keys` above, the curves of
    `runs` below."""
    count = min(cache.views, VIEWS_SHOWN)
    figure = Figure(figsize=(1.5 + 3.6 * count, 1.3 * len(keys) + 4.4))
    grid = GridSpec(
        2, 1, figure, height_ratios=[1.3 * len(keys), 2.9], hspace=0.62 / max(len(keys), 2),
        left=0.04, right=0.985,
        top=1 - 0.72 / figure.get_figheight(), bottom=0.55 / figure.get_figheight(),
    )  # fmt: skip
    figure.text(
        0.04,
        1 - 0.2 / figure.get_figheight(),
        manifest.title(cache.manifest),
        fontsize=9,
        color="0.35",
    )
    _samples(figure, grid, source, cache, keys, count, visible_ratio)
    _curves(figure, grid, {name: metrics.read(run) for name, run in runs.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _samples(
    figure: Figure,
    grid: GridSpec,
    source: Source,
    cache: Cache,
    keys: Sequence[str],
    count: int,
    visible_ratio: float,
) -> None:
    """Draw the upper rows: one sample each, in four groups of columns."""
    widths = [1.15, 0.12, *([1.0] * count), 0.12, *([1.0] * count), 0.12, *([1.0] * count)]
    cells = GridSpecFromSubplotSpec(
        len(keys), len(widths), grid[0], width_ratios=widths, wspace=0.06, hspace=0.1
    )
    starts = [2 + group * (count + 1) for group in range(3)]
    for row, sample in enumerate(samples(source, cache, keys, count)):
        axes = figure.add_subplot(cells[row, 0])
        _show_boxes(axes, sample)
        for view in range(count):
            for start, kind in zip(starts, ("view", "attention", "mask"), strict=True):
                axes = figure.add_subplot(cells[row, start + view])
                _show(
                    axes,
                    sample["views"][view],
                    kind,
                    visible_ratio,
                    VIEW_COLOURS[view % len(VIEW_COLOURS)],
                )
    titles = (
        "views, as teacher and student see them",
        "attention of the teacher's [CLS]",
        f"mask: the {visible_ratio:.0%} that the student sees",
    )
    spans = [cells[0, 0], *(cells[0, start : start + count] for start in starts)]
    for span, title in zip(spans, ("crop boxes", *titles), strict=True):
        axes = figure.add_subplot(span, frameon=False, xticks=[], yticks=[], zorder=-1)
        axes.set_title(title, fontsize=12, pad=8)


def samples(source: Source, cache: Cache, keys: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return for each key its picture and, for each of `count` views, the pixels and the stored
    arrays."""
    rows = cache.keys.find(list(keys))
    number = {key: i for i, key in enumerate(source.keys)}
    missing = [key for key, row in zip(keys, rows, strict=True) if row < 0 or key not in number]
    if missing:
        raise UserError(
            f"drawing samples: {missing[0]!r} is not in both {source.spec!r} and {cache.path}; "
            "give keys of both"
        )
    policy = policy_from_dict(cache.identity["policy"])
    stored = [cache.read(rows, view=view, fields=FIELDS) for view in range(count)]
    found = []
    for i, key in enumerate(keys):
        picture = decode(source.read(number[key]))
        shown = [{name: array[i] for name, array in arrays.items()} for arrays in stored]
        for view in shown:
            view["pixels"] = render(
                picture, view["crop"], int(view["flip"]), view["jitter"], policy.size, policy.filter
            )
        found.append({"key": key, "picture": picture, "views": shown})
    return found


def _show_boxes(axes: Axes, sample: dict[str, Any]) -> None:
    """Draw the source picture with the coloured boxes of its views."""
    picture: Image.Image = sample["picture"]
    axes.imshow(np.asarray(picture), interpolation="nearest")
    # boxes are drawn a little outside one another, so that equal edges stay visible
    unit = max(picture.size) / 100
    for i, view in enumerate(sample["views"]):
        top, left, height, width = (float(x) for x in view["crop"])
        shift = (i - (len(sample["views"]) - 1) / 2) * unit
        colour = VIEW_COLOURS[i % len(VIEW_COLOURS)]
        corner = (left - 0.5 + shift, top - 0.5 + shift)
        axes.add_patch(
            Rectangle(
                corner, width, height, fill=False, edgecolor=colour, linewidth=1.8, clip_on=False
            )
        )
    _bare(axes)
    axes.set_ylabel(sample["key"][-16:], fontsize=9, labelpad=7)


def _show(axes: Axes, view: dict[str, Any], kind: str, visible_ratio: float, colour: str) -> None:
    """Draw one view in one of its three forms, in a frame of its box's colour."""
    shown: pictures.Pixels = view["pixels"]
    if kind == "attention":
        side = pictures.grid_side(len(view["attention"]))
        shown = pictures.attention_map(shown, view["attention"].reshape(side, side))
    elif kind == "mask":
        shown = pictures.masked(shown, visible(view["mask_order"], visible_ratio))
    axes.imshow(shown, interpolation="nearest")
    _bare(axes)
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=1.8)
    if kind == "view" and view["flip"]:
        box = {"facecolor": "white", "alpha": 0.75, "pad": 1, "edgecolor": "none"}
        axes.text(0.04, 0.05, "mirrored", transform=axes.transAxes, fontsize=7, bbox=box)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])


def _curves(figure: Figure, grid: GridSpec, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draw the lower row: the loss of every run over its steps, and those parts that a run has."""
    trained = {name: found for name, found in rows.items() if found}
    panels = [part for part in PANELS if any(part in found[0] for found in trained.values())]
    if not panels:
        return
    cells = GridSpecFromSubplotSpec(1, len(panels), grid[1], wspace=0.16)
    for i, part in enumerate(panels):
        axes = figure.add_subplot(cells[0, i])
        for (name, found), colour in zip(
            trained.items(), _cycle(RUN_COLOURS, len(trained)), strict=True
        ):
            if part in found[0]:
                _curve(
                    axes,
                    name,
                    colour,
                    [row["step"] for row in found],
                    [float(row[part]) for row in found],
                )
        axes.set_title(PANELS[part], fontsize=12)
        axes.set_xlabel("step", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, frameon=False)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _curve(
    axes: Axes, name: str, colour: str, steps: Sequence[int], values: Sequence[float]
) -> None:
    """Draw the steps, faint, and their running mean over a thirtieth of the run around each."""
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(
        steps,
        running_mean(np.array(values), len(values) // 60),
        color=colour,
        linewidth=2,
        label=name,
    )


def running_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean of every value and up to `width` values on either side of it; of fewer at the
    ends.

    >>> running_mean(np.array([2.0, 4.0, 9.0, 8.0]), 1).tolist()
    [3.0, 5.0, 7.0, 8.5]
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    starts, ends = np.maximum(at - width, 0), np.minimum(at + width + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


@click.command(
    cls=Command,
    epilog="Examples:\n\n  python -m pipelines.overview caches/clip-b16-1a2b3c4d overview.png\n\n"
    "  python -m pipelines.overview CACHE overview.pdf --run runs/mralign-s0 --run runs/mae-s0",
)
@click.argument("cache", type=LocalPath())
@click.argument("out", type=LocalPath())
@with_pictures(
    "images",
    group=HelpGroup.INPUT,
    help="The pictures. [default: where they were at extraction]",
    variable=False,
)
@option(
    "--key",
    "keys",
    group=HelpGroup.INPUT,
    multiple=True,
    metavar="KEY",
    help="Draw this picture; may be given again. [default: the first 4]",
)
@option(
    "--run",
    "runs",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    multiple=True,
    metavar="RUN",
    help="Draw this run's losses; may be given again.",
)
def command(
    cache: Path, out: Path, images: str | None, keys: tuple[str, ...], runs: tuple[Path, ...]
) -> None:
    """Draw samples of CACHE and the losses of runs as the picture OUT, a .png or .pdf."""
    if out.suffix not in SUFFIXES:
        raise UsageError(f"OUT {str(out)!r}: the name ends in {' or '.join(SUFFIXES)}; change it")
    for run in runs:
        checkpoint.read_config(run)  # says so where it is no run
    with Cache(cache) as opened:
        about = opened.manifest
        source = pixel_path.match_decoder(
            pixel_path.open_with_decoder(images or about["provenance"]["source"], "pillow"),
            opened.identity["pixel_path"],
        )
        chosen = keys or [opened.keys[row] for row in range(min(len(opened.keys), ROWS_SHOWN))]
        draw(source, opened, chosen, {str(run): run for run in runs}, out)
    echo(str(out))


def main() -> None:
    entry(command)


if __name__ == "__main__":
    main()
