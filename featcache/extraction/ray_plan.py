"""The actors of a Ray cluster are planned: how many, of which size, and on which nodes they may be.

Everything here is arithmetic on plain values, which needs no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featcache.errors import UserError, counted, short

Resources = Mapping[str, float]  # of a node, by Ray's names: CPU, GPU
_PART = 1e-6  # shares of GPUs are decimal numbers, whose sums are not exact


@dataclass(frozen=True)
class ActorSize:
    """Say what each actor asks of its node, and the device that its teacher runs on."""

    cpus: int
    gpus: float
    device: str  # cpu or cuda

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{counted(self.cpus, 'CPU')}{gpus}"


def actor_size(
    nodes: Sequence[Resources], workers: int, gpus: float | None, device: str | None
) -> ActorSize:
    """Return the size of actors: a GPU each, or the share that is asked for, where the cluster has
    GPUs; and as many CPUs as decoding threads, but no more than lets a node use all of its GPUs.
    Raises UserError where the cluster cannot have such an actor.

    >>> actor_size([{"CPU": 16, "GPU": 4}], 8, None, None)
    ActorSize(cpus=4, gpus=1.0, device='cuda')
    >>> actor_size([{"CPU": 16, "GPU": 4}], 8, 0.5, None)
    ActorSize(cpus=2, gpus=0.5, device='cuda')
    >>> actor_size([{"CPU": 2}, {"CPU": 4}], 8, None, None)
    ActorSize(cpus=4, gpus=0.0, device='cpu')
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
    if device == "cpu" or not (with_gpus or device or gpus):
        return ActorSize(_cpus(nodes, workers), 0.0, "cpu")
    if not with_gpus:
        asked = f"--gpus-per-actor {gpus:g}" if gpus else f"--device {device}"
        raise UserError(
            f"{asked}: none of the cluster's {counted(len(nodes), 'node')} has a GPU; leave it "
            "out, or add a node with one"
        )
    share = gpus or 1.0
    most = max(math.floor(node.get("CPU", 0) / (node["GPU"] / share)) for node in with_gpus)
    return ActorSize(min(workers, max(most, 1)), float(share), "cuda")


def _cpus(nodes: Sequence[Resources], workers: int) -> int:
    most = max((math.floor(node.get("CPU", 0)) for node in nodes), default=0)
    if most < 1:
        raise UserError(
            f"none of the cluster's {counted(len(nodes), 'node')} offers a CPU to Ray; start one "
            "with `ray start --num-cpus N`"
        )
    return min(workers, most)


def capacity(node: Resources, size: ActorSize) -> int:
    """Count the actors of a size that fit on a node.

    >>> capacity({"CPU": 16, "GPU": 4}, ActorSize(2, 0.5, "cuda"))
    8
    >>> capacity({"CPU": 3}, ActorSize(2, 0.0, "cpu")), capacity({"CPU": 3}, ActorSize(4, 0, "cpu"))
    (1, 0)
    """
    fits = math.floor(node.get("CPU", 0) / size.cpus + _PART)
    if size.gpus:
        fits = min(fits, math.floor(node.get("GPU", 0) / size.gpus + _PART))
    return fits


def least_and_most(asked: tuple[int, int | None] | None, shards: int) -> tuple[int, int]:
    """Return how many actors are waited for, and how many there may be: no more than shards.

    >>> least_and_most(None, 7), least_and_most((2, 4), 3), least_and_most((2, None), 1)
    ((1, 7), (2, 3), (1, 1))
    """
    least, most = asked or (1, None)
    most = shards if most is None else min(most, shards)
    return min(least, most), most


def to_start(*, least: int, most: int, placed: int, waiting: int, open_shards: int) -> int:
    """Count the actors to ask for now: all that are waited for, then one after the other, each as
    soon as the one before has found a place; never more than there are shards to make.

    >>> to_start(least=2, most=5, placed=0, waiting=0, open_shards=9)
    2
    >>> to_start(least=2, most=5, placed=2, waiting=0, open_shards=9)
    1
    >>> to_start(least=2, most=5, placed=2, waiting=1, open_shards=9)
    0
    >>> to_start(least=2, most=5, placed=3, waiting=0, open_shards=3)
    0
    """
    there, bound = placed + waiting, min(most, open_shards)
    missing = min(least, bound) - there
    if missing > 0:
        return missing
    return int(not waiting and there < bound)


def version_difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Say in which versions a node differs, both of each; empty where in none.

    >>> version_difference({"torch": "2.15.0", "ray": "2.60"}, {"torch": "2.14.0", "ray": "2.60"})
    'torch 2.14.0 there and 2.15.0 here'
    """
    return ", ".join(
        f"{name} {_told(there.get(name))} there and {_told(here.get(name))} here"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    )


def _told(version: str | None) -> str:
    return "none" if version is None else short(version).strip("'")


def lacking_note(size: ActorSize, placed: int, least: int, nodes: int, held: int) -> str:
    """Say what is waited for before the work begins.

    >>> lacking_note(ActorSize(2, 0.0, "cpu"), 1, 3, nodes=1, held=1)
    'note: waiting for 2 more actors of 2 CPUs each: 1 node holds 1 at most'
    """
    return (
        f"note: waiting for {counted(least - placed, 'more actor')} of {size} each: "
        f"{counted(nodes, 'node holds', 'nodes hold')} {held} at most"
    )
