"""A proxy on loopback that stands before an S3 server and makes faults as it is told to."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DELAY_S = 2.0
# (method, path, number of the request) -> what happens to it
Faults = Callable[[str, str, int], str]
KINDS = ("reset", "500", "503", "cut", "lost")
_BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultyProxy(ThreadingHTTPServer):
    """Hands requests on, but for those that `faults` names: `reset` breaks the connection before,
    `lost` after the server has done it, `cut` in the middle of the answer; `500` and `503` are
    answered here; `slow` takes two seconds more; `stale` is the list before. An empty text is no
    fault."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.faults: Faults = lambda method, path, number: ""
        self.made: Counter[str] = Counter()
        self.bytes_out = 0
        self.bytes_of: dict[str, list[int]] = {}  # path -> of each answer with a body
        self.lists: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self._lock, self._count = threading.Lock(), 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, method: str, path: str) -> str:
        with self._lock:
            self._count += 1
            fault = self.faults(method, path, self._count)
            self.made[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command, self.path)
        if fault == "reset":
            return self._reset()
        if fault in ("500", "503"):
            return self._answer(int(fault), [("Content-Type", "application/xml")], _BUSY)
        if fault == "slow":
            time.sleep(DELAY_S)
        is_list = self.command == "GET" and "list-type=2" in self.path
        if fault == "stale" and self.path in self.server.lists:
            return self._answer(*self.server.lists[self.path])
        status, headers, answer = self._ask(body)
        if is_list:
            self.server.lists.setdefault(self.path, (status, headers, answer))
        if fault == "lost":
            return self._reset()
        return self._answer(status, headers, answer, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            found = upstream.getresponse()
            kept = [
                (name, value)
                for name, value in found.getheaders()
                if name.lower() not in ("transfer-encoding", "connection", "content-length")
            ]
            if self.command == "HEAD":
                kept.append(("Content-Length", found.getheader("Content-Length") or "0"))
            return found.status, kept, found.read()
        finally:
            upstream.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD" or status in (204, 304):
            return
        if cut and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            return self._reset()
        self.server.bytes_out += len(body)
        self.server.bytes_of.setdefault(self.path, []).append(len(body))
        self.wfile.write(body)

    def _reset(self) -> None:
        """Break the connection, so that the client gets ECONNRESET."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextmanager
def before(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy before a server."""
    proxy = FaultyProxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


def now_and_then(seed: int, share: float, kinds: tuple[str, ...] = KINDS) -> Faults:
    """A share of all requests meets one of the faults, by the number of the request."""

    def faults(method: str, path: str, number: int) -> str:
        draw = random.Random(f"{seed} {number}")
        return draw.choice(kinds) if draw.random() < share else ""

    return faults
