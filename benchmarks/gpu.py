"""The GPU kernels on this machine: builds, tests, measures; one JSON and one plot in results/.

    python benchmarks/gpu.py                # a CUDA machine with torch, triton and a C++ compiler
    python benchmarks/gpu.py --rehearse     # the same steps, tiny, in Triton's interpreter on a CPU

Under 8 minutes. Rates count every byte read and written once; the yardsticks (device-to-device
copy, pinned copies) are measured in the same run. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 480  # the tests, 3 minutes and more of compiling, come last and get what is left
BEGAN = float(os.environ.get("FASTMERGE_GPU_BEGAN", time.time()))

# Goals on an H200: row, column, bound.
GOALS = {
    "combine 2": ("of copy", 0.9, ">="),
    "combine 3": ("of copy", 0.9, ">="),
    "gram 2": ("of copy", 0.9, ">="),
    "slerp model": ("seconds", 0.020, "<="),
    "ties model": ("seconds", 0.060, "<="),
    "ties model ": ("times mergekit", 100.0, ">="),
    "stream slerp": ("of pinned copy", 0.8, ">="),
}


def left() -> float:
    """Seconds until the limit."""
    return LIMIT_SECONDS - (time.time() - BEGAN)


# --- build ----------------------------------------------------------------------------------------


def works(environment: dict[str, str]) -> bool:
    """Whether fastmerge, its extension and its kernels of this checkout can be imported."""
    code = "import fastmerge, fastmerge._C, fastmerge.kernels as k; print(fastmerge.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    return done.returncode == 0 and str(ROOT) in done.stdout


def build() -> dict[str, str]:
    """Builds the package the usual way, else by hand; returns the environment to import it in."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if works(environment):
        return environment
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e"]
    done = subprocess.run([*pip, str(ROOT)], capture_output=True, text=True, check=False)
    if done.returncode == 0 and works(environment):
        return environment
    print("pip could not install it; compiling by hand")
    environment["PYTHONPATH"] = str(build_by_hand())
    if not works(environment):
        sys.exit("gpu.py: the extension was compiled but does not import; see above")
    return environment


def build_by_hand() -> Path:
    """An import folder with links to the sources and the extension, by one compiler call."""
    import torch

    home = ROOT / "build" / "gpu"
    package = home / "fastmerge"
    package.mkdir(parents=True, exist_ok=True)
    for item in [*(ROOT / "fastmerge").iterdir(), ROOT / "kernels"]:
        link = package / item.name
        if not link.exists() and not item.name.startswith(("_C.c", "__pycache__")):
            link.symlink_to(item)
    information = home / "fastmerge-0.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: fastmerge\nVersion: 0\n")
    try:
        import pybind11

        headers = pybind11.get_include()
    except ImportError:  # torch brings a copy
        headers = str(Path(torch.__file__).parent / "include")
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{headers}", f"-I{sysconfig.get_paths()['include']}"]
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    objects = [home / f"{number}.o" for number in range(len(sources))]

    def compile_one(source: Path, made: Path) -> None:
        command = ["c++", *flags, *includes, "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, sources, objects))
    subprocess.run(
        ["c++", "-shared", "-pthread", *map(str, objects), "-o", str(target)], check=True
    )
    return home


def run_tests(*, rehearse: bool) -> dict[str, Any]:
    """The whole GPU test suite: its last line, and whether it passed."""
    files = ["triton_cases.py", "triton_resident_cases.py", "triton_stream_cases.py"]
    environment = dict(os.environ)
    if not find_spec("pytest"):
        tools = ROOT / "build" / "gpu-tools"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), "pytest"]
        if subprocess.run(pip, capture_output=True, check=False).returncode:
            return {"passed": False, "line": "not run: pytest is missing and cannot be installed"}
        environment["PYTHONPATH"] = f"{tools}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / name) for name in files]
    command += ["-k", "refuse"] if rehearse else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment,
            timeout=max(left() - 5, 30),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"passed": False, "line": f"out of time; so far: {said.strip()[-300:]}"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print("\n".join(lines[-60:]), done.stderr[-2000:])
    line = lines[-1] if lines else done.stderr.strip()[-200:]
    return {"passed": done.returncode == 0, "line": line}


# --- measure --------------------------------------------------------------------------------------


