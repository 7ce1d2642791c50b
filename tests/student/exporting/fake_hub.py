"""A server on this machine's loopback answers the few calls of an upload as the hub does, keeps
what it was sent, and refuses where it is told to."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"


class Hub(ThreadingHTTPServer):
    """Holds repositories: what they were made as, and their files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.made: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.status = 0  # of every answer, where it is not 0
        self.fails_at = ""  # the path whose answer has the status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "nothing here"}, self.server.status or 404)

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        if hub.status and hub.fails_at in self.path:
            self._answer({"error": f"evil\x1b[31m {self.headers['Authorization']}"}, hub.status)
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "who?"}, 401)
        else:
            self._answer(self._reply(self.path.partition("?")[0], body))

    def _reply(self, path: str, body: bytes) -> Any:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.made[name] = asked
            return {"url": f"{hub.url}/{name}"}
        if "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            return {"files": [self._mode(name) for name in names]}
        if path.endswith("/info/lfs/objects/batch"):
            return {"objects": [self._lfs(each) for each in json.loads(body)["objects"]]}
        if "/commit/" in path:
            return self._commit([json.loads(line) for line in body.splitlines()])
        return {}  # /api/validate-yaml

    def _mode(self, name: str) -> dict[str, Any]:
        large = name.endswith((".safetensors", ".onnx"))
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _lfs(self, each: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/blob/{each['oid']}"}
        return {**each, "actions": {"upload": upload}}

    def _commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                self.server.commits.append(value["summary"])
        where = f"{self.server.url}/me/model/commit/{'0' * 40}"
        return {"commitUrl": where, "commitOid": "0" * 40}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
