"""`--engine ray` has shards made by the actors of a Ray cluster.

The driver hands out names of shards; actors hold the teacher, and records on the store that all
share stay the truth: nothing but counts comes back. A lost actor or node costs the shard that it
had in hand, which another actor takes. Ray restarts and retries nothing by itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from featcache.errors import IdentityError, UsageError, UserError, one_line
from featcache.extraction import ray_cluster, ray_plan
from featcache.extraction.engine import EngineOptions, EngineReport, EngineWork, look_again
from featcache.extraction.ray_probe import check_same_versions, checked_size
from featcache.extraction.ray_worker import (
    Setup,
    ShardActor,
    Told,
    await_file,
)
from featcache.extraction.shard_board import ShardBoard
from featcache.extraction.shard_queue import WAIT_S, lacks_record
from featcache.extraction.target_folder import report_quarantine
from featcache.runtime.meter import from_plain, meter
from featcache.storage import index_build, manifest
from featcache.storage.files import files_of
from featcache.storage.store import record_path

POLL_S = 1.0  # between looks at how far actors are
NOTE_S = 15.0  # until it is said that actors are waited for
STOP_S = 20.0  # for actors to leave the shard in hand: a batch, at most
END_S = 10.0  # for actors to end


def run(work: EngineWork, options: EngineOptions, report: EngineReport) -> None:
    """Extract what is missing by actors."""
    missing = missing_shards(work)
    if missing:
        with ray_cluster.connected(options.address, work.say) as ray:
            size = checked_size(ray, work, options)
            work.begin()
            board = ShardBoard(missing)
            _Driver(ray, work, size, board, options.actors, report).run()
    for job in work.jobs:
        look_again(job.out)
        report_quarantine(job.out, manifest.read(job.out))
        index_build.update(job.out)


def missing_shards(work: EngineWork) -> dict[str, int]:
    """Return the pictures of each shard that lacks a record, and count them as the work."""
    shards = work.jobs[0].plan.shards
    missing = {
        shard["name"]: int(shard["count"])
        for shard in shards
        if any(lacks_record(job, shard["name"], leased=False) for job in work.jobs)
    }
    work.progress.total = sum(missing.values())
    work.progress.there = sum(shard["count"] for shard in shards) - work.progress.total
    return missing


# ------------------------------------------------------------ the work


@dataclass
class _Actor:
    """Hold an actor, and what it was asked last: about, load, begin or extract."""

    number: int
    handle: Any
    asked: str = "about"
    node: str = "a node that it did not name"
    pid: int = 0
    live: int = 0  # pictures of the shard in hand that are done
    looked: Any = None  # the answer that tells them, on its way


@dataclass
class _Driver:
    """Places actors, gives them shards, and takes what they tell."""

    ray: Any
    work: EngineWork
    size: ray_plan.ActorSize
    board: ShardBoard
    asked: tuple[int, int | None] | None
    report: EngineReport
    actors: dict[int, _Actor] = field(default_factory=dict)
    refs: dict[Any, _Actor] = field(default_factory=dict)  # what is waited for
    idle: list[_Actor] = field(default_factory=list)
    placed: int = 0  # of the least number, which the work waits for
    begun: bool = False  # the folders are there
    finished: int = 0  # pictures of the shards that actors have completed
    counted: set[int] = field(default_factory=set)  # actors that told their counts
    _next: int = 0
    _looked_at: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _told: str = ""

    def run(self) -> None:
        self.begun = all((job.out / manifest.NAME).is_file() for job in self.work.jobs)
        self.least, self.most = ray_plan.least_and_most(self.asked, self.board.left)
        try:
            while self.board.left:
                self._start_actors()
                self._give_work()
                self._look()
                self._take_answers()
                self._show()
        finally:
            self._close()

    # ---- actors

    def _start_actors(self) -> None:
        waiting = sum(not each.pid for each in self.actors.values())
        count = ray_plan.to_start(
            least=self.least,
            most=self.most,
            placed=len(self.actors) - waiting,
            waiting=waiting,
            open_shards=self.board.left,
        )
        for _ in range(count):
            self._start_actor()

    def _start_actor(self) -> None:
        handle = (
            self.ray.remote(ShardActor)
            .options(
                num_cpus=self.size.cpus,
                num_gpus=self.size.gpus,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=3,  # what extracts, what tells, and what stops it
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        actor = _Actor(self._next, handle)
        self._next += 1
        self.actors[actor.number] = actor
        self._ask(actor, "about")

    def _ask(self, actor: _Actor, what: str, *given: Any) -> None:
        actor.asked = what
        self.refs[getattr(actor.handle, what).remote(*given)] = actor

    # ---- what is asked

    def _give_work(self) -> None:
        """Let those that are idle begin, one before the others, and then extract."""
        if self._lacks_room():
            self._note_lack()
        else:
            self._since = time.monotonic()
        for actor in [] if self.placed < self.least else list(self.idle):
            if actor.asked == "about":
                self.idle.remove(actor)
                self._ask(actor, "load", self._setup())
            elif actor.asked == "load":
                if self.begun or not any(each.asked == "begin" for each in self.actors.values()):
                    self.idle.remove(actor)
                    self._ask(actor, "begin", self.begun)
            elif name := self.board.take(actor.number, time.monotonic()):
                self.idle.remove(actor)
                actor.live = 0
                self._ask(actor, "extract", name)

    def _lacks_room(self) -> bool:
        """Return whether the work waits for actors to be placed."""
        return self.placed < self.least or not any(each.pid for each in self.actors.values())

    def _setup(self) -> Setup:
        work = self.work
        return Setup(
            plan_again=work.plan_again,
            words=[*work.words, f"--device={self.size.device}"],
            ids=work.ids,
            folder=os.getcwd(),  # noqa: PTH109
            threads=torch.get_num_threads(),
            batch_size=work.batch_size,
            workers=min(work.workers, self.size.cpus),
            strict=work.strict,
        )

    def _note_lack(self) -> None:
        if time.monotonic() - self._since < NOTE_S:
            return
        nodes = ray_cluster.alive_nodes(self.ray)
        held = sum(ray_plan.capacity(node.resources, self.size) for node in nodes)
        placed = sum(bool(each.pid) for each in self.actors.values())
        least = max(self.least, 1)
        note = ray_plan.lacking_note(self.size, placed, least, len(nodes), held)
        if note != self._told:
            self.work.say(note)
            self._told = note

    # ---- what is answered

    def _take_answers(self) -> None:
        if not self.refs:
            time.sleep(0.1)
            return
        ready, _ = self.ray.wait(list(self.refs), num_returns=1, timeout=POLL_S)
        if ready:
            ready, _ = self.ray.wait(list(self.refs), num_returns=len(self.refs), timeout=0)
        for ref in ready:
            actor = self.refs.pop(ref)
            try:
                answer = self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as error:  # the work raised it
                raise _task_error(actor, error) from error
            except self.ray.exceptions.RayError as error:  # the actor is gone
                self._lose(actor, error)
                continue
            self._take(actor, answer)

    def _lose(self, actor: _Actor, error: Exception) -> None:
        del self.actors[actor.number]
        why = reason_of(error)
        name = self.board.lose(actor.number, f"node {actor.node}", why)
        shard = f"; another takes shard {name}" if name else ""
        self.work.say(f"note: an actor on node {actor.node} was lost: {why}{shard}")

    def _take(self, actor: _Actor, answer: Any) -> None:
        if actor.asked == "about":
            check_same_versions(answer)
            actor.node, actor.pid = answer["node"], answer["pid"]
            self.placed += 1
        else:
            told: Told = answer
            if told.outcome == "failed":
                raise UserError(f"node {actor.node}: {told.line}")
            if actor.asked == "begin":
                self._await_folders()
            elif actor.asked == "extract":
                self._take_shard(actor, told)
        self.idle.append(actor)

    def _await_folders(self) -> None:
        """See that what an actor began is seen here, before any shard is made."""
        for job in [] if self.begun else self.work.jobs:
            await_file(job.out, job.out / manifest.NAME)
        self.begun = True

    def _take_shard(self, actor: _Actor, told: Told) -> None:
        progress = self.work.progress
        actor.live = 0
        meter.add(from_plain(told.counts))
        self.counted.add(actor.number)
        self.report.processes = len(self.counted)
        progress.exif_ignored += told.exif_ignored
        for stage, seconds in told.busy.items():
            progress.add(stage, seconds)
        if told.outcome == "held":
            self.board.put_off(actor.number, time.monotonic() + WAIT_S)
            progress.waiting(len(self.board.held))
            return
        name = self.board.done(actor.number)
        if told.outcome == "there":  # another writer made it meanwhile
            progress.total -= self.board.counts[name]
            progress.there += self.board.counts[name]
        self.finished += self.board.counts[name] if told.outcome == "done" else 0
        for job in self.work.jobs:
            files_of(job.out).look(record_path(job.out, name))

    # ---- how far it is

    def _look(self) -> None:
        """Ask actors now and then how far they are; an answer that does not come is left."""
        if time.monotonic() - self._looked_at < POLL_S:
            return
        self._looked_at = time.monotonic()
        for actor in self.actors.values():
            if actor.looked is not None:
                done, _ = self.ray.wait([actor.looked], timeout=0)
                if not done:
                    continue
                with contextlib.suppress(Exception):  # what ails it, its own answer tells
                    actor.live = self.ray.get(actor.looked)
                actor.looked = None
            if actor.asked == "extract" and actor.number in self.board.in_hand:
                actor.looked = actor.handle.pictures.remote()

    def _show(self) -> None:
        progress = self.work.progress
        live = sum(
            min(actor.live, self.board.counts[self.board.in_hand[actor.number]])
            for actor in self.actors.values()
            if actor.number in self.board.in_hand
        )
        if self.finished + live != progress.pictures:
            progress.pictures = self.finished + live
            progress.report(progress)

    # ---- the end

    def _close(self) -> None:
        """End all actors: those that have a shard in hand leave it in order, if they do so soon."""
        with contextlib.suppress(KeyboardInterrupt):  # told twice: no more is waited for
            self._stop_in_order()
        handles = [actor.handle for actor in self.actors.values()]
        for handle in handles:
            with contextlib.suppress(Exception):
                self.ray.kill(handle, no_restart=True)
        with _later_interrupt():
            self._await_end(handles)

    def _stop_in_order(self) -> None:
        busy = {ref: actor for ref, actor in self.refs.items() if actor.asked == "extract"}
        with contextlib.suppress(self.ray.exceptions.RayError):
            for actor in busy.values():
                actor.handle.stop.remote()
            if busy:
                self.ray.wait(list(busy), num_returns=len(busy), timeout=STOP_S)

    def _await_end(self, handles: list[Any]) -> None:
        """Wait until nothing answers any more."""
        with contextlib.suppress(Exception):
            asked = [handle.pictures.remote() for handle in handles]
            if asked:
                self.ray.wait(asked, num_returns=len(asked), timeout=END_S)


@contextlib.contextmanager
def _later_interrupt() -> Iterator[None]:
    """Let a further signal not end the wait for processes that are ending."""
    try:
        yield
    except KeyboardInterrupt:
        return


def reason_of(error: BaseException) -> str:
    """Return in a line why an actor is gone, of what Ray says at length.

    >>> reason_of(ValueError("The actor died.\\n\\tpid: 3\\nThe node has died. More of it."))
    'The node has died'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.partition(":")[0].isidentifier()] or ["no reason"]
    return one_line(told[-1].partition(". ")[0].rstrip("."))[:300]


def _task_error(actor: _Actor, error: Any) -> BaseException:
    """Return what an actor's work raised, with Ray's text of where it was."""
    cause = error.cause if isinstance(error.cause, BaseException) else error
    if isinstance(cause, UsageError | IdentityError):
        return cause
    cause.add_note(f"on node {actor.node}:\n{error}")
    return cause
