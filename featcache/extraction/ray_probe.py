"""Nodes of a Ray cluster tell their resources and versions before any actor is started there."""

from __future__ import annotations

from typing import Any

from featcache.errors import UserError, one_line
from featcache.extraction import ray_cluster, ray_plan
from featcache.extraction.engine import EngineOptions, EngineWork
from featcache.extraction.ray_worker import about, versions

PROBE_S = 120.0  # for all nodes to import what an actor needs


def checked_size(ray: Any, work: EngineWork, options: EngineOptions) -> ray_plan.ActorSize:
    """Return the size of actors, once every node that can hold one has told its versions."""
    nodes = ray_cluster.alive_nodes(ray)
    resources = [node.resources for node in nodes]
    size = ray_plan.actor_size(resources, work.workers, options.gpus_per_actor, options.device)
    fitting = [node for node in nodes if ray_plan.capacity(node.resources, size)]
    _check_versions(ray, fitting)
    return size


def _check_versions(ray: Any, nodes: list[ray_cluster.Node]) -> None:
    """Raise UserError for a node that lacks featcache, or whose versions differ from ours."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(about)
    asked = {
        probe.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(): node
        for node in nodes
    }
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
    for ref in ready:  # a node that is gone, or slow: its actors are asked again
        try:
            told = ray.get(ref)
        except Exception as error:
            if "import" not in str(error):
                continue
            raise _import_error(asked[ref].name, error) from error
        check_same_versions(told)


def check_same_versions(told: dict[str, Any]) -> None:
    """Raise UserError for a process of other versions, of which other bytes may come."""
    if differs := ray_plan.version_difference(versions(), told["versions"]):
        raise UserError(
            f"node {told['node']} has other versions than this machine, and other bytes may come "
            f"of them: {differs}; install the same on every node, nothing was written"
        )


def _import_error(node: str, error: BaseException) -> UserError:
    last = next(line for line in reversed(str(error).splitlines()) if "import" in line or line)
    return UserError(
        f"node {node} cannot import featcache as this machine does: {one_line(last)}; install the "
        "same version there, and the package ray"
    )