class Bench:
    """Timing and data on one device."""

    def __init__(self, *, rehearse: bool) -> None:
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.copy_rate = 1.0
        self.results: dict[str, dict[str, Any]] = {}

    def seconds(
        self,
        work: Callable[[], object],
        repeat: int = 15,
        before: Callable[[], object] = lambda: None,
    ) -> float:
        """The median of ``repeat`` runs after two to warm up, each waited for; ``before`` each,
        untimed. What takes seconds is run less often, what takes a minute once.
        """
        times: list[float] = []
        for number in range((1 if self.rehearse else repeat) + 2):
            before()
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
            if (number >= 2 and sum(times) > 8) or sum(times) > 30 or left() < 30:
                break
        return statistics.median(times[2:] or times[-1:])

    def wait(self) -> None:
        if not self.rehearse:
            self.torch.cuda.synchronize()

    def record(
        self,
        name: str,
        moved: int,
        work: Callable[[], object],
        *,
        before: Callable[[], object] = lambda: None,
        **peers: Callable[[], object],
    ) -> None:
        """One row: our time, its rate, its share of a copy's rate; each peer's time and ratio."""
        seconds = self.seconds(work, before=before)
        rate = moved / seconds / 1e9
        row: dict[str, Any] = {"seconds": seconds, "GB/s": rate, "of copy": rate / self.copy_rate}
        for peer, function in peers.items():
            if left() < 60:
                row[peer] = "not run: out of time"
                continue
            try:
                row[peer] = self.seconds(function, 5)
                row[f"times {peer}"] = row[peer] / seconds
            except Exception as error:  # noqa: BLE001  a peer that fails is a result, not an end
                row[peer] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        self.results[name] = row
        print(f"{name:24} {seconds * 1e3:10.3f} ms {rate:9.1f} GB/s  {rate / self.copy_rate:5.2f}")

    def empty(self) -> None:
        """Gives back what torch keeps, so that what is free can be asked for."""
        if not self.rehearse:
            self.torch.cuda.empty_cache()

    def normal(self, shape: Sequence[int], scale: float, seed: int) -> Any:
        generator = self.torch.Generator(self.device).manual_seed(seed)
        x = self.torch.randn(
            *shape, generator=generator, device=self.device, dtype=self.torch.float32
        )
        return x.mul_(scale).to(self.torch.bfloat16)

    def tune(self, base: Any, seed: int) -> Any:
        """base + noise, stored in bf16: deltas tie as those of published fine-tunes do."""
        noise = self.normal(base.shape, 1e-3, seed).float()
        return (base.float() + noise).to(self.torch.bfloat16)


def yardsticks(bench: Bench) -> None:
    torch = bench.torch
    count = 1 << 12 if bench.rehearse else 1 << 30
    a = torch.zeros(count, dtype=torch.bfloat16, device=bench.device)
    b = torch.empty_like(a)
    seconds = bench.seconds(lambda: b.copy_(a))
    bench.copy_rate = 4 * count / seconds / 1e9
    bench.results["copy"] = {"seconds": seconds, "GB/s": bench.copy_rate, "of copy": 1.0}
    print(f"device-to-device copy {bench.copy_rate:.0f} GB/s, read and written")
    pinned = torch.empty(count, dtype=torch.bfloat16, pin_memory=not bench.rehearse)
    for name, work in {
        "pinned to device": lambda: a.copy_(pinned, non_blocking=True),
        "device to pinned": lambda: pinned.copy_(a, non_blocking=True),
    }.items():
        seconds = bench.seconds(work, 5)
        bench.results[name] = {"seconds": seconds, "GB/s": 2 * count / seconds / 1e9}
        print(f"{name} {2 * count / seconds / 1e9:.1f} GB/s")


# One launch does this many 1 GiB tensors, as one launch does a model: a call's own 0.2 ms of host
# time would else be a third of the kernel's. (All write the same output: the traffic is the same.)
BATCH = 8


