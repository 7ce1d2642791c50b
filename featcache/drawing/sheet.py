"""Pictures are laid on one sheet, in lines, each below its title.

S pixels a side of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from featcache.drawing.panels import Panel
from featcache.drawing.pictures import Pixels
from featcache.errors import one_line

GAP, TITLE_PX, FONT_PX = 8, 22, 14
PAPER, INK = (255, 255, 255), (28, 29, 32)


def compose(lines: Sequence[Sequence[Panel]]) -> Pixels:
    """Return the sheet: pictures of one size, a list in each line."""
    size = len(lines[0][0].pixels)
    width = GAP + max(map(len, lines)) * (size + GAP)
    sheet = Image.new("RGB", (width, GAP + len(lines) * (TITLE_PX + size + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for i, line in enumerate(lines):
        for j, panel in enumerate(line):
            left, top = GAP + j * (size + GAP), GAP + i * (TITLE_PX + size + GAP)
            draw.text((left, top), _fitting(panel.title, size, font), fill=INK, font=font)
            sheet.paste(Image.fromarray(panel.pixels), (left, top + TITLE_PX))
    return np.asarray(sheet)


def _fitting(title: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return as much of a title as stands above its picture."""
    title = one_line(title)[:100]
    while font.getlength(title) > width:
        title = title[:-1]
    return title
