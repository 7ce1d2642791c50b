"""The JSON of a cache is checked once, where it is read; afterwards the code trusts its values.

A checksum only tells that nobody changed a file by accident. Shapes, types, ranges and names are
checked here, and strictly: true is no number, 1.0 is no count, null is no value, and a field that
is not known is refused, since what a newer version means by it may change the numbers. Only
provenance, which changes nothing, may say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
)

from featcache.errors import UserError, short
from featcache.runtime.field_words import field_reason
from featcache.storage.names import check_file_name

_ENTRIES = 4096  # of lists and objects whose length nothing else bounds
_TEXT = 1 << 16
LARGEST_SIDE_FILE = 1 << 30  # bytes; of 24 levels of a width of 1,024 a state has 130 kB


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has control characters")
    return text


def _text(value: Any) -> str:
    """Take a path's bytes that are no UTF-8 as well, which are surrogates; pydantic does not."""
    if not isinstance(value, str) or len(value) > _TEXT:
        raise ValueError(f"a text of at most {_TEXT} characters is needed")
    value.encode("utf-8", "surrogateescape")  # a UnicodeEncodeError is a ValueError
    return value


Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Text = Annotated[Any, PlainValidator(_text)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,64}$")]
Crc = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
ShardName = Annotated[str, StringConstraints(pattern=r"^[0-9]{6,18}$")]
FileName = Annotated[str, AfterValidator(check_file_name)]
SideName = Annotated[
    str, StringConstraints(pattern=r"^[^/]+\.safetensors$"), AfterValidator(check_file_name)
]
TeacherName = Annotated[
    str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_printable)
]
Views = Annotated[int, Field(ge=1, le=1 << 16)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
Size = Annotated[int, Field(ge=1, le=1 << 16)]  # of tokens, of channels
Extent = Annotated[int, Field(ge=0, le=1 << 31)]
Dtype = Literal["|u1", "|i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"]
Channels = Annotated[list[Number], Field(min_length=3, max_length=3)]


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | bool | int | float | None):
        raise ValueError("a number, a text, true or false is needed")
    return value


def _shallow(value: Any) -> Any:
    """Take a number, a text, or a list or an object of them."""
    inner = list(value.values()) if isinstance(value, dict) else value
    for each in inner if isinstance(inner, list) else [value]:
        if not isinstance(each, str | bool | int | float | None):
            raise ValueError("a number, a text, or a list or an object of them is needed")
    return value


Scalar = Annotated[Any, PlainValidator(_scalar)]
Shallow = Annotated[Any, PlainValidator(_shallow)]


class _Object(BaseModel):
    """Describes one kind of object. A field with a default may be absent, and is never null."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class Teacher(_Object):
    name: TeacherName
    weight_hash: Text = ""
    input_px: Pixels = 1
    pixel_mean: Channels = []
    pixel_std: Channels = []
    patches: Size
    width: Size
    depth: Annotated[int, Field(ge=1, le=_ENTRIES)]
    precision: Word = ""
    filter: Word = ""


class Policy(_Object):
    """What `views.policy` allows."""

    size: Pixels
    scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
    ratio: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
    filter: Literal["bilinear", "bicubic", "lanczos", "area"]
    flip: Annotated[float, Field(ge=0, le=1)]
    jitter: Annotated[float, Field(ge=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Pictures(_Object):
    count: Count
    keys_digest: Digest


class Identity(_Object):
    teacher: Teacher
    levels: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=_ENTRIES)]
    eps: Annotated[float, Field(gt=0, le=1)]
    order: Word
    codec: Word
    tokens: Literal["raster", "ranked"]
    keep: Size = 1
    pixels: Literal["raw"] = "raw"
    first_view: Views = 1
    policy: Policy
    views: Views
    pixel_path: Annotated[dict[Name, Scalar], Field(max_length=64)]
    pictures: Pictures
    # the lists that came later
    appended: Annotated[list[Pictures], Field(min_length=1, max_length=_ENTRIES)] = []
    rows_per_shard: Annotated[int, Field(ge=1, le=2**40)]
    store: Word
    parent: Digest = ""  # the id of the cache that it was derived from


Losses = Annotated[list[Number], Field(max_length=_ENTRIES)]  # one a level


class Distortion(_Object):
    """What a codec loses, and what the teacher's own arithmetic changes."""

    views: Count = 0
    cosine: Losses = []
    mse: Losses = []
    worst: Losses = []
    added_loss: Losses = []
    batch_mse: Losses = []
    batch_added_loss: Losses = []
    precision: Word = ""
    precision_mse: Losses = []
    precision_added_loss: Losses = []


