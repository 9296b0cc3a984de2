"""One object of more than 5 GB, to an S3 server and from it: the bytes, and the memory it takes.

    AWS_ENDPOINT_URL=http://localhost:4568 AWS_ALLOW_HTTP=true AWS_ACCESS_KEY_ID=... \\
    AWS_SECRET_ACCESS_KEY=... python benchmarks/large_object.py s3://bucket/prefix --record

5 GB is what S3 takes in one piece. Two models of 2.9 B parameters, holes with a MiB of numbers in
every 16, are merged to one file of 5.7 GB: here, and to the URL, whose object is then read back
without fastmerge. A merge of that object, by ranges, is compared with one of the file (the tensors:
headers name what was merged). The disk needs 25 GB, the server's 12 beside them. What is below the
URL is removed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import obstore
from record import record

from fastmerge.bench.checkpoints import SHAPES, Shape, write_set
from fastmerge.bench.process import Usage, measure

SHAPES |= {"2.9b": Shape(2560, 34, 6912, 20, 20)}
SINGLE = "model.safetensors"
HEAD = (
    "| merge | GB in the object | seconds | CPU seconds | peak anonymous MiB | "
    "sha256, beside one without a store |"
)


def filled(models: Iterable[Path]) -> None:
    """Numbers in a sixteenth of the weights."""
    for seed, model in enumerate(models):
        rng = np.random.default_rng(seed)
        for path in model.glob("*.safetensors"):
            with path.open("r+b") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                for place in range(begin, path.stat().st_size - (1 << 20), 1 << 24):
                    numbers = rng.standard_normal(1 << 19, dtype=np.float32)
                    file.seek(place)
                    file.write((numbers.view(np.uint32) >> 16).astype(np.uint16))


def merged(folder: Path, models: list[str], out: str) -> Usage:
    recipe = folder / "recipe.json"
    listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": listed}))
    words = [sys.executable, "-m", "fastmerge", "merge", recipe, out, "--max-shard-size", "8GB"]
    return measure([*words, "-q"], folder=folder)


def digest(pieces: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def of_file(path: Path, *, header: bool = True) -> str:
    """Without the header, which names what was merged, of the tensors alone."""
    with path.open("rb") as file:
        file.seek(0 if header else 8 + int.from_bytes(file.read(8), "little"))
        return digest(iter(lambda: file.read(1 << 24), b""))


def rows_of(url: str, folder: Path) -> list[list[float | str]]:
    models = write_set(folder, "2.9b", 2, sparse=True)
    filled(models)
    plain = folder / "plain"
    merged(folder, [str(model) for model in models], str(plain))
    to = merged(folder, [str(model) for model in models], url)
    options = {"timeout": "1h", "allow_http": os.environ.get("AWS_ALLOW_HTTP", "false")}
    store = obstore.store.from_url(url, client_options=options)
    nbytes = obstore.head(store, SINGLE)["size"]
    there = digest(bytes(piece) for piece in obstore.get(store, SINGLE).stream(1 << 24))
    same = {"to": there == of_file(plain / SINGLE)}
    merged(folder, [str(plain), str(models[1])], "again")
    wanted = of_file(folder / "again" / SINGLE, header=False)
    for done in (plain, folder / "again"):
        shutil.rmtree(done)
    back = merged(folder, [url, str(models[1])], "from")
    same["from"] = of_file(folder / "from" / SINGLE, header=False) == wanted
    for batch in obstore.list(store):
        obstore.delete(store, [entry["path"] for entry in batch])
    return [
        [
            what, round(nbytes / 1e9, 2), round(run.seconds, 1), round(run.cpu_seconds, 1),
            run.peak_anonymous_bytes >> 20, "equal" if same[key] else "OTHER",
        ]
        for what, key, run in (
            ("to the store", "to", to), ("of it and a folder, by ranges", "from", back)
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", help="where nothing is yet")
    parser.add_argument("--server", default="not named", help="its name and version")
    parser.add_argument("--folder", type=Path, help="whose disk is used")
    parser.add_argument("--record", action="store_true", help="into results/large_object.*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-", dir=options.folder) as made:
        rows = rows_of(options.url, Path(made))
    for row in rows:
        print(*row)
    if options.record:
        record(
            "large_object", "One object of more than 5 GB, to an S3 server and from it", HEAD, rows,
            {"server": options.server, "merge": "linear of two, bf16, 15 of 16 MiB holes"},
        )  # fmt: skip


if __name__ == "__main__":
    main()
