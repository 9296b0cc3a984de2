"""The GPU kernels on this machine: builds, measures, tests; one JSON and one plot in results/.

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
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LIMIT_SECONDS = 480
# When this process has to be done: one that runs a part is told.
UNTIL = float(os.environ.get("FASTMERGE_GPU_UNTIL", time.time() + LIMIT_SECONDS))
# The parts in order, each a process of its own (an illegal memory access ends that part only), with
# the seconds it leaves to those after it: 110 are for streaming, 130 for the tests, 15 for the end.
PARTS = {"yardsticks": 340, "primitives": 270, "models": 240, "tests": 125, "streaming": 15}

# Goals on an H200: row, column, bound.
GOALS = [
    ("combine 2", "of copy", 0.9, ">="),
    ("combine 3", "of copy", 0.9, ">="),
    ("gram 2", "of copy", 0.9, ">="),
    ("slerp model", "seconds", 0.020, "<="),
    ("ties model", "seconds", 0.060, "<="),
    ("ties model", "times mergekit", 100.0, ">="),
    ("stream slerp", "of pinned copy", 0.8, ">="),
]


def left() -> float:
    """Seconds until this process has to be done."""
    return UNTIL - time.time()


def attempt(command: Sequence[str], seconds: float, log: IO[str] | None = None) -> str:
    """Runs a command: "" if it went well, else what went wrong. Its group of processes ends with
    it, or a killed test's workers would hold the GPU on; 10 s to remove files of 40 GB.
    """
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        code = process.wait(max(seconds, 1))
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"out of time after {seconds:.0f} s"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(10)


def has(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


# --- build ----------------------------------------------------------------------------------------


def broken() -> str:
    """Why fastmerge, its extension and its kernels of this checkout cannot be imported, or ""."""
    code = "import fastmerge, fastmerge._C, fastmerge.kernels as k; print(fastmerge.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-500:]
    return "" if str(ROOT) in done.stdout else f"another one was imported, {done.stdout}"


def build() -> None:
    """Unless fastmerge can be imported as it is: an import folder of links to the sources and the
    extension, which takes a compiler and nothing else, for the processes started after this.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if not broken():
        return
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
    owner = import_module("pybind11" if has("pybind11") else "torch")  # torch brings a copy
    flags = ["-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{Path(owner.__file__).parent / 'include'}"]
    command = ["c++", *flags, f"-I{sysconfig.get_paths()['include']}", "-c"]
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    made = {source: home / f"{number}.o" for number, source in enumerate(sources)}
    jobs = [subprocess.Popen([*command, source, "-o", made[source]]) for source in sources]
    if {job.wait() for job in jobs} != {0}:
        sys.exit("gpu.py: the compiler failed, see above")
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["c++", "-shared", "-pthread", *made.values(), "-o", target], check=True)
    # Before what is there already: a caller may bring packages on PYTHONPATH.
    paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if why := broken():
        sys.exit(f"gpu.py: the extension was compiled but does not import: {why}")


def run_tests(log: Path, seconds: float, *, rehearse: bool) -> dict[str, Any]:
    """The whole GPU test suite: whether it passed, its last lines; all that it says in ``log``."""
    cases = ("", "_draw", "_resident", "_stream")
    names = [f"triton{case}_cases.py" for case in cases]
    # A file that cannot be imported must not keep the others from running.
    pytest = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    pytest = [sys.executable, *pytest, *(str(ROOT / "tests" / name) for name in names), "-k"]
    huge = "beyond_32_bits"  # takes 20 GB of the GPU: by itself, in the last 45 s
    end = time.time() + seconds
    runs = {"refuse" if rehearse else f"not {huge}": end - 45, huge: end}
    result: dict[str, Any] = {"passed": True, "log": log.name}
    with log.open("w+") as file:
        for chosen, until in runs.items():
            workers = ["-n", "4"] if chosen != huge and has("xdist") else []
            begin = file.tell()
            why = attempt([*pytest, chosen, *workers], until - time.time(), file)
            file.seek(begin)
            lines = file.read().strip().splitlines()
            line = lines[-1].strip("= ") if lines else ""
            if why:
                passed = sum("PASSED" in said for said in lines)
                line = f"{why}, {passed} passed; its last line: {line}"
                print("\n".join(lines[-60:]))
            result["passed"] = result["passed"] and not why
            result[huge if chosen == huge else "line"] = line
    return result


