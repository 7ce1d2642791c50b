"""A lease on a shard in an object store is an object: created by whoever is first, renewed and
taken over by compare-and-swap on its ETag.

Clocks of machines are not compared: a lease is stale once this process has seen the same ETag for
`stale_s`, or its holder was a process of this machine that has ended. Two that take over at once
cannot both succeed, and a holder that lost its lease is told so at its next renewal.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from featcache.errors import UserError
from featcache.objects.client import Client, Tag
from featcache.storage.owner import is_alive, is_here

_MOST_BYTES = 1024  # of a lease of ours
_LOG = logging.getLogger(__name__)


@dataclass
class ObjectLease:
    """Holds the lease `name` until `release`."""

    requests: Client
    name: str
    owner: str
    tag: Tag
    lost: bool = False
    _renewals: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def renew(self) -> None:
        """Show that the holder is alive; where somebody took over, the lease is lost. A renewal
        that fails is told, and tried again at the next."""
        with self._lock:
            if self.lost:
                return
            self._renewals += 1
            try:
                tag = self.requests.swap(self.name, _body(self.owner, self._renewals), self.tag)
                tag = tag or self._own()
            except FileNotFoundError:  # removed in this moment
                tag = None
            except UserError as error:
                _LOG.warning("%s", error)
                return
            self.tag, self.lost = tag or self.tag, tag is None

    def _own(self) -> Tag | None:
        """Return the tag of a renewal that was made although its answer never came."""
        facts = self.requests.facts(self.name)
        if facts is None or facts.bytes > _MOST_BYTES:
            return None
        found = self.requests.read(self.name).decode(errors="replace")
        return facts.tag if found.startswith(f"{self.owner} ") else None

    def release(self) -> None:
        """Give the lease back, unless somebody took over."""
        with self._lock:
            facts = None if self.lost else self.requests.facts(self.name)
            if facts is not None and facts.e_tag == self.tag.e_tag:
                self.requests.delete([self.name])
            self.lost = True


@dataclass
class LeaseTable:
    """Takes leases, and remembers since when those of others have not changed."""

    requests: Client
    stale_s: float
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    _is_tried: bool = False

    def acquire(self, name: str, owner: str) -> ObjectLease | None:
        """Take a lease; None while somebody else holds it."""
        tag = self.requests.create(name, _body(owner, 0))
        if tag is None:
            return self._take_over(name, owner)
        lease = self._held(name, owner, tag)
        if not self._is_tried:
            self._try_out(lease)
        return lease

    def clear(self, name: str, owner: str) -> None:
        """Remove a lease whose holder is gone."""
        if (lease := self._take_over(name, owner)) is not None:
            lease.release()

    def take_from(self, name: str, tag: Tag, owner: str) -> ObjectLease | None:
        """Take over a lease that is known to be dead, unless it has changed since."""
        taken = self.requests.swap(name, _body(owner, 0), tag)
        return None if taken is None else self._held(name, owner, taken)

    def _take_over(self, name: str, owner: str) -> ObjectLease | None:
        there = self._stale(name)
        tag = self.requests.swap(name, _body(owner, 0), there) if there else None
        return None if tag is None else self._held(name, owner, tag)

    def _held(self, name: str, owner: str, tag: Tag) -> ObjectLease:
        self._seen.pop(name, None)
        return ObjectLease(self.requests, name, owner, tag)

    def _try_out(self, lease: ObjectLease) -> None:
        """Raise UserError where the object store writes all the same what is there already: then
        two processes would hold each lease."""
        if self.requests.create(lease.name, _body(lease.owner, -1)) is not None:
            self.requests.delete([lease.name])
            raise UserError(
                f"{self.requests.place(lease.name)}: this object store does not honour "
                "If-None-Match, so that writers of one cache would not know of each other; take "
                "one that does, or extract to a disk and use `featcache push`"
            )
        self._is_tried = True

    def _stale(self, name: str) -> Tag | None:
        """Return the tag of a lease whose holder is gone; None of one that is held, or was released
        in this moment."""
        facts, now = self.requests.facts(name), time.monotonic()
        if facts is None:
            return None
        if facts.bytes > _MOST_BYTES:
            raise UserError(
                f"{self.requests.place(name)} has {facts.bytes} bytes, and is no lease; remove it "
                "and run the same command again"
            )
        known, since = self._seen.get(name, ("", now))
        if known != facts.e_tag:
            self._seen[name] = (facts.e_tag, now)
            return facts.tag if self._is_dead(name) else None
        return facts.tag if now - since >= self.stale_s else None

    def _is_dead(self, name: str) -> bool:
        """Return whether the holder was a process of this machine, and has ended."""
        try:
            owner = self.requests.read(name).decode(errors="replace").partition(" ")[0]
        except FileNotFoundError:
            return False
        return is_here(owner) and not is_alive(owner)


def _body(owner: str, renewals: int) -> bytes:
    """Write a lease: other bytes each time, since an ETag may be a checksum of them."""
    return f"{owner} {renewals}".encode()
