"""One client for object stores: obstore's, with our own bounded retries, which are told.

obstore finds credentials by itself, as each store's own tools do: environment, profile, instance or
workload role. Only public addresses and file names are ever printed.

Conditional writes make the rest safe: `create` puts an object only where there is none, `swap` only
where it still has the ETag that was seen. An ETag may be a checksum of the bytes, so whoever swaps
must never write the same bytes twice.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from featcache.errors import UserError, one_line
from featcache.objects.failures import NO_BUCKET, failure, read_answer
from featcache.objects.parallel import in_parallel
from featcache.objects.url import ObjectUrl

if TYPE_CHECKING:
    import obstore.store

INSTALL = "pip install 'featcache[remote]'"
VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}
TRIES = 6
FIRST_WAIT_S, MOST_WAIT_S = 0.5, 8.0
TIMEOUT_S = 30.0  # of one request
MOST_S = 55.0  # from the first failure to the last try: a store that stays down ends in a minute
PART_BYTES = 8 << 20  # of a multipart upload
_PARTS_AT_ONCE = 4  # of one file
_RANGES_AT_ONCE = 16
_MOST_DELETED = 1000  # objects by one request
PIECE_BYTES = 4 << 20  # of a download
_DOWNLOAD_BYTES = 2 * PIECE_BYTES  # in flight, and in memory
COALESCE_BYTES = 256 << 10  # what is read between two ranges costs less than another request
Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)


class Facts(NamedTuple):
    """Says of an object what a listing does."""

    path: str  # in its bucket
    bytes: int
    e_tag: str
    modified: float  # unix seconds, by the store's clock
    version: str | None = None  # by which Google's store knows it

    @property
    def tag(self) -> Tag:
        return Tag(self.e_tag, self.version)


class Tag(NamedTuple):
    """Names what an object holds, for a write that is made only while it still does."""

    e_tag: str
    version: str | None = None


@dataclass
class Client:
    """Makes requests of one bucket; safe in several threads. Tries that failed are told."""

    url: ObjectUrl
    store: obstore.store.ObjectStore
    sleep: Callable[[float], None] = time.sleep

    # ---- reading

    def read(self, path: str) -> bytes:
        """Return a whole object's bytes; FileNotFoundError where there is none."""
        import obstore

        return self._tried("read", path, lambda: bytes(obstore.get(self.store, path).bytes()))

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        lengths: Sequence[int],
        coalesce: int = COALESCE_BYTES,
    ) -> list[Any]:
        """Return the bytes of each range as a buffer, fetched at once; what lies closer than
        `coalesce` bytes by one request. Where one of the requests fails, ranges are fetched one by
        one, and those that came are kept: many that must all succeed would need many tries.
        UserError where an object is shorter than a range asks for."""
        import obstore
        from obstore.exceptions import BaseError

        found: list[Any] = []
        failed: list[Exception] = []

        def one(i: int) -> None:
            try:
                found[i] = obstore.get_range(self.store, path, start=starts[i], length=lengths[i])
            except (BaseError, PermissionError, OSError) as error:
                failed.append(error)

        def lacking() -> list[Any]:
            if not found:  # the first try
                found.extend([None] * len(starts))
                found[:] = obstore.get_ranges(
                    self.store, path, starts=starts, lengths=lengths, coalesce=coalesce
                )
                return found
            failed.clear()
            in_parallel(one, [i for i, data in enumerate(found) if data is None], _RANGES_AT_ONCE)
            if failed:
                raise failed[0]
            return found

        self._tried("read", path, lacking)
        for start, length, data in zip(starts, lengths, found, strict=True):
            if len(data) != length:
                raise UserError(
                    f"{self.place(path)} ends before byte {start + length}; run `featcache verify`"
                )
        return found

    def read_range(self, path: str, start: int, length: int, e_tag: str) -> bytes:
        """Return the bytes of a range of an object that still has this ETag; UserError where it
        has changed, or ends before it."""
        import obstore
        from obstore.exceptions import PreconditionError

        options: Any = {"range": (start, start + length), "if_match": e_tag or None}
        try:
            data = self._tried(
                "read",
                path,
                lambda: bytes(obstore.get(self.store, path, options=options).bytes()),
            )
        except FileNotFoundError as error:
            raise UserError(f"{self.place(path)} is gone; run the same command again") from error
        except UserError as error:
            if isinstance(error.__cause__, PreconditionError):
                raise UserError(
                    f"{self.place(path)} was changed while it was read; run the same command again"
                ) from error
            raise
        if len(data) != length:
            raise UserError(f"{self.place(path)} ends before byte {start + length}")
        return data

    def download(self, path: str, file: Path, count: int) -> None:
        """Write an object of so many bytes to a file, several pieces at once; UserError where it
        has other bytes."""
        with file.open("wb") as out:
            for low in range(0, count, _DOWNLOAD_BYTES):
                span = range(low, min(low + _DOWNLOAD_BYTES, count), PIECE_BYTES)
                lengths = [min(PIECE_BYTES, count - start) for start in span]
                for piece in self.read_ranges(path, list(span), lengths, coalesce=0):
                    out.write(piece)

    def facts(self, path: str) -> Facts | None:
        """Return what is known of an object; None where there is none."""
        import obstore

        try:
            return _facts(self._tried("look at", path, lambda: obstore.head(self.store, path)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Facts]:
        """Yield what lies below a prefix, in the order of names."""
        import obstore

        def all_of() -> list[Any]:
            return [each for page in obstore.list(self.store, prefix or None) for each in page]

        yield from map(_facts, self._tried("list", prefix, all_of))

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the prefixes one level below a prefix that ends with a slash, or is empty."""
        import obstore

        found = self._tried(
            "list", prefix, lambda: obstore.list_with_delimiter(self.store, prefix or None)
        )
        yield from sorted(found["common_prefixes"])

    # ---- writing

    def put(self, path: str, data: bytes | Path) -> str:
        """Write an object, a large one in parts; returns its ETag."""
        import obstore

        def write() -> str:
            done = obstore.put(
                self.store, path, data, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )
            return done["e_tag"] or ""

        return self._tried("write", path, write)

    def create(self, path: str, data: bytes) -> Tag | None:
        """Write an object where there is none; returns its tag, None where somebody was faster."""
        return self._conditional(path, data, "create")

    def swap(self, path: str, data: bytes, tag: Tag) -> Tag | None:
        """Write an object where it still has this tag; returns its new one, None where it has
        changed or is gone."""
        version = {} if tag.version is None else {"version": tag.version}
        return self._conditional(path, data, {"e_tag": tag.e_tag, **version})

    def _conditional(self, path: str, data: bytes, mode: Any) -> Tag | None:
        """Write under a condition. A try whose answer was lost may have written all the same: the
        object then holds these very bytes, which no other writer makes."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        tries = 0

        def write() -> Tag | None:
            nonlocal tries
            tries += 1
            try:
                done = obstore.put(self.store, path, data, mode=mode, use_multipart=False)
                return Tag(done["e_tag"] or "", done["version"])
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return self._own(path, data) if tries > 1 else None

        return self._tried("write", path, write)

    def _own(self, path: str, data: bytes) -> Tag | None:
        facts = self.facts(path)
        return facts.tag if facts is not None and self.read(path) == data else None

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects; what is gone already is no error."""
        import obstore

        for low in range(0, len(paths), _MOST_DELETED):
            group = list(paths[low : low + _MOST_DELETED])
            try:
                self._tried("remove", group[0], partial(obstore.delete, self.store, group))
            except FileNotFoundError:  # not all stores pass over what is gone
                if len(group) > 1:
                    for path in group:
                        self.delete([path])

    # ---- trying

    def _tried(self, doing: str, path: str, request: Callable[[], Result]) -> Result:
        """Make a request until it succeeds, fails for good, or has had its tries or its time."""
        from obstore.exceptions import BaseError

        _check_not_forked(self.place(path))
        end, wait = None, FIRST_WAIT_S
        for tried in range(1, TRIES + 1):
            began = time.monotonic()
            try:
                return request()
            except FileNotFoundError as error:
                if read_answer(error).code in NO_BUCKET:
                    raise failure(self.place(path), doing, error) from error
                raise FileNotFoundError(str(self.place(path))) from error
            except (BaseError, PermissionError, OSError) as error:
                answer, now = read_answer(error), time.monotonic()
                # of a large file that failed at its end, this failure is the first
                end = end or MOST_S + (began if now - began <= TIMEOUT_S else now)
                pause = wait * random.uniform(0.75, 1.25)
                if not answer.again or tried == TRIES or now + pause >= end:
                    raise failure(self.place(path), doing, error) from error
                _LOG.warning("retrying: %s, %d of %d (%s)", answer, tried, TRIES, self.place(path))
            self.sleep(pause)
            wait = min(2.5 * wait, MOST_WAIT_S)
        raise AssertionError  # the last try returns or raises

    def place(self, path: str) -> ObjectUrl:
        """Return the URL of an object."""
        return ObjectUrl(self.url.scheme, self.url.bucket, path)


def _facts(about: Any) -> Facts:
    modified = about["last_modified"].timestamp()
    return Facts(about["path"], about["size"], about["e_tag"] or "", modified, about["version"])


@lru_cache(64)
def _store(
    scheme: str, bucket: str, variables: tuple[tuple[str, str], ...], pid: int
) -> obstore.store.ObjectStore:
    """Make obstore's own client of a bucket: one a process, since a fork shares no connection, and
    another where the environment says something else."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(f"{scheme}://{bucket}: object stores need obstore: {INSTALL}") from error
    timeout = timedelta(seconds=TIMEOUT_S)
    options: Any = {"timeout": timeout, "connect_timeout": timedelta(seconds=10)}
    given = dict(variables)
    endpoint = given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL") or ""
    if endpoint.startswith("http://"):
        options["allow_http"] = True  # as the address says
    own: Any = {}
    if scheme == "s3" and wants_profile(given):
        own = _from_profile(f"{scheme}://{bucket}")
    try:
        return from_url(
            f"{scheme}://{bucket}", client_options=options,
            retry_config={"max_retries": 0, "retry_timeout": timeout}, **own,
        )  # fmt: skip
    except (BaseError, ValueError) as error:
        why = one_line(str(error).partition("\n")[0])[:200]
        raise UserError(
            f"{scheme}://{bucket}: {why}; set the variables that its own tools read: "
            f"{VARIABLES[scheme]}"
        ) from error


def wants_profile(variables: Mapping[str, str]) -> bool:
    """Return whether credentials are those of a profile in the files of AWS's own tools: one is
    named, or there are such files, and no keys in the environment."""
    if variables.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return False
    if variables.get("AWS_PROFILE"):
        return True
    if "AWS_ACCESS_KEY_ID" in variables or "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" in variables:
        return False
    file = variables.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    return Path(file).expanduser().is_file()


def _from_profile(where: str) -> dict[str, Any]:
    """Return the options of a client that asks boto3 for its credentials, which are renewed."""
    try:
        from boto3.session import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UserError(f"{where}: profiles of AWS need boto3: {INSTALL}") from error
    try:
        session = Session()
        return {
            "credential_provider": Boto3CredentialProvider(session),
            **({"region": session.region_name} if session.region_name else {}),
        }
    except (BotoCoreError, ValueError) as error:
        raise UserError(
            f"{where}: {error}; set AWS_PROFILE to one that `aws configure list-profiles` shows"
        ) from error


_users: list[int] = []  # the process that made the first client, and those it was forked into


def _check_not_forked(url: ObjectUrl) -> None:
    """Raise UserError in a process that was forked from one that has made requests: obstore's
    threads are not in it, and a request would wait for ever."""
    if not _users:
        _users.append(os.getpid())
    if _users[0] != os.getpid():
        raise UserError(
            f"{url}: this process was forked from one that reads an object store, and its "
            "connections do not survive that; start it anew, as a DataLoader does with "
            "multiprocessing_context='spawn'"
        )


_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")


def client(url: ObjectUrl) -> Client:
    """Return the client of a URL's bucket. Raises UserError without the extra, with its line."""
    _check_not_forked(url)
    variables = tuple(sorted(each for each in os.environ.items() if each[0].startswith(_PREFIXES)))
    return Client(url, _store(url.scheme, url.bucket, variables, os.getpid()))
