"""Reading a model from a server by ranges: the server's own rate, and a merge's, in turn.

    python benchmarks/remote.py --size 0.2b --repeat 3

The server answers as S3 does to GET with ranges and ETags, and sends files from the page cache
(sendfile), in a process of its own: moto copies the whole object for each range. Its rate is that
of obstore fetching every 8 MiB range of the models, 32 at a time, into memory. The merge is their
average as a whole process, writes included; what a plan of the same takes (start, headers) is
taken off, and given apart. ``--wait 20``: every answer begins 20 ms late, as a store's does.
``--before``: another fastmerge's command, measured in turn. Bar: 0.7 of the rate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastmerge.bench.checkpoints import SHAPES, write_set
from fastmerge.bench.pagecache import bytes_of, settle
from fastmerge.bench.process import measure

_RAW = """
import sys, time, obstore
from concurrent.futures import ThreadPoolExecutor
store, size, step = obstore.store.from_url("s3://models"), int(sys.argv[1]), 8 << 20
def fetch(place):
    name, at = place
    path = name + "/model.safetensors"
    return len(obstore.get_range(store, path, start=at, end=min(size, at + step)))
places = [(name, at) for name in sys.argv[2:] for at in range(0, size, step)]
began = time.perf_counter()
with ThreadPoolExecutor(32) as pool:
    assert sum(pool.map(fetch, places)) == size * len(sys.argv[2:])
print(time.perf_counter() - began)
"""


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files below the folder that is ``server.root``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.server.root / self.path.split("?")[0].removeprefix("/models/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        time.sleep(self.server.wait)
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
        begin, end = (int(asked[1]), min(size, int(asked[2]) + 1)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("content-range", f"bytes {begin}-{end - 1}/{size}")
        self.send_header("content-length", str(end - begin))
        self.send_header("etag", f'"{hashlib.md5(str(path).encode()).hexdigest()}"')
        self.send_header("last-modified", formatdate(path.stat().st_mtime, usegmt=True))
        self.end_headers()
        self.wfile.flush()
        if self.command == "GET":
            with path.open("rb") as file:
                while begin < end:
                    begin += os.sendfile(
                        self.connection.fileno(), file.fileno(), begin, end - begin
                    )

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def serve(root: Path, wait: float) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.wait = root, wait
    print(server.server_port, flush=True)
    server.serve_forever()


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    models = write_set(folder, options.size, options.models)
    out = folder / "out"
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", folder, "--wait", str(options.wait)],
        stdout=subprocess.PIPE,
        text=True,
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{child.stdout.readline().strip()}",
    }
    size = (models[0] / "model.safetensors").stat().st_size
    nbytes = size * len(models)
    urls = [f"s3://models/{model.name}" for model in models]
    recipe = folder / "remote.yaml"
    each = [{"model": url, "parameters": {"weight": 1}} for url in urls]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": each}))
    commands = {"now": [Path(sys.executable).with_name("fastmerge")]}
    if options.before:
        commands["before"] = [options.before]
    raw: list[float] = []
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
    try:
        for _ in range(options.repeat):
            settle(models, [out])
            command = [sys.executable, "-c", _RAW, str(size), *[model.name for model in models]]
            raw.append(float(measure(command, environment).stdout))
            for name, program in commands.items():
                settle(models, [out])
                planned = measure([*program, "plan", recipe], environment).seconds
                done = measure([*program, "merge", recipe, out, "-q"], environment)
                runs[name].append((planned, done.seconds - planned, done.peak_anonymous_bytes))
    finally:
        child.terminate()
        child.wait()
    settle([], [out])
    found: dict[str, Any] = {
        "bytes": sum(map(bytes_of, models)),
        "wait_ms": options.wait,
        "server_gb_per_second": statistics.median(nbytes / 1e9 / s for s in raw),
    }
    for name, own in runs.items():
        shares = [s / seconds for s, (_, seconds, _) in zip(raw, own, strict=True)]
        found[name] = {
            "plan_seconds": statistics.median(planned for planned, _, _ in own),
            "gb_per_second": statistics.median(nbytes / 1e9 / seconds for _, seconds, _ in own),
            "share": statistics.median(shares),
            "every_share": [round(share, 3) for share in shares],
            "peak_anonymous_bytes": max(peak for _, _, peak in own),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="0.2b")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0.0, metavar="MS")
    parser.add_argument("--before", type=Path, help="the fastmerge of another tree")
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and kept")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.wait / 1000)
    with tempfile.TemporaryDirectory(prefix="remote-") as made:
        found = bench(options.folder or Path(made), options)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