# --- measure --------------------------------------------------------------------------------------


class Bench:
    """Timing and data on one device; what is measured is in the report's file at once."""

    def __init__(self, path: Path, *, rehearse: bool) -> None:
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.wait = (lambda: None) if rehearse else torch.cuda.synchronize
        self.path, self.report = path, json.loads(path.read_text())

    def put(self, name: str, row: Mapping[str, Any]) -> None:
        """More of one row of the results."""
        self.report["results"].setdefault(name, {}).update(row)
        save(self.path, self.report)

    def fail(self, name: str, error: Exception) -> None:
        self.report["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:2000]}")
        save(self.path, self.report)
        print(f"failed: {self.report['failed'][-1]}")

    def rate_of(self, name: str) -> float:
        """GB/s of a row; NaN, and with it what is divided by it, where it was not measured."""
        return self.report["results"].get(name, {}).get("GB/s", float("nan"))

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
            if (number >= 2 and sum(times) > 8) or sum(times) > 30 or left() < 15:
                break
        return statistics.median(times[2:] or times[-1:])

    def record(
        self,
        name: str,
        moved: int,
        work: Callable[[], object],
        *,
        before: Callable[[], object] = lambda: None,
        **peers: Callable[[], object],
    ) -> None:
        """One row: our time, its rate, its share of a copy's rate; each peer's time and ratio.
        What fails is recorded: the other rows are still worth having.
        """
        try:
            seconds = self.seconds(work, before=before)
        except Exception as error:  # noqa: BLE001  see above
            self.fail(name, error)
            return
        rate = moved / seconds / 1e9
        self.put(name, {"seconds": seconds, "GB/s": rate})
        share = rate / self.rate_of("copy")
        self.put(name, {"of copy": share})
        print(f"{name:24} {seconds * 1e3:10.3f} ms {rate:9.1f} GB/s  {share:5.2f}")
        for peer, function in peers.items():
            if left() < 40:
                self.put(name, {peer: "not run: out of time"})
                continue
            try:
                took = self.seconds(function, 5)
                self.put(name, {peer: took, f"times {peer}": took / seconds})
            except Exception as error:  # noqa: BLE001  a peer that fails is a result, not an end
                self.put(name, {peer: f"failed: {type(error).__name__}: {str(error)[:200]}"})

    def normal(self, shape: Sequence[int], scale: float, seed: int) -> Any:
        generator = self.torch.Generator(self.device).manual_seed(seed)
        x = self.torch.randn(*shape, generator=generator, device=self.device)
        return x.mul_(scale).to(self.torch.bfloat16)

    def tune(self, base: Any, seed: int) -> Any:
        """base + noise, stored in bf16: deltas tie as those of published fine-tunes do."""
        noise = self.normal(base.shape, 1e-3, seed).float()
        return (base.float() + noise).to(self.torch.bfloat16)


def yardsticks(bench: Bench) -> None:
    torch = bench.torch
    bench.report["machine"] = machine(bench)
    print(bench.report["machine"])
    count = 1 << 12 if bench.rehearse else 1 << 30
    a = torch.zeros(count, dtype=torch.bfloat16, device=bench.device)
    b = torch.empty_like(a)
    bench.record("copy", 4 * count, lambda: b.copy_(a))
    pinned = torch.empty(count, dtype=torch.bfloat16, pin_memory=not bench.rehearse)
    # One way only: what is read here is written there.
    bench.record("pinned to device", 2 * count, lambda: a.copy_(pinned, non_blocking=True))
    bench.record("device to pinned", 2 * count, lambda: pinned.copy_(a, non_blocking=True))


# One launch does this many 1 GiB tensors, as one launch does a model: a call's own 0.2 ms of host
# time would else be a third of the kernel's. (All write the same output: the traffic is the same.)
BATCH = 8