def primitives(bench: Bench) -> None:
    """Each primitive on 1 GiB tensors, against plain torch and torch.compile of it."""
    import numpy as np

    from fastmerge.kernels.combine import CombineBatch, combine
    from fastmerge.kernels.consensus import consensus_many
    from fastmerge.kernels.gram import GramBatch, gram
    from fastmerge.kernels.select import select_many
    from fastmerge.sparsity import MAGNITUDE, RANDOM, Sparsify

    torch = bench.torch
    count = 1 << 12 if bench.rehearse else 1 << 29
    base = bench.normal((count,), 0.02, 0)
    xs = [bench.tune(base, seed) for seed in (1, 2, 3)]
    out = torch.empty_like(base)

    def each(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: [function(*arguments) for _ in range(BATCH)]

    def peers(function: Callable[..., Any], *arguments: Any) -> dict[str, Callable[[], Any]]:
        """Plain torch and torch.compile of it, as often as the batch has tensors."""
        compiled = function if bench.rehearse else torch.compile(function)
        return {"torch": each(function, *arguments), "compile": each(compiled, *arguments)}

    def sum_of(*tensors: Any) -> Any:
        return sum(0.3 * x.float() for x in tensors).to(torch.bfloat16)

    def products(a: Any, b: Any) -> Any:
        a, b = a.float(), b.float()
        return torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()])

    for k in (2, 3):
        batch, terms = CombineBatch([xs[:k]] * BATCH, [out] * BATCH), [np.full(k, 0.3)] * BATCH
        bench.record(
            f"combine {k}", 2 * count * (k + 1) * BATCH,
            lambda batch=batch, terms=terms: batch.run(terms), **peers(sum_of, *xs[:k]),
        )  # fmt: skip
    pair = GramBatch([xs[:2]] * BATCH)
    bench.record("gram 2", 4 * count * BATCH, pair.run, **peers(products, *xs[:2]))
    triple = GramBatch([xs[:2]] * BATCH, [base] * BATCH)
    bench.record("gram base+2", 6 * count * BATCH, triple.run)

    few = [x[:8] for x in xs[:2]]
    for name, call in {
        "call of combine": lambda: combine(few, np.full(2, 0.3), out[:8]),
        "call of gram": lambda: gram(few),
    }.items():
        bench.results[name] = {"seconds": bench.seconds(call, 50)}

    trims = [Sparsify(MAGNITUDE, count // 2)] * 2
    drops = [Sparsify(RANDOM, keep_below=1 << 31, key=k, rescale=True) for k in (1, 2)]
    small = xs[0][: count // 16], base[: count // 16]  # torch sorts: as much as finishes
    inputs, bases = [xs[:2]] * 2, [base] * 2

    def sort(x: Any, b: Any) -> Any:
        return torch.argsort((x.float() - b.float()).abs(), descending=True)[: x.numel() // 2]

    for name, specs in {"select base+2": trims, "select random": drops}.items():
        bench.record(name, 12 * count, lambda s=specs: select_many(inputs, bases, [s] * 2))
    seconds = bench.seconds(lambda: sort(*small), 3)
    bench.results["select base+2"]["argsort of 1/16 of one delta"] = seconds

    def ties(b: Any, x: Any, y: Any) -> Any:
        dx, dy = x.float() - b.float(), y.float() - b.float()
        sign = torch.where(dx + dy >= 0, 1.0, -1.0)
        mx, my = (dx * sign > 0).float(), (dy * sign > 0).float()
        total, weight = dx * mx + dy * my, mx + my
        weight = torch.where(weight == 0, 1.0, weight)
        return (b.float() + total / weight).to(torch.bfloat16)

    for name, specs in {
        "consensus untrimmed": [Sparsify()] * 2,
        "consensus trimmed": trims,
        "consensus dare": drops,
    }.items():
        chosen = select_many([xs[:2]], [base], [specs])[0]
        bench.record(
            name, 8 * count * BATCH,
            lambda c=chosen: consensus_many(
                [xs[:2]] * BATCH, [base] * BATCH, [[1.0, 1.0]] * BATCH, [c] * BATCH,
                [out] * BATCH, elect=True, normalize=True,
            ),
            **(peers(ties, base, *xs[:2]) if specs[0].kind == Sparsify().kind else {}),
        )  # fmt: skip


def models(bench: Bench) -> None:
    """SLERP and TIES of whole models that lie in device memory, 7 B where it fits."""
    from fastmerge.algebra import Merge, Source
    from fastmerge.methods import find
    from fastmerge.resident import Job, Resident

    torch = bench.torch
    sys.path.insert(0, str(Path(__file__).parent))
    from checkpoints import Shape

    shape = Shape(hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32)
    if bench.rehearse:
        shape = Shape(hidden=16, layers=1, intermediate=24, heads=4, kv_heads=4, vocab=10)
    tensors = shape.tensors()
    whole = len(tensors)
    if not bench.rehearse:
        bench.empty()
        free = torch.cuda.mem_get_info()[0]
        sizes = {name: 2 * torch.Size(size).numel() for name, size in tensors.items()}
        while 5 * sum(sizes.values()) > free:  # base, two tunes, output, and room to work
            sizes.popitem()
        tensors = {name: tensors[name] for name in sizes}
    parameters = sum(torch.Size(size).numel() for size in tensors.values())
    base = {n: bench.normal(size, 0.02, i) for i, (n, size) in enumerate(tensors.items())}
    tunes = [
        {n: bench.tune(x, 1000 * m + i) for i, (n, x) in enumerate(base.items())} for m in (1, 2)
    ]
    held = [base, *tunes]
    outs = {n: torch.empty_like(x) for n, x in base.items()}
    is_whole = len(tensors) == whole and not bench.rehearse
    bench.results["model"] = {
        "parameters": parameters, "tensors": len(tensors), "is the whole 7 B model": is_whole,
    }  # fmt: skip

    def prepared(root: Callable[[str], Any]) -> Resident:
        jobs = [Job(n, root(n), outs[n]) for n in tensors]
        return Resident(jobs, lambda source: held[source.model][source.name])

    slerp = prepared(
        lambda n: Merge(find("slerp"), (Source(1, n), Source(2, n)), None, {"t": 0.4}, ({}, {}))
    )
    values = {"normalize": True, "lambda": 1.0, "rescale": False}
    own = ({"weight": 0.5, "density": 0.5}, {"weight": 0.5, "density": 0.5})
    ties = prepared(
        lambda n: Merge(find("ties"), (Source(1, n), Source(2, n)), Source(0, n), values, own)
    )
    peers: list[dict[str, Any]] = [{}, {}]
    if not bench.rehearse:
        peers = mergekit_peers(bench, held)
    bench.record("slerp model", 2 * parameters * 5, slerp.run, **peers[0])
    bench.record("ties model", 2 * parameters * 4, ties.run, **peers[1])


def mergekit_peers(bench: Bench, held: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """mergekit's own kernels on the same device tensors, one tensor after another."""
    try:
        from mergekit.merge_methods import merge_tensors
    except ImportError:
        bench.results["mergekit"] = {"note": "not installed"}
        return [{}, {}]

    def every(method: str, models: Sequence[int], parameters: dict[str, Any]) -> None:
        for name in held[0]:
            tensors = [held[m][name] for m in models]
            merge_tensors(tensors, method, parameters=parameters, base_index=0)

    both = {"weight": [0.5, 0.5], "density": [0.5, 0.5], "normalize": True}
    return [
        {"mergekit": lambda: every("slerp", (1, 2), {"t": 0.4})},
        {"mergekit": lambda: every("ties", (0, 1, 2), both)},
    ]


def streaming(bench: Bench) -> None:
    """A whole merge from files in the page cache to a folder, against the pinned copies' rate."""
    try:
        from checkpoints import write_set

        from fastmerge import api
    except ImportError as error:
        bench.results["stream slerp"] = {"note": f"not run: {error.name} is not installed"}
        return
    import shutil
    import tempfile

    bench.empty()
    # Two inputs, one output, and room to spare, in memory where that has room, else on the disk.
    needs = {"7b": 45e9, "1.1b": 8e9} if left() > 200 else {"1.1b": 8e9}
    needs = {"tiny": 1e7} if bench.rehearse else needs
    places = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    rooms = {place: shutil.disk_usage(place).free for place in places if place.is_dir()}
    fits = [(size, p) for size, need in needs.items() for p, room in rooms.items() if room > need]
    if not fits:
        bench.results["stream slerp"] = {"note": f"not run: no room, free bytes are {rooms}"}
        return
    size, place = fits[0]
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        a, b = write_set(folder, size, 2)[:2]
        moved = sum(f.stat().st_size for m in (a, b) for f in m.glob("*.safetensors"))
        recipe = {
            "merge_method": "slerp", "base_model": str(a), "parameters": {"t": 0.4},
            "dtype": "bfloat16", "models": [{"model": str(a)}, {"model": str(b)}],
        }  # fmt: skip
        for device in ("cpu",) if bench.rehearse else ("cuda", "cpu"):
            name = "stream slerp" if device == "cuda" else "the same on the CPU"
            bench.record(
                name, moved * 3 // 2,
                lambda device=device: api.merge(recipe, folder / "out", device=device),
                before=lambda: shutil.rmtree(folder / "out", ignore_errors=True),
            )  # fmt: skip
            row = bench.results[name]
            row |= {"GB/s in": moved / row["seconds"] / 1e9, "model": size, "files in": str(place)}
            row["of pinned copy"] = row["GB/s in"] / bench.results["pinned to device"]["GB/s"]


# --- report ---------------------------------------------------------------------------------------


def said(*command: str) -> str:
    """The first line that a command prints; "" where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


def machine(bench: Bench) -> dict[str, str]:
    import triton

    torch = bench.torch
    line = {"python": platform.python_version(), "torch": torch.__version__}
    line |= {"triton": triton.__version__, "cores": str(len(os.sched_getaffinity(0)))}
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    line |= {
        "cpu": cpu[1] if cpu else platform.machine(),
        "commit": said("git", "rev-parse", "HEAD"),
    }
    if not bench.rehearse:
        found = torch.cuda.get_device_properties(0)
        line |= {"gpu": found.name, "memory_GiB": f"{found.total_memory / 2**30:.0f}"}
        line["cuda"] = str(torch.version.cuda or torch.version.hip)
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        line["driver"] = said("nvidia-smi", *query)
    return line


def plot(results: dict[str, dict[str, Any]], title: str) -> str:
    """Bars of each row's share of the copy's rate, as SVG."""
    rows = [(name, row["of copy"]) for name, row in results.items() if "of copy" in row]
    height = 24 * len(rows) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}">',
        "<style>text { font: 13px sans-serif }</style>",
        f'<text x="10" y="20">{title}: share of the device copy\'s bytes per second</text>',
    ]
    for i, (name, share) in enumerate(rows):
        y = 34 + 24 * i
        width = max(1.0, 480 * min(share, 1.1))
        lines += [
            f'<text x="10" y="{y + 14}">{name}</text>',
            f'<rect x="180" y="{y}" width="{width:.0f}" height="18" fill="#4477aa"/>',
            f'<text x="{186 + width:.0f}" y="{y + 14}">{share:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def goals(results: dict[str, dict[str, Any]]) -> None:
    print("\ngoal (on an H200)                     measured")
    for name, (key, value, sign) in GOALS.items():
        found = results.get(name.strip(), {}).get(key)
        if "model" in name and not results.get("model", {}).get("is the whole 7 B model"):
            found = None
        if not isinstance(found, float):
            print(f"{name:16} {key:14} {sign} {value:<6} not measured")
            continue
        met = found >= value if sign == ">=" else found <= value
        print(f"{name:16} {key:14} {sign} {value:<6} {found:8.4f}  {'met' if met else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny, interpreted, on the CPU")
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        print(f"gpu.py: {error.name} is not installed")
        sys.exit(2)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu.py: no CUDA device here, nothing measured; --rehearse walks through it on a CPU")
        sys.exit(2)
    if not options.built:  # import what was built in a fresh process
        environment = {**build(), "FASTMERGE_GPU_BEGAN": str(BEGAN)}
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--built"], environment)

    bench = Bench(rehearse=options.rehearse)
    report: dict[str, Any] = {"machine": machine(bench), "rehearsal": options.rehearse}
    print(report["machine"])
    failed: list[str] = []
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{'rehearsal' if options.rehearse else 'gpu'}.json"

    def keep() -> None:
        report.update(results=bench.results, failed=failed, seconds=time.time() - BEGAN)
        path.write_text(json.dumps(report, indent=1) + "\n")

    for stage in (yardsticks, primitives, models, streaming):
        if left() < 60:
            print(f"{stage.__name__}: not run, out of time")
            continue
        try:
            stage(bench)
        except Exception as error:  # noqa: BLE001  the other stages are still worth keeping
            failed.append(f"{stage.__name__}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1][:2000]}")
        keep()
    bench.empty()
    # Last: they need no quiet machine, and have the time that is left.
    report["tests"] = run_tests(rehearse=options.rehearse)
    print(f"tests: {report['tests']['line']}")
    keep()
    if not options.rehearse:
        goals(bench.results)
    title = report["machine"].get("gpu", "rehearsal on a CPU, no figures")
    path.with_suffix(".svg").write_text(plot(bench.results, title))
    print(f"\n{path} and .svg, {report['seconds']:.0f} s")
    sys.exit(1 if failed or not report["tests"]["passed"] else 0)


if __name__ == "__main__":
    main()
