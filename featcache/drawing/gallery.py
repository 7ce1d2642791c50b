"""A gallery is a folder with a page and its pictures: what a cache stores, drawn on a sample of its
rows.

    DIR/index.html   012.png   012-v0-view.png   012-v0-attention.png   012-v0-level12.png ...

File names are made of numbers and our own words; keys stand in the page alone. A row that is
damaged is told where it would be seen, and the others are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from featcache.drawing import gallery_text as words
from featcache.drawing import page as pages
from featcache.drawing import pca, pictures
from featcache.drawing.level_colours import fit_levels
from featcache.drawing.panels import Panel, target_panels, view_panel
from featcache.drawing.stored_view import TeacherReader, read_drawn
from featcache.drawing.view_pixels import Pictures, ViewPixels, small_picture
from featcache.errors import UserError, counted
from featcache.reading.cache import Cache
from featcache.storage.new_folder import new_folder

Progress = Callable[[int, int], None]  # rows done, of how many


@dataclass
class Gallery:
    """Draws rows of a cache into a folder, and keeps what went wrong, a line each."""

    cache: Cache
    images: Pictures
    folder: Path
    views: int
    readers: list[TeacherReader]
    bases: dict[str, dict[int, pca.Basis]]
    problems: list[str] = field(default_factory=list)
    files: int = 0
    size_bytes: int = 0

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.files, self.size_bytes = self.files + 1, self.size_bytes + len(data)

    def tell(self, problem: str) -> str:
        """Note a problem, and return it as the page says it."""
        self.problems.append(problem)
        return words.warning(problem)


def draw(
    cache: Cache,
    rows: Sequence[int],
    out: Path,
    *,
    images: str | None = None,
    views: int = 4,
    progress: Progress = lambda done, of: None,
) -> dict[str, Any]:
    """Draw rows of a cache to the new folder `out`, and return what was written and what could not
    be read. `images`: the pictures, else the pixels are those that the cache stores."""
    source = Pictures(cache, images)
    _check_pictures(cache, source, rows)
    views = min(views, cache.views)
    readers = [TeacherReader(cache, teacher) for teacher in cache.teachers]
    bases = {
        reader.teacher: fit_levels(
            reader, [(row, view) for row in rows for view in range(min(views, reader.views))]
        )
        for reader in readers
    }
    with new_folder(out) as folder:
        gallery = Gallery(cache, source, folder, views, readers, bases)
        sections = []
        for i, row in enumerate(rows):
            sections.append(_row(gallery, i, row))
            progress(i + 1, len(rows))
        head = words.head(cache, len(rows), views, bases, source, len(gallery.problems))
        body = "\n".join([head, *sections])
        page = pages.page(words.title(cache), body, style=words.STYLE)
        gallery.write("index.html", page.encode())
    return {
        "out": str(out),
        "pictures": len(rows),
        "views": views,
        "files": gallery.files,
        "bytes": gallery.size_bytes,
        "absent_shards": len(cache.absent),
        "problems": gallery.problems,
    }


def _check_pictures(cache: Cache, source: Pictures, rows: Sequence[int]) -> None:
    """Raise UserError where pictures are given and none of the rows is among them."""
    if source.source is None or not rows:
        return
    keys = [cache.keys[row] for row in rows]
    if not any(key in source for key in keys):
        raise UserError(
            f"--images {source.source.spec!r}: none of the {counted(len(keys), 'row')} "
            "to draw is there, the "
            f"first is {keys[0]!r}; give the pictures of the extraction, or leave --images out"
        )


def _row(gallery: Gallery, i: int, row: int) -> str:
    """Draw one row: its picture with the boxes of its views, then view after view."""
    key, notes, picture = gallery.cache.keys[row], [], None
    try:
        picture = gallery.images.decode(key)
    except UserError as error:
        notes.append(gallery.tell(str(error)))
    drawn: dict[int, dict[str, Any]] = {}
    for view in range(gallery.views):
        try:
            drawn[view] = read_drawn(gallery.cache, row, view)
        except UserError as error:
            notes.append(gallery.tell(str(error)))
    if drawn:
        source = _source(gallery, i, picture, drawn)
        parts = [_view(gallery, i, row, view, picture, about) for view, about in drawn.items()]
        notes.append(words.beside(source, parts))
    return words.row_section(gallery.cache, i, row, key, "\n".join(notes))


def _source(gallery: Gallery, i: int, picture: Any, drawn: dict[int, dict[str, Any]]) -> str:
    """Draw the source picture, or an empty one of its size, with the boxes of the views."""
    first = next(iter(drawn.values()))
    height, width = map(int, first["source_size"])
    note = ""
    if picture is not None and (picture.height, picture.width) != (height, width):
        note = gallery.tell(
            f"the picture at hand has {picture.height} x {picture.width} pixels, the extraction's "
            f"{height} x {width}: another picture under this key"
        )
        picture = None
    pixels, scale = small_picture(picture, height, width)
    frames = [about["crop"] * scale for about in drawn.values()]
    data = pictures.png(pictures.boxes(pixels, frames, [str(view) for view in drawn]))
    name = f"{i:03d}.png"
    gallery.write(name, data)
    is_drawn = isinstance(picture, Image.Image)
    return note + pages.figures([words.source_figure(name, data, is_drawn, height, width)])


def _view(
    gallery: Gallery, i: int, row: int, view: int, picture: Any, about: dict[str, Any]
) -> str:
    """Draw one view and what each teacher says of it."""
    notes = []
    try:
        shown = gallery.images.view(row, view, picture, about)
    except UserError as error:
        notes.append(gallery.tell(str(error)))
        shown = gallery.images.empty()
    if shown.problem:
        notes.append(gallery.tell(shown.problem))
    stem = f"{i:03d}-v{view}"
    figures = [_figure(gallery, stem, view_panel(shown))]
    groups = []
    for number, reader in enumerate(gallery.readers):
        if view >= reader.views:
            continue
        panels, problems = _teacher(gallery, reader, row, view, shown)
        notes += [gallery.tell(problem) for problem in problems]
        drawn = [_figure(gallery, f"{stem}-t{number}" if number else stem, each) for each in panels]
        if number:
            groups.append(words.teacher_group(reader.teacher, drawn))
        else:
            figures += drawn
    return words.view_part(view, about, notes, figures, groups)


def _teacher(
    gallery: Gallery, reader: TeacherReader, row: int, view: int, shown: ViewPixels
) -> tuple[list[Panel], Sequence[str]]:
    stored = reader.read(row, view)
    panels = list(target_panels(shown.pixels, stored, gallery.bases[reader.teacher]))
    return panels, stored.problems


def _figure(gallery: Gallery, stem: str, panel: Panel) -> str:
    data = pictures.png(panel.pixels)
    name = f"{stem}-{panel.name}.png"
    gallery.write(name, data)
    return pages.picture(name, pictures.opened(data), panel.title, panel.title, link=True)
