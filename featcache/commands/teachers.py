"""`featcache teachers`: who can teach."""

from __future__ import annotations

import json

import click


@click.command(epilog="Example:\n\n  featcache teachers --json")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(as_json: bool) -> None:
    """The teachers known by name; timm:NAME adds any timm VisionTransformer with a [CLS] token."""
    from featcache import teachers as known

    table = [
        {
            "name": name,
            "source": row.source,
            "input_px": row.input_px,
            "patches": row.patches,
            "width": row.width,
            "depth": row.depth,
            "bytes_a_view_last5_fp16": 5 * (row.patches + 1) * row.width * 2,
        }
        for name, row in known.rows().items()
    ]
    if as_json:
        click.echo(json.dumps(table, indent=1))
        return
    click.echo(f"{'name':12}{'input':>6}{'patches':>8}{'width':>6}{'depth':>6}{'bytes/view':>12}  weights")
    for fact in table:
        click.echo(
            f"{fact['name']:12}{fact['input_px']:6}{fact['patches']:8}{fact['width']:6}{fact['depth']:6}"
            f"{fact['bytes_a_view_last5_fp16']:12,}  {fact['source']}"
        )
    click.echo(
        "bytes/view: five levels in fp16. Also timm:NAME[,key=value...] and synthetic:levels=..,tokens=..,width=.."
    )
