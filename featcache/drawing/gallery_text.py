"""The words of a gallery: what a cache is, how its pictures are read, and what stands above each of
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcache.drawing import page as pages
from featcache.drawing import pca, pictures
from featcache.drawing.view_pixels import Pictures
from featcache.errors import counted
from featcache.reading.cache import Cache
from featcache.reading.join import stores_pixels
from featcache.storage import manifest, picture_lists
from featcache.views.render import jitter_factors

KEY_LENGTH = 200  # of a key in a heading; its whole text is below it
STYLE = """
.figures > figure { width: 9.5rem; }
.figures > figure.source { width: 20rem; max-width: 100%; }
.figures > figure > a > img, .figures > figure > img { width: 100%; }
h3 .swatch { display: inline-block; width: .9em; height: .9em; margin-right: .4em; }
.row { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 70rem) {
  .row { grid-template-columns: 20rem minmax(0, 1fr); }
  .figures > figure { width: 7.5rem; }
}
.row h3:first-child { margin-top: 0; }
.teacher { margin: .8rem 0 .3rem; font-weight: 600; }
""" + "\n".join(
    f".view-{i} {{ background: rgb{colour}; }}" for i, colour in enumerate(pictures.COLOURS)
)


def title(cache: Cache) -> str:
    """Return the title of the page."""
    return f"Gallery of cache {cache.manifest['id']}: {cache.teachers[0]}"


def warning(text: str) -> str:
    """Return a line that is not to be overlooked."""
    return f'<p class="warning">{pages.escape(text)}</p>'


def head(
    cache: Cache,
    rows: int,
    views: int,
    bases: Mapping[str, Mapping[int, pca.Basis]],
    source: Pictures,
    problems: int,
) -> str:
    """Return what stands above the pictures: warnings, facts, and how to read them."""
    lines = [warning(_random(cache, teacher)) for teacher in _random_teachers(cache)]
    if problems:
        lines.append(
            warning(f"{counted(problems, 'problem')} met while drawing; each is told below")
        )
    if cache.absent:
        lines.append(
            warning(f"{counted(len(cache.absent), 'shard')} absent: {min(cache.absent.values())}")
        )
    lines.append(pages.section("cache", "The cache", pages.table(facts(cache))))
    drawn = (
        "A cache keeps what a frozen network, the teacher, computed on views: cut-outs of pictures "
        "in which a student will see them. Drawn here are "
        f"{counted(rows, 'picture')} of {len(cache)} with {counted(views, 'view')} of "
        f"{cache.views} each. {_pixels(cache, source)}"
    )
    legend = f"<p>{pages.escape(drawn)}</p>\n{_legend(cache, bases)}"
    return "\n".join([*lines, pages.section("legend", "How to read the pictures", legend)])


def _random_teachers(cache: Cache) -> list[str]:
    return [name for name in cache.teachers if manifest.is_random(cache.manifest_of(name))]


def _random(cache: Cache, teacher: str) -> str:
    weights = cache.manifest_of(teacher)["provenance"]["weights"]
    return (
        f"RANDOM WEIGHTS ({weights}): {teacher} was never trained, there is no meaning in its "
        "features and its attention"
    )


def facts(cache: Cache) -> list[tuple[str, str]]:
    """Return what a cache is, as name and value."""
    identity = cache.identity
    found = [("id", str(cache.manifest["id"]))]
    for teacher in cache.teachers:
        found.append(("teacher", _teacher(cache, teacher)))
    return [
        *found,
        ("view policy", _policy(identity["policy"])),
        (
            "rows",
            f"{len(cache)} of {counted(picture_lists.count(identity), 'picture')}, "
            f"{counted(cache.views, 'view')} each, {len(cache.quarantined)} in quarantine",
        ),
        ("shards", f"{len(cache.records)} of {len(cache.manifest['shards'])}, {identity['store']}"),
    ]


def _policy(policy: Mapping[str, Any]) -> str:
    """Say how views are drawn."""
    low, high = policy["scale"]
    narrow, wide = policy["ratio"]
    return (
        f"{policy['size']} x {policy['size']} pixels, {low:g} to {high:g} of the area, width "
        f"{narrow:.3g} to {wide:.3g} of height, filter {policy['filter']}, mirrored with "
        f"probability {policy['flip']:g}, colours changed by up to {policy['jitter']:g}, seed "
        f"{policy['seed']}"
    )


def _teacher(cache: Cache, teacher: str) -> str:
    about = cache.manifest_of(teacher)
    identity = about["identity"]
    side = pictures.grid_side(identity["teacher"]["patches"])
    levels = ", ".join(map(str, cache.levels_of(teacher))) or "none"
    kept = (
        f", the first {counted(identity['keep'], 'patch', 'patches')} of each view"
        if "keep" in identity
        else ""
    )
    return (
        f"{teacher}: {side} x {counted(side, 'patch', 'patches')}, width "
        f"{identity['teacher']['width']}, levels "
        f"{levels}, codec {identity['codec']}, {identity['tokens']} order{kept}, weights "
        f"{about['provenance']['weights']}"
    )


def _pixels(cache: Cache, source: Pictures) -> str:
    """Say where the pixels of the views are from."""
    if stores_pixels(cache):
        own = "The views are the pixels that the cache stores."
    elif source.source is not None:
        own = (
            "The views are cut again from the pictures at hand, and compared with the hash of what "
            "the teacher saw."
        )
    else:
        own = (
            "No pictures were given, so that of each view only the 14 x 14 block means are drawn "
            "that the cache keeps. --images SRC draws the views themselves."
        )
    if source.source is None:
        return f"{own} Boxes stand on an empty picture of the source's size."
    return own


def _legend(cache: Cache, bases: Mapping[str, Mapping[int, pca.Basis]]) -> str:
    """Say what is seen in each kind of picture that this cache has."""
    known = {name.rpartition("/")[2] for name in cache.fields}
    lines = [
        "Boxes: the part of the source picture that each view shows, by the view's number. A "
        "mirrored view is turned left to right after that."
    ]
    if "attention" in known:
        lines.append(
            "Attention: how much the teacher's summary of the view draws on each patch, from black "
            "(none) to yellow (this view's largest). The white line is around the fewest patches "
            "that hold half of it."
        )
    if "mask_order" in known:
        lines.append(
            "Visible: what a student sees when it is shown that share of the patches, the first of "
            "the stored mask order. Grey is hidden."
        )
    if any(bases.values()):
        lines.append(
            "Levels: the features of each patch after that block of the teacher. Their three "
            "strongest directions of variation are red, green and blue, the same ones for all "
            "pictures of a level: like colours are like features. Colours of two levels cannot be "
            "compared. Hatched patches are not stored."
        )
        lines += [_shares(teacher, found) for teacher, found in bases.items() if found]
    if "token_ids" in known:
        lines.append("Token ids: a colour for each word of the tokenizer's vocabulary.")
    return "<ul>\n" + "\n".join(f"<li>{pages.escape(line)}</li>" for line in lines) + "\n</ul>"


def _shares(teacher: str, bases: Mapping[int, pca.Basis]) -> str:
    found = ", ".join(
        f"{100 * basis.shares.sum():.0f} % at level {level}" for level, basis in bases.items()
    )
    return f"Of the variation of {teacher}, those three hold {found}."


def row_section(cache: Cache, i: int, row: int, key: str, body: str) -> str:
    """Return the section of one row. A long key is cut in the heading, and whole below it."""
    shown = key if len(key) <= KEY_LENGTH else f"{key[:KEY_LENGTH]} ..."
    whole = ""
    if shown != key:
        whole = f"<details><summary>whole key</summary><p>{pages.escape(key)}</p></details>\n"
    note = f'<p class="muted">row {row} of {len(cache)}</p>\n'
    return pages.section(f"row-{i}", shown or "(empty key)", whole + note + body)


def beside(source: str, views: Sequence[str]) -> str:
    """Lay the source picture beside its views, or above them where there is no room."""
    return f'<div class="row">\n<div>{source}</div>\n<div>{chr(10).join(views)}</div>\n</div>'


def source_figure(name: str, data: bytes, is_drawn: bool, height: int, width: int) -> str:
    """Return the figure of a source picture with its boxes."""
    what = "source picture" if is_drawn else "empty picture of the source's size"
    caption = f"{what}, {height} x {width} pixels, with the box of each view"
    figure = pages.picture(name, pictures.opened(data), caption, caption, link=True)
    return figure.replace("<figure>", '<figure class="source">', 1)


def view_part(
    view: int,
    about: Mapping[str, Any],
    notes: Sequence[str],
    figures: Sequence[str],
    groups: Sequence[str],
) -> str:
    """Return the part of one view: how it was drawn, what went wrong, its pictures."""
    swatch = f'<span class="swatch view-{view % len(pictures.COLOURS)}"></span>'
    heading = f"<h3>{swatch}View {view}</h3>\n<p class='muted'>{pages.escape(how(about))}</p>"
    return "\n".join([heading, *notes, pages.figures(figures), *groups])


def how(about: Mapping[str, Any]) -> str:
    """Say how a view was drawn.

    >>> how({"crop": (10, 20, 30, 40), "flip": 1, "jitter": (1, 1, 1, 0), "source_size": (60, 80)})
    '30 x 40 of 60 x 80 pixels (25 %), from row 10, column 20; mirrored'
    """
    top, left, height, width = (int(x) for x in about["crop"])
    rows, columns = (int(x) for x in about["source_size"])
    share = 100 * height * width / (rows * columns)
    parts = [
        f"{height} x {width} of {rows} x {columns} pixels ({share:.0f} %), from row {top}, column "
        f"{left}"
    ]
    if int(about["flip"]):
        parts.append("mirrored")
    factors = jitter_factors([float(x) for x in about["jitter"]])
    if any(factor != 1 for factor in factors.values()):
        parts.append(", then ".join(f"{name} x {factor:.2f}" for name, factor in factors.items()))
    return "; ".join(parts)


def teacher_group(teacher: str, figures: Sequence[str]) -> str:
    """Return the pictures of a teacher that was added."""
    return f'<p class="teacher">{pages.escape(teacher)}</p>\n{pages.figures(figures)}'
