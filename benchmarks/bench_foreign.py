"""One row of a shard costs other people's libraries so many bytes and so much memory.

    python -m benchmarks.bench_foreign [--rows 1024] [--json FILE] [--node FOLDER]

A shard of 1,024 rows of 1.5 MB (5 levels, 197 tokens, 768 channels, fp16), in formats 3 and 4,
and as an archive. Every library opens `features` in a process of its own and reads one row: bytes
are what the process read meanwhile (rchar of /proc/self/io), memory is by how much its peak grew.
zarrita reads through HTTP ranges from a server here, which counts what it sends; in FOLDER
`npm install zarrita @petamoriken/float16` was run.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import command_options
from featcache.console.command import Command
from featcache.console.entry import entry
from featcache.console.option import HelpGroup, option
from featcache.errors import UserError
from featcache.storage.store import SHARDS, Array, ShardForm, get_store

ITEM = (5, 197, 768)
ROW_BYTES = 5 * 197 * 768 * 2
FORMS = {
    "format 3": ShardForm(3),
    "format 4": ShardForm(4),
    "archive": ShardForm(4, compression="blosc"),
}
READERS = {
    "zarr-python": "import zarr\na = zarr.open_array(path, mode='r')\nread = lambda: a[row, 0]",
    "zarrs": "import zarr, zarrs\n"
    "zarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})\n"
    "a = zarr.open_array(path, mode='r')\nread = lambda: a[row, 0]",
    "tensorstore": "import tensorstore as ts\n"
    "spec = {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': path}}\n"
    "a = ts.open(spec, read=True).result()\nread = lambda: a[row, 0].read().result()",
}
# The peak begins anew, so that what importing took is not counted.
MEASURED = """
import json, resource, sys
import numpy as np
path, row = sys.argv[1], int(sys.argv[2])
def rchar(): return int(open('/proc/self/io').read().split()[1])
def status(name):
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(name)) * 1024
{setup}
open('/proc/self/clear_refs', 'w').write('5')
bytes_before, memory_before = rchar(), status('VmRSS')
values = np.asarray(read())
print(json.dumps([rchar() - bytes_before, status('VmHWM') - memory_before,
                  values.view(np.uint16).reshape(-1)[:64].tolist(), values.shape]))
"""
ZARRITA = """
import {Float16Array} from '@petamoriken/float16';
globalThis.Float16Array ??= Float16Array;
const zarr = await import('zarrita');
const [url, row] = process.argv.slice(2);
const a = await zarr.open.v3(new zarr.FetchStore(url), {kind: 'array'});
const before = process.memoryUsage().rss;
const got = await zarr.get(a, [Number(row), 0, null, null, null]);
const words = new Uint16Array(got.data.buffer, got.data.byteOffset, 64);
console.log(JSON.stringify([0, process.memoryUsage().rss - before, [...words], got.shape]));
"""


@click.command(cls=Command)
@command_options.number("--rows", HelpGroup.INPUT, 1024, "Rows of the shard.", least=8)
@option(
    "--node",
    group=HelpGroup.INPUT,
    type=command_options.OldFolder(),
    help="Where zarrita was installed; read by it too.",
)
@command_options.folder
@command_options.json_file
def cli(rows: int, node: Path | None, folder: Path | None, json_path: Path | None) -> None:
    """Measure what one row of a shard costs other people's libraries, in bytes and memory."""
    found = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, form in FORMS.items():
            work = Path(temporary) / name.replace(" ", "")
            first = write_shard(work, form, rows)
            found += measure(work / f"{SHARDS}/000000.zarr", name, rows, first, node)
            shutil.rmtree(work)
    click.echo(f"one row of {ROW_BYTES / 1e6:.2f} MB, of a shard of {rows}")
    click.echo(f"{'shard':10}{'library':14}{'read, MB':>10}{'memory, MB':>12}")
    for each in found:
        read, memory = each["read_bytes"] / 1e6, each["memory_bytes"] / 1e6
        click.echo(f"{each['shard']:10}{each['library']:14}{read:10.2f}{memory:12.1f}")
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


def write_shard(folder: Path, form: ShardForm, rows: int) -> list[int]:
    """Write a shard of normal numbers; returns the first 64 of the row that is read, as bits."""
    names = ("row", "view", "level", "token", "channel")
    arrays = [Array("features", "<f2", ITEM, names, split=True)]
    (folder / SHARDS).mkdir(parents=True)
    writer = get_store("zarr").writer(folder, "000000", arrays, 1, form)
    block = np.random.default_rng(0).standard_normal((8, *ITEM)).astype("<f2")
    for low in range(0, rows, 8):
        block[:, 0, 0, 0] = np.arange(low, low + 8)
        writer.append([f"{i:06d}" for i in range(low, low + 8)], {"features": block})
    writer.finish([], {})
    row = _row(rows)
    wanted = block[row % 8].copy()
    wanted[0, 0, 0] = row
    bits: list[int] = wanted.view(np.uint16).reshape(-1)[:64].tolist()
    return bits


def _row(rows: int) -> int:
    return rows * 2 // 3


def measure(
    group: Path, shard: str, rows: int, first: list[int], node: Path | None
) -> list[dict[str, Any]]:
    found = []
    for library, setup in READERS.items():
        code = MEASURED.replace("{setup}", setup)
        words = [sys.executable, "-c", code, str(group / "features"), str(_row(rows))]
        found.append(_result(shard, library, _run(words), first))
    if node is not None:
        with serve(group.parent) as (url, sent):
            script = node / "read_row.mjs"
            script.write_text(ZARRITA)
            words = ["node", str(script), f"{url}/{group.name}/features", str(_row(rows))]
            result = _result(shard, "zarrita", _run(words, cwd=node), first)
            found.append({**result, "read_bytes": sum(sent)})
    return found


def _run(words: list[str], cwd: Path | None = None) -> list[Any]:
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{Path(words[0]).name} could not read the shard: {said}")
    found: list[Any] = json.loads(ran.stdout)
    return found


def _result(shard: str, library: str, ran: list[Any], first: list[int]) -> dict[str, Any]:
    read, memory, bits, shape = ran
    if (bits, shape) != (first, list(ITEM)):
        raise UserError(f"{library} read another row of {shard}")
    return {"shard": shard, "library": library, "read_bytes": read, "memory_bytes": memory}


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Serve a folder on this machine, with ranges; yields its address and the bytes of bodies."""
    sent: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = folder / self.path.lstrip("/")
            size = path.stat().st_size if path.is_file() else -1
            given = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if size < 0:
                self.send_response(404)
                low, high = 0, 0
            elif given:
                low, high = _span(given[1], given[2], size)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {low}-{high - 1}/{size}")
            else:
                low, high = 0, size
                self.send_response(200)
            self.send_header("Content-Length", str(high - low))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body and high > low:
                with path.open("rb") as file:
                    file.seek(low)
                    self.wfile.write(file.read(high - low))
                sent.append(high - low)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """The bytes of a range: first to last, from first on, or the last so many."""
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    entry(cli)