def primitives(bench: Bench) -> None:
    """Each primitive on 1 GiB tensors, against plain torch and torch.compile of it."""
    import numpy as np

    from fastmerge.kernels.combine import CombineBatch, combine
    from fastmerge.kernels.consensus import consensus_many
    from fastmerge.kernels.gram import GramBatch, gram
    from fastmerge.kernels.pointwise import PointwiseBatch
    from fastmerge.kernels.select import select_many
    from fastmerge.selection import MAGNITUDE, RANDOM, Sparsify

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

    ram = PointwiseBatch("reinforced", [xs[:2]] * BATCH, [base] * BATCH, [out] * BATCH)
    bench.record("pointwise ram", 8 * count * BATCH, lambda: ram.run([[1e-5, 1.0, 1.0]] * BATCH))

    few = [x[:8] for x in xs[:2]]
    bench.record("call of combine", 0, lambda: combine(few, np.full(2, 0.3), out[:8]))
    bench.record("call of gram", 0, lambda: gram(few))

    trims = [Sparsify(MAGNITUDE, count // 2)] * 2
    drops = [Sparsify(RANDOM, keep_below=1 << 31, key=k, rescale=True) for k in (1, 2)]
    inputs, bases = [xs[:2]] * 2, [base] * 2
    small = (xs[0] - base)[: count // 16].float().abs()  # torch sorts: as much as finishes
    sort = {"argsort of 1/16 of one delta": lambda: small.argsort(descending=True)}
    bench.record(
        "select base+2", 12 * count, lambda: select_many(inputs, bases, [trims] * 2), **sort
    )
    bench.record("select random", 12 * count, lambda: select_many(inputs, bases, [drops] * 2))

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
    """SLERP and TIES of whole models that lie in device memory, and a walk over them."""
    import gpu_models

    gpu_models.models(bench)


def free_memory() -> int:
    """Bytes that files in memory may take: what the system has, within a container's limit."""
    system = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    free = 1024 * int(system[1]) if system else 0
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such limit, or "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def is_fast(folder: Path) -> bool:
    """In memory, or on a disk that takes 1 GB/s: at 200 MB/s a 7 B set is minutes of writing."""
    if said(f"stat -f -c %T '{folder}'") == "tmpfs":
        return True
    block = os.urandom(1 << 26)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.writelines([block] * 16)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began < 1.07


def room(bench: Bench) -> tuple[str, Path]:
    """The size of model to stream and a folder for two inputs, one output and room to spare."""
    # Writing 7 B takes 300 CPU seconds, merging it on the GPU and on the CPU another 30.
    big = left() > 80 and len(os.sched_getaffinity(0)) >= 12
    needs = {"tiny": 1e7} if bench.rehearse else {"7b": 45e9, "1.1b": 8e9}
    for size, need in needs.items():
        for place in filter(Path.is_dir, [Path("/dev/shm"), Path(tempfile.gettempdir())]):
            # Memory for the files on a disk too: they are read from the page cache.
            fits = min(shutil.disk_usage(place).free, free_memory() / 1.2) > need
            if fits and (size != "7b" or (big and is_fast(place))):
                return size, place
    raise OSError("no room for 8 GB of files in memory")


def streaming(bench: Bench) -> None:
    """A whole merge from files in the page cache to a folder, against the pinned copies' rate."""
    from checkpoints import write_set

    from fastmerge import api

    size, place = room(bench)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        began = time.perf_counter()
        a, b = write_set(folder, size, 2)[:2]
        print(f"two models of {size} in {place}, {time.perf_counter() - began:.1f} s")
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
            inward = bench.rate_of(name) * 2 / 3
            share = inward / bench.rate_of("pinned to device")
            row = {"GB/s in": inward, "of pinned copy": share, "model": size}
            bench.put(name, {**row, "files in": str(place)})


STAGES = {f.__name__: f for f in (yardsticks, primitives, models, streaming)}


# --- report ---------------------------------------------------------------------------------------


def save(path: Path, report: Mapping[str, Any]) -> None:
    """Whole or not at all: whoever writes may be killed."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(path)


def said(command: str) -> str:
    """What a shell command prints, "" where it is not there."""
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip()


def machine(bench: Bench) -> dict[str, str]:
    import triton

    torch = bench.torch
    line = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cores": str(len(os.sched_getaffinity(0))),
        "cpu": said("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2],
        "commit": said("git rev-parse HEAD"),
    }
    if not bench.rehearse:
        found = torch.cuda.get_device_properties(0)
        line |= {"gpu": found.name, "memory_GiB": f"{found.total_memory / 2**30:.0f}"}
        line["cuda"] = str(torch.version.cuda or torch.version.hip)
        line["driver"] = said("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    return line


def plot(results: dict[str, dict[str, Any]], title: str) -> str:
    """Bars of each row's share of the copy's rate, as SVG."""
    rows = [(n, row["of copy"]) for n, row in results.items() if row.get("of copy", 0) > 0]
    height = 24 * len(rows) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}">',
        "<style>text { font: 13px sans-serif }</style>",
        f'<text x="10" y="20">{title}: share of the device copy\'s bytes per second</text>',
    ]
    for y, (name, share) in zip(range(34, height, 24), rows, strict=False):
        width = round(480 * min(share, 1.1))
        lines += [
            f'<text x="10" y="{y + 14}">{name}</text>',
            f'<rect x="180" y="{y}" width="{width}" height="18" fill="#4477aa"/>',
            f'<text x="{186 + width}" y="{y + 14}">{share:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def goals(results: dict[str, dict[str, Any]]) -> None:
    print("\ngoal (on an H200)                     measured")
    for name, key, value, sign in GOALS:
        found = results.get(name, {}).get(key, 0.0)
        line = "not measured"
        if found > 0 and ("model" not in name or results["model"]["size"] == "7b"):
            met = found >= value if sign == ">=" else found <= value
            line = f"{found:8.4f}  {'met' if met else 'MISSED'}"
        print(f"{name:16} {key:14} {sign} {value:<6} {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny, interpreted, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for what it writes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # in the order of events, where it is piped too
    path = options.out / f"{'rehearsal' if options.rehearse else 'gpu'}.json"
    # So that files and processes are cleared away when time is up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.stage:
        # Last, as there is a kernels.py beside this file, and a package of that name elsewhere.
        sys.path.append(str(Path(__file__).parent))
        bench = Bench(path, rehearse=options.rehearse)
        try:
            STAGES[options.stage](bench)
        except Exception as error:  # noqa: BLE001  recorded, and the other stages run
            bench.fail(options.stage, error)
        return

    if options.rehearse:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if missing := [name for name in ("torch", "triton") if not has(name)]:
        print(f"gpu.py: {missing[0]} is not installed")
        sys.exit(2)
    if not options.rehearse and not import_module("torch").cuda.is_available():
        print("gpu.py: no CUDA device here, nothing measured; --rehearse walks through it on a CPU")
        sys.exit(2)
    if missing := [name for name in ("yaml",) if not has(name)]:
        print(
            f"gpu.py: {' and '.join(missing)} missing: streaming and the tests of whole models "
            "will not run; pip install pyyaml, or bring it on PYTHONPATH"
        )
    build()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": {}, "rehearsal": options.rehearse, "missing": missing}
    report |= {"results": {}, "failed": [], "tests": {"passed": False, "line": "not run"}}
    save(path, report)
    for part, kept in PARTS.items():
        print(f"--- {part}, {LIMIT_SECONDS - left():.0f} s")
        seconds = min(max(left() - kept, 30), left() - 15)
        if part == "tests":
            log = path.with_name(f"{path.stem}-tests.txt")
            report["tests"] = run_tests(log, seconds, rehearse=options.rehearse)
            print(report["tests"])
        else:
            os.environ["FASTMERGE_GPU_UNTIL"] = str(time.time() + seconds)
            command = [sys.executable, __file__, *sys.argv[1:], "--stage", part]
            problem = attempt(command, seconds)
            report = json.loads(path.read_text())
            if problem:
                report["failed"].append(f"{part}: {problem}")
                print(f"failed: {report['failed'][-1]}")
        report["seconds"] = LIMIT_SECONDS - left()
        save(path, report)
    if not options.rehearse:
        goals(report["results"])
    title = report["machine"].get("gpu", "rehearsal on a CPU, no figures")
    path.with_suffix(".svg").write_text(plot(report["results"], title))
    print(f"\n{path} and .svg, {report['seconds']:.0f} s")
    sys.exit(1 if report["failed"] or not report["tests"]["passed"] else 0)


if __name__ == "__main__":
    main()
