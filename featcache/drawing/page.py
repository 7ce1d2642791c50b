"""A page is one HTML text that opens from disk: no script, no network, light and dark, and it can
be read on a telephone and printed.

Texts come from strangers (keys of pictures, names of teachers): `escape` is the one way in.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from PIL import Image

from featcache.drawing.pictures import opened
from featcache.errors import one_line

# nothing is fetched but pictures beside the page, nothing runs, nothing can be sent
POLICY = "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'"

# The colours have names, so that a page's own style and inline SVG follow light and dark too.
STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1d20; --muted: #5b6068; --line: #d5d8dd; --panel: #f5f6f8;
  --accent: #0b5cad; --warning-paper: #fff1d6; --warning-ink: #6b3f00;
  --series-1: #0b62b0; --series-2: #b84a00; --series-3: #16734f; --series-4: #7a3fa8;
  --series-5: #a3195b; --series-6: #56606b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e6e8eb; --muted: #a2a8b0; --line: #393e45; --panel: #1e2125;
    --accent: #7db7f5; --warning-paper: #43320f; --warning-ink: #ffdca0;
    --series-1: #6fb1f2; --series-2: #f49b5f; --series-3: #62c79b; --series-4: #c39ae8;
    --series-5: #f083b2; --series-6: #b0b8c1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; line-height: 1.35; margin: 0 0 .5rem; }
h3 { font-size: 1rem; line-height: 1.4; margin: 1rem 0 .4rem; }
p, ul, dl { margin: 0 0 .8rem; max-width: 75ch; }
a { color: var(--accent); }
code, .mono { font: .9em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
.muted, figcaption { color: var(--muted); }
.warning {
  background: var(--warning-paper); color: var(--warning-ink); padding: .6rem .8rem;
  border-left: .3rem solid currentColor; max-width: none;
}
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 .8rem; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; }
td { max-width: 60ch; overflow-wrap: break-word; }
th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line); }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; background: var(--panel); }
figcaption { font-size: .85rem; line-height: 1.45; margin-top: .25rem; }
svg { max-width: 100%; height: auto; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""


def page(title: str, body: str, *, style: str = "") -> str:
    """Return the whole HTML text: `title` as plain text, `body` as HTML, `style` as CSS of our
    own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Return a text as HTML may hold it, in one line: markup, control characters and those that
    turn the direction of writing are shown, not carried out.

    >>> escape('<b>"a"\\x1b\\u202e')
    '&lt;b&gt;&quot;a&quot;\\\\x1b\\\\u202e'
    """
    return html.escape(one_line(str(text)))


def section(name: str, title: str, body: str) -> str:
    """Return a section of HTML `body`, which `#name` leads to."""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def table(rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Return a table of plain texts, which scrolls inside its own box where it is too wide."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    top = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    return scrolling(f"{top}<tbody>\n{body}\n</tbody>")


def scrolling(rows: str, kind: str = "") -> str:
    """Return a table of HTML rows, which scrolls inside its own box where it is too wide."""
    named = f' class="{kind}"' if kind else ""
    # a box that scrolls can be reached by the keyboard
    return f'<div class="scroll" tabindex="0"><table{named}>{rows}</table></div>'


def figure(png: bytes, alt: str, caption: str = "") -> str:
    """Return a picture that the page itself carries, with plain texts for it."""
    image = opened(png)
    return picture(f"data:image/png;base64,{base64.b64encode(png).decode()}", image, alt, caption)


def picture(
    source: str, image: Image.Image, alt: str, caption: str = "", *, link: bool = False
) -> str:
    """Return a picture that lies at `source`, a name beside the page; `image` tells its size. With
    a `link` it opens by itself."""
    width, height = image.size
    name = html.escape(source)
    shown = f'<img src="{name}" width="{width}" height="{height}" alt="{escape(alt)}">'
    if link:
        shown = f'<a href="{name}">{shown}</a>'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{shown}{below}</figure>"


def figures(parts: Iterable[str]) -> str:
    """Lay figures beside one another, in as many rows as the width asks for."""
    return f'<div class="figures">\n{chr(10).join(parts)}\n</div>'
