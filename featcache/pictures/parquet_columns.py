"""The columns of parquet files are found: the pictures, their paths, and the labels.

`datasets` writes what its columns are into the schema's metadata (`huggingface`); without it a
struct with `bytes`, or the only binary column, is the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.errors import UserError, counted
from featcache.pictures.parquet_groups import GROUP_BYTES, ParquetFile, batches
from featcache.runtime import strict_json

_COLUMN_BYTES = 512 << 20  # of one column of a row group


@dataclass(frozen=True)
class Columns:
    """Hold the columns that are read, by their names as parquet has them."""

    data: str  # bytes of pictures
    path: str | None
    label: str | None
    labels: tuple[str, ...]  # columns that could hold labels
    names: tuple[str, ...] | None  # of the classes


def read_columns(
    spec: str, files: Sequence[ParquetFile], image: str | None, label: str | None
) -> Columns:
    """Find the columns of files, which are the same in each. Raises UserError where there are no
    pictures, or it is open which column they are."""
    columns = _columns(spec, files[0], image, label)
    for file in files:
        if (other := _columns(spec, file, image, label)) != columns:
            raise UserError(
                f"pictures {spec!r}: {files[0].path!r} has {columns}, {file.path!r} has {other}; "
                "files of the same columns and classes are needed: give them apart"
            )
        if file.most_group_bytes > GROUP_BYTES:
            raise UserError(
                f"{file.path!r}: a row group has {file.most_group_bytes} bytes, at most "
                f"{GROUP_BYTES} are allowed, since one is held in memory; write it with smaller "
                "ones (`row_group_size=100` of pyarrow's write_table)"
            )
    return columns


def _columns(spec: str, file: ParquetFile, image: str | None, label: str | None) -> Columns:
    features = _features(file)
    name = _image_column(spec, file, features, image)
    kind = file.schema.field(name).type
    is_struct = hasattr(kind, "get_field_index") and kind.num_fields > 0
    has_path = is_struct and kind.get_field_index("path") >= 0 and _is_text(kind.field("path").type)
    classes = {
        each: tuple(names)
        for each, feature in features.items()
        if (names := _class_names(feature)) is not None and each in file.schema.names
    }
    chosen, candidates = _label_column(spec, file, classes, label)
    return Columns(
        f"{name}.bytes" if is_struct else name,
        f"{name}.path" if has_path else None,
        chosen,
        candidates,
        classes.get(chosen or ""),
    )


def _features(file: ParquetFile) -> dict[str, dict[str, Any]]:
    """Return what `datasets` says of each column; nothing where it did not write the file, or what
    stands there is not of its form."""
    text = (file.schema.metadata or {}).get(b"huggingface")
    try:
        found = strict_json.parse(text)["info"]["features"] if text else {}
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _class_names(feature: dict[str, Any]) -> list[str] | None:
    names = feature.get("names")
    if feature.get("_type") != "ClassLabel" or not isinstance(names, list) or not names:
        return None
    is_list = all(isinstance(name, str) and name for name in names) and len({*names}) == len(names)
    return names if is_list else None


def _image_column(
    spec: str, file: ParquetFile, features: dict[str, dict[str, Any]], image: str | None
) -> str:
    fields = [each for each in file.schema if file.schema.names.count(each.name) == 1]
    usable = [each.name for each in fields if _is_bytes(each.type) or _is_image(each.type)]
    said = [name for name in usable if features.get(name, {}).get("_type") == "Image"]
    structs = [name for name in usable if not _is_bytes(file.schema.field(name).type)]
    found = [image] if image is not None else said or structs or usable
    if len(found) == 1 and found[0] in usable:
        return found[0]
    given = (
        f"#image-column={image} is"
        if image is not None
        else f"{counted(len(found), 'column')} could be"
    )
    raise UserError(
        f"pictures {spec!r}: {given} {'no' if image is not None else 'the'} column of pictures of "
        f"{file.path!r}; those of bytes are {_listed(usable)}, all are "
        f"{_listed(file.schema.names)}; give one with #image-column=NAME"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(f"{name[:60]!r}" for name in names[:10]) or "none") + more


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_bytes(kind.field("bytes").type)
    )


def _label_column(
    spec: str, file: ParquetFile, classes: dict[str, Any], label: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Return the column of labels, None where it is open which of several, and all of them."""
    import pyarrow as pa

    fields = [each for each in file.schema if file.schema.names.count(each.name) == 1]
    usable = [each.name for each in fields if pa.types.is_integer(each.type) or _is_text(each.type)]
    if label is not None and label not in usable:
        raise UserError(
            f"pictures {spec!r}: #label-column={label} is no column of numbers or text of "
            f"{file.path!r}; there are {_listed(usable)}; give one of them"
        )
    said = [name for name in usable if name in classes]
    found = [label] if label is not None else said
    if label is None and (len(found) != 1 and "label" in usable):
        found = ["label"]
    return (found[0] if len(found) == 1 else None), tuple(found)


def read_column(file: ParquetFile, column: str) -> Iterator[Any]:
    """Yield the values of a small column, row by row. Raises UserError where it cannot be read."""
    for group in range(len(file.starts) - 1):
        for array in batches(file, column, group, _COLUMN_BYTES):
            yield from array.to_pylist()
