"""A board knows of each shard whether it is free, in whose hand it is, or done; it decides who
makes which, and when a shard is given up.

Its workers are numbers. A shard whose worker is lost goes to another one, once: a shard that has
ended two workers would end the third.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from featcache.errors import UserError

MOST_LOST = 2  # workers that one shard may end
MOST_IN_A_ROW = 4  # workers that may be lost while no shard is finished


@dataclass
class ShardBoard:
    """Hand out shards; `counts` has the pictures of each shard that is missing, in order."""

    counts: Mapping[str, int]
    free: deque[str] = field(init=False)
    in_hand: dict[int, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)  # shard -> when to look again
    _lost: dict[str, int] = field(default_factory=dict)
    _in_a_row: int = 0

    def __post_init__(self) -> None:
        self.free = deque(self.counts)

    @property
    def left(self) -> int:
        """Count the shards that are not done."""
        return len(self.free) + len(self.in_hand) + len(self.held)

    def take(self, worker: int, now: float) -> str | None:
        """Give a worker a shard; None where none is free now."""
        due = next((name for name, at in self.held.items() if at <= now), None)
        if not self.free and due is None:
            return None
        if self.free:
            name = self.free.popleft()
        else:
            assert due is not None
            name = due
            del self.held[name]
        self.in_hand[worker] = name
        return name

    def done(self, worker: int) -> str:
        """Take note that a worker's shard is complete; returns its name."""
        self._in_a_row = 0
        return self.in_hand.pop(worker)

    def put_off(self, worker: int, until: float) -> None:
        """Take note that another writer holds the lease of a worker's shard."""
        self.held[self.in_hand.pop(worker)] = until

    def lose(self, worker: int, where: str, why: str) -> str | None:
        """Take note that a worker is gone; returns the shard that it had in hand. Raises UserError
        where the shard, or the engine, loses one worker too many."""
        name = self.in_hand.pop(worker, None)
        self._in_a_row += 1
        if name is not None:
            self._lost[name] = self._lost.get(name, 0) + 1
            self.free.appendleft(name)
            if self._lost[name] >= MOST_LOST:
                raise UserError(
                    f"shard {name} has ended its actor {self._lost[name]} times, the last on "
                    f"{where}: {why}; what was complete is kept; see that node's memory and Ray's "
                    "logs, then run the same command again"
                )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{self._in_a_row} actors were lost in a row and no shard was finished, the last "
                f"on {where}: {why}; what was complete is kept; see Ray's logs, then run the same "
                "command again"
            )
        return name
