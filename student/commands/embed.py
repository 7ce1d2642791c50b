"""`student embed` writes features of pictures to a file that other programs read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from featcache.console import config_file
from featcache.console.command import Command, Section
from featcache.console.option import HelpGroup, option
from featcache.console.params import LocalPath
from featcache.console.picture_options import with_pictures
from featcache.console.text import join_lines, print_facts
from featcache.errors import UsageError, UserError, counted
from student.setup import eval_options

FORMATS = (".npy", ".parquet")


@dataclass(frozen=True)
class _Rows:
    """Holds what is written: features (n,D), and of each picture its key and label."""

    features: Any
    keys: list[str]
    labels: list[int] | None
    classes: list[str] | None
    facts: dict[str, Any]


@click.command(
    cls=Command,
    section=Section.TRAIN,
    short_help="Write features of pictures to a file.",
    epilog="Examples:\n\n  student embed runs/mralign-s0 --images val/ -o val.npy\n\n"
    "  student embed --teacher clip-b16 --images val/ --pool mean -o val.parquet",
)
@with_pictures(
    "images_spec",
    group=HelpGroup.INPUT,
    help="Pictures; they need no labels. [default: $FEATCACHE_IMAGES]",
)
@option(
    "-o",
    "--out",
    group=HelpGroup.INPUT,
    type=LocalPath(),
    required=True,
    help="FILE.npy (and FILE.json with keys and labels beside it), or FILE.parquet.",
)
def command(out: Path, as_json: bool, **given: Any) -> None:
    """Write features (n, D) float32 of the pictures' centre crops: [CLS], or the mean of the
    patches, after the final norm. They are those that `student eval` judges."""
    from featcache.catalog.account import account

    with account("embed", **eval_options.subject_facts(given)) as line:
        facts = _embed(out, given)
        line["pictures"] = facts["pictures"]
    shown = join_lines([f"{out}: {counted(facts['pictures'], 'picture')} x {facts['width']}"])
    print_facts(facts, as_json, shown)


def _embed(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Embed the pictures and write the file; return what is said of it."""
    from featcache.console.params import require_images
    from featcache.pictures.open_source import open_source
    from student.features.task import unlabelled_task

    eval_options.check_subject("embed", given)
    _check_out(out)
    source = open_source(require_images(given["images_spec"]))
    frozen = eval_options.freeze(given)
    eval_options.check_blocks(frozen, given["blocks"])
    with eval_options.stage_bars() as progress:
        task = unlabelled_task(frozen, source, given, progress)
        (features,), rows = task.pooled(task.train, stage="embed")
    keys = [source.keys[row] for row in rows.tolist()]
    facts = {
        "out": str(out),
        "of": str(given["run"].absolute() if given["run"] else given["teacher_spec"]),
        **frozen.facts,
        **{key: given[key] for key in ("pool", "blocks", "crop_pct")},
        "pictures": len(keys),
        "width": features.shape[1],
        **({"skipped": task.skipped.told()} if task.skipped.count else {}),
    }
    labels = None if source.labels is None else source.labels[rows.numpy()].tolist()
    writers = {".npy": _write_npy, ".parquet": _write_parquet}
    try:
        writers[out.suffix](out, _Rows(features.numpy(), keys, labels, source.classes, facts))
    except OSError as error:
        raise UserError(
            f"--out {str(out)!r} cannot be written: {error.strerror or error}; nothing is left of "
            "it; make room, or give another place"
        ) from error
    return facts


command.params += eval_options.parameters()
config_file.accepts(own_code={"teacher_spec": config_file.is_registered})(command)


def _check_out(out: Path) -> None:
    if out.suffix not in FORMATS:
        raise UsageError(
            f"--out {str(out)!r}: a file that ends in {' or '.join(FORMATS)} is needed"
        )
    for path in (out, *([out.with_suffix(".json")] if out.suffix == ".npy" else [])):
        if path.exists() or path.is_symlink():
            raise UsageError(
                f"--out: {str(path)!r} is there already, and is left as it is; give another "
                "name, or remove it"
            )
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out: the folder {str(out.absolute().parent)!r} is missing; make it")
    if out.suffix == ".parquet":
        _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "a .parquet file needs pyarrow; run `pip install pyarrow` (or `pip install "
            "'featcache[parquet]'`), or write .npy"
        ) from error
    return pyarrow


def _write_npy(out: Path, rows: _Rows) -> None:
    import numpy as np

    from featcache.storage import json_file

    features = rows.features
    about = {**rows.facts, "keys": rows.keys, "labels": rows.labels, "classes": rows.classes}
    head = {"descr": features.dtype.str, "fortran_order": False, "shape": features.shape}
    # both are written before one has its name
    with json_file.replaced(out.with_suffix(".json")) as beside, json_file.replaced(out) as data:
        beside.write_bytes((json.dumps(about) + "\n").encode())
        with data.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, head)
            file.write(np.ascontiguousarray(features).data)  # np.save hides a full disk's errno


def _write_parquet(out: Path, rows: _Rows) -> None:
    from featcache.storage import json_file

    pa = _pyarrow()
    flat, width = pa.array(rows.features.reshape(-1)), rows.features.shape[1]
    columns = {
        "key": pa.array(rows.keys, pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    if rows.labels is not None:
        columns["label"] = pa.array(rows.labels, pa.int64())
    if rows.labels is not None and rows.classes is not None:
        columns["class"] = pa.array([rows.classes[label] for label in rows.labels], pa.string())
    table = pa.table(columns).replace_schema_metadata({"student.embed": json.dumps(rows.facts)})
    try:
        with json_file.replaced(out) as temporary:
            pa.parquet.write_table(table, temporary)
    except pa.ArrowException as error:
        raise UserError(f"{str(out)!r} cannot be written: {error}") from error
