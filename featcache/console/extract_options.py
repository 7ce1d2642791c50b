"""The options of `featcache extract` become plans: pictures, views, teachers and layout.

Libraries are imported where they are used, so that `--help` needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featcache.console.params import require_images
from featcache.errors import UsageError
from featcache.storage import manifest
from featcache.views import patch_grid, pixel_path
from featcache.views.policy import AREA, Policy, load_policy

if TYPE_CHECKING:
    from featcache.extraction.plan import Plan
    from featcache.pictures.source import Source


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Hold the options of one call; each field is named as click names its parameter."""

    recipes: str | None  # of --for
    names: tuple[str, ...]
    images_spec: str | None
    out: Path | None
    view_count: int
    levels: tuple[str, ...]
    policy_name: str
    size: int | None
    scale: tuple[float, float] | None
    ratio: tuple[float, float] | None
    filter_name: str | None
    flip: float | None
    jitter: float | None
    seed: int | None
    order: str | None
    codec: str
    store_name: str
    tokens: str
    keep: str | None
    pixels: str | None
    decoder: str
    exif: bool
    weights: tuple[str, ...]
    precision: str
    compiled: bool
    labelled: str | None
    rows_per_shard: int | str  # auto
    batch_size: int
    workers: int
    device: str | None
    devices: str | None
    share: str | None
    engine: str
    address: str | None
    actors: str | None  # MIN:MAX
    gpus_per_actor: float | None
    add: bool
    append: bool
    strict: bool
    dry_run: bool
    as_json: bool

    @property
    def policy_changes(self) -> dict[str, Any]:
        """Return the fields of the policy that were given; FFCV resizes by area."""
        names = ("size", "scale", "ratio", "flip", "jitter", "seed")
        fields = {**{name: getattr(self, name) for name in names}, "filter": self.filter_name}
        if self.decoder == "ffcv" and self.filter_name is None:
            fields["filter"] = AREA
        return {name: value for name, value in fields.items() if value is not None}


class Inputs(NamedTuple):
    """Hold the pictures, how views are drawn of them, and the devices that teachers run on."""

    source: Source
    policy: Policy
    devices: list[str]


def check_names(options: ExtractOptions) -> None:
    """Raise UsageError for unknown names, before anything is read."""
    from featcache import teachers
    from featcache.models.spec import split_spec
    from featcache.targets import codec_names
    from featcache.targets.attention import ORDERS

    if not options.names:
        raise UsageError(
            f"no teacher given: --teacher is one of {', '.join(teachers.model_cards())}, or "
            "timm:NAME"
        )
    if options.order is not None and options.order not in ORDERS:
        raise UsageError(f"--order {options.order!r}: {', '.join(ORDERS)} are allowed")
    codec_names.check(options.codec)
    for name in options.names:
        teachers.family(split_spec(name)[0])


def open_inputs(options: ExtractOptions) -> Inputs:
    """Open the pictures, and check policy and devices against them and this machine."""
    policy = load_policy(options.policy_name, **options.policy_changes)
    spec = require_images(options.images_spec)
    source = pixel_path.open_with_decoder(spec, options.decoder, exif=options.exif)
    pixel_path.check_filter(pixel_path.pixel_path(source), policy.filter)
    return Inputs(source, policy, _devices(options))


def _devices(options: ExtractOptions) -> list[str]:
    from featcache.extraction import launcher
    from featcache.runtime.device import pick_device

    if options.engine != "local":  # the actors run it, and here its facts alone are read
        return ["cpu"]
    if options.device and options.devices:
        raise UsageError(
            f"--device {options.device} and --devices {options.devices}: one of them is allowed; "
            "leave one out"
        )
    if options.devices:
        return launcher.parse_devices(options.devices)
    return [pick_device(options.device)]


def build_plans(options: ExtractOptions, say: Callable[[str], None]) -> tuple[list[Plan], Inputs]:
    """Load each teacher and join it with what is to be stored of it."""
    from featcache.extraction.options import per_teacher, weights_per_teacher

    levels = per_teacher("--levels", options.levels, options.names)
    weights = weights_per_teacher(options.weights, options.names)
    inputs = open_inputs(options)
    plans = [_plan(options, inputs, name, levels[name], weights[name]) for name in options.names]
    policy = _fitting_policy(options, plans[0], say)
    if policy != inputs.policy:
        plans = [replace(plan, policy=policy) for plan in plans]
    return plans, inputs._replace(policy=policy)


def _fitting_policy(options: ExtractOptions, plan: Plan, say: Callable[[str], None]) -> Policy:
    """Return the policy with views of a size that a student's patches can be cut from: where none
    is given, that of the first teacher's own input."""
    policy, teacher = plan.policy, plan.teacher
    why = patch_grid.misfit(policy.size, teacher.patches, teacher.input_px)
    is_free = options.size is None and options.policy_name == "default"
    if (
        why
        and is_free
        and not _adds_to(options, policy.size)
        and patch_grid.patch_px(teacher.input_px, teacher.patches)
    ):
        say(f"note: views of {teacher.input_px} pixels, as the teacher's input: {why}")
        return replace(policy, size=teacher.input_px)
    if why:
        say(f"note: {why}: no student can be trained by its tokens")
    return policy


def _adds_to(options: ExtractOptions, size: int) -> bool:
    """Return whether views are added to a cache of views of this size."""
    if not options.add or options.out is None or not (options.out / manifest.NAME).is_file():
        return False
    return bool(manifest.read(options.out)["identity"]["policy"]["size"] == size)


def _plan(
    options: ExtractOptions, inputs: Inputs, name: str, levels: str | None, weights: str | None
) -> Plan:
    from featcache.extraction.options import (
        default_order,
        levels_of_teacher,
        load_teacher,
        parse_keep,
    )
    from featcache.extraction.plan import Plan

    device = inputs.devices[0]
    teacher = load_teacher(name, weights, device, options.precision, options.compiled)
    rows: Any = options.rows_per_shard
    return Plan(
        source=inputs.source,
        teacher=teacher,
        policy=inputs.policy,
        views=options.view_count,
        levels=levels_of_teacher(levels, teacher),
        order=options.order or default_order(teacher),
        codec=options.codec,
        store=options.store_name,
        **({} if rows == "auto" else {"rows_per_shard": rows}),
        tokens=options.tokens,
        keep=parse_keep(options.keep, teacher.patches),
        pixels=options.pixels is not None,
    )
