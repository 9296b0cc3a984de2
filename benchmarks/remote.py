"""Reading a model from a server by ranges: the server's own rate, and a merge's, in turn.

    python benchmarks/remote.py --size 0.2b --repeat 3

The server answers as S3 does to GET with ranges and ETags, and sends files from the page cache
(sendfile), in a process of its own: moto copies the whole object for each range. Its rate is that
of obstore fetching every 8 MiB range of one model, 32 at a time, into memory; the merge is a copy
(passthrough) of that model as a whole process, writes and start included. Bar: 0.7 of the rate.
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
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, write_set
from merge_model import bytes_of, settle
from process import measure

_RAW = """
import sys, time, obstore
from concurrent.futures import ThreadPoolExecutor
store, size, step = obstore.store.from_url("s3://models/base"), int(sys.argv[1]), 8 << 20
def fetch(at):
    got = obstore.get_range(store, "model.safetensors", start=at, end=min(size, at + step))
    return len(bytes(got))
began = time.perf_counter()
with ThreadPoolExecutor(32) as pool:
    assert sum(pool.map(fetch, range(0, size, step))) == size
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


def serve(root: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = root
    print(server.server_port, flush=True)
    server.serve_forever()


def bench(folder: Path, size: str, repeat: int) -> dict[str, Any]:
    model = write_set(folder, size, 1)[0]
    out = folder / "out"
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", folder], stdout=subprocess.PIPE, text=True
    )
    environment = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{child.stdout.readline().strip()}",
    }
    nbytes = (model / "model.safetensors").stat().st_size
    merge = [Path(sys.executable).with_name("fastmerge"), "average", "s3://models/base"]
    raw, merged = [], []
    try:
        for _ in range(repeat):
            settle([model], [out])
            command = [sys.executable, "-c", _RAW, str(nbytes)]
            raw.append(float(measure(command, environment).stdout))
            settle([model], [out])
            merged.append(measure([*merge, "-o", out, "-q"], environment))
    finally:
        child.terminate()
        child.wait()
    settle([], [out])
    return {
        "bytes": bytes_of(model),
        "server_gb_per_second": statistics.median(nbytes / 1e9 / s for s in raw),
        "merge_gb_per_second": statistics.median(nbytes / 1e9 / m.seconds for m in merged),
        "share": statistics.median(s / m.seconds for s, m in zip(raw, merged, strict=True)),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in merged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="0.2b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the model is, or is made and kept")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    with tempfile.TemporaryDirectory(prefix="remote-") as made:
        found = bench(options.folder or Path(made), options.size, options.repeat)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