class Provenance(_Object):
    """Other fields may be there: they change nothing."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Shallow] = Field(init=False)

    weights: Text
    source: Text
    appended: Annotated[list[Text], Field(max_length=_ENTRIES)] = []  # sources of the later lists
    versions: Annotated[dict[Text, Text], Field(max_length=64)] = {}
    batch_size: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    compiled: bool = True
    copied_from: Text = ""
    statistics: Text = ""
    derived_from: Text = ""
    distortion: Distortion = Distortion()
    merged: bool = False  # derived with --levels or --views, so that additions were merged


class ArrayFacts(_Object):
    dtype: Dtype
    item: Annotated[list[Extent], Field(max_length=8)]
    dimensions: Annotated[list[Name], Field(max_length=10)]
    per_view: bool
    split: bool


class Shard(_Object):
    name: ShardName
    first: Count
    count: Annotated[int, Field(ge=1, le=1 << 26)]


class SideFile(_Object):
    bytes: Count
    crc32c: Crc


class ManifestFile(SideFile):
    """Describes a file beside the manifest, which is read as a whole."""

    bytes: Annotated[int, Field(ge=0, le=LARGEST_SIDE_FILE)]


class File(SideFile):
    """Describes a file of a shard. `chunks` of one that ends with an index of them."""

    chunks: Count = 0
    compression: Literal["blosc"] = "blosc"


class Manifest(_Object):
    format: int
    id: Digest
    identity: Identity
    provenance: Provenance
    arrays: Annotated[dict[Name, ArrayFacts], Field(min_length=1, max_length=256)]
    shards: Annotated[list[Shard], Field(min_length=1)] = []  # absent where they are many
    files: Annotated[dict[SideName, ManifestFile], Field(max_length=64)]
    compression: Literal["blosc"] = "blosc"


class Quarantined(_Object):
    key: Text
    reason: Text


class ShardFiles(_Object):
    """The part of a record that proves the bytes of a shard."""

    model_config = ConfigDict(extra="ignore")

    files: dict[FileName, File]


class ArrayStatistics(_Object):
    """Other numbers may be there, such as those of later versions."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    min: Number
    max: Number
    non_finite: Count


class Totals(ArrayStatistics):
    """The same of several shards."""

    rows: Count


class IndexFacts(_Object):
    statistics: Annotated[dict[Name, Totals], Field(max_length=256)]


class Record(ShardFiles):
    model_config = ConfigDict(extra="forbid")

    shard: ShardName
    rows: Count
    keys_digest: Digest
    quarantined: list[Quarantined]
    statistics: Annotated[dict[Name, ArrayStatistics], Field(max_length=256)]
    content: Digest = ""


class Quarantine(_Object):
    pictures: list[Quarantined]


Spent = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]  # seconds
Moment = Annotated[str, StringConstraints(pattern=r"^[0-9T:.Z+-]{1,40}$")]
ViewCost = Annotated[list[Spent], Field(min_length=2, max_length=2)]  # seconds, views


class LedgerLine(_Object):
    """A line of `runs.jsonl`; what else it says is of its command. What could not be known is null
    or absent, and is never a guess."""

    model_config = ConfigDict(extra="ignore")

    time: Moment
    # such as `extract`, `eval knn`
    command: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}$")]
    cache_id: Text | None = None
    cache: Text | None = None  # its path
    recipe: Text = ""
    run: Text = ""
    # what the work cost: see `catalog.account`
    start: Moment = ""
    end: Moment = ""
    wall_s: Spent | None = None
    device_s: Spent | None = None
    bytes_read: Count | None = None
    picture_bytes: Count | None = None
    bytes_written: Count | None = None
    teacher_s: Spent | None = None
    teacher_saved_s: Spent | None = None
    teacher_cost: Annotated[dict[Text, ViewCost], Field(max_length=64)] = {}
    views_shown: Count | None = None
    user: Text = ""
    host: Text = ""
    pid: Count = 0
    outcome: Literal["done", "stopped", "failed"] = "done"
    processes: Count = 1
    counted: Count = 1  # processes whose counts are in the line
    from_id: Text = ""  # of the cache that this one was copied or derived from


def schema_problem(kind: type[BaseModel], value: Any) -> str:
    """Say which field of an object is not of its kind and what it holds; empty where all are."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return _first_problem(error)
    return ""


def check(kind: type[BaseModel], value: Any, path: Path, todo: str) -> None:
    """Raise UserError, which names the file and the field, unless an object is of its kind."""
    if why := schema_problem(kind, value):
        what = kind.__name__.lower()
        raise UserError(f"{str(path)!r} is no {what} as extraction writes it: {why}; {todo}")


def _first_problem(error: ValidationError) -> str:
    """Describe the first of the problems: the others may be many."""
    first = error.errors(include_url=False)[0]
    loc = ".".join(str(part) for part in first["loc"] if part != "[key]")
    field = loc if loc.isprintable() and len(loc) <= 80 else short(loc)
    match first["type"]:
        case "missing":
            return f"{field} is missing"
        case "extra_forbidden":
            return f"{field} is not known to this version"
    return f"{field or 'it'} is {short(first['input'])}: {field_reason(first)}"
