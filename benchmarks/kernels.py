"""Nanoseconds per element of each CPU kernel, on one thread, for every instruction set.

python benchmarks/kernels.py [--elements N] [--isa NAME] [--dtype BF16|F16|F32]

Inputs are a base and two fine-tunes whose deltas tie as real ones do. Times are the process's CPU
seconds, the best of several runs, so that other work on the machine counts as little as it can;
GB/s is the bytes read and written once each, whatever passes a kernel makes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from fastmerge import _C
from fastmerge.compute.reference import round_to, widen
from fastmerge.dtypes import BY_CODE
from fastmerge.selection import MAGNITUDE, RANDOM, Selection, Sparsify, keep_below, keep_count


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def view(array: np.ndarray, dtype: str) -> _C.View:
    return _C.View(array.ctypes.data, array.size, dtype, array)


def cases(count: int, dtype: str) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (tensors read and written, call)."""
    rng = np.random.default_rng(0)
    base = round_to((0.02 * rng.standard_normal(count)).astype(np.float32), dtype)
    tuned = [
        round_to(widen(base) + np.float32(1e-4) * rng.standard_normal(count, np.float32), dtype)
        for _ in range(2)
    ]
    pool, origin, inputs = _C.Pool(1), view(base, dtype), [view(x, dtype) for x in tuned]
    sink = _C.MemorySink(view(np.zeros_like(base), dtype))
    trim = [Sparsify(MAGNITUDE, keep_count(0.5, count))] * 2
    dare = [Sparsify(RANDOM, keep_below=keep_below(0.5), key=k, rescale=True) for k in (1, 2)]
    trimmed, dropped = (_C.select(pool, inputs, origin, specs) for specs in (trim, dare))

    def consensus(selections: list[tuple], *, elect: bool, normalize: bool) -> Callable[[], object]:
        arguments = (pool, inputs, origin, [0.5, 0.5], selections, sink)
        return lambda: _C.consensus(*arguments, elect=elect, normalize=normalize)

    everything = [Selection()] * 2
    return {
        "copy": (2, lambda: _C.copy(pool, origin, sink)),
        "gram, 2": (2, lambda: _C.gram(pool, inputs)),
        "gram, 3": (3, lambda: _C.gram(pool, [origin, *inputs])),
        "gram, base + 2": (3, lambda: _C.gram(pool, inputs, origin)),
        "combine, 2": (3, lambda: _C.combine(pool, inputs, np.array([0.3, 0.7]), sink)),
        "select, trim 2": (3, lambda: _C.select(pool, inputs, origin, trim)),
        "select, random 2": (3, lambda: _C.select(pool, inputs, origin, dare)),
        "consensus, TIES 2": (4, consensus(trimmed, elect=True, normalize=True)),
        "consensus, DARE-TIES 2": (4, consensus(dropped, elect=True, normalize=False)),
        "consensus, untrimmed 2": (4, consensus(everything, elect=True, normalize=True)),
        "consensus, task arithmetic 2": (4, consensus(everything, elect=False, normalize=False)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--isa", choices=_C.isas(), action="append")
    parser.add_argument("--dtype", choices=("BF16", "F16", "F32"), action="append")
    options = parser.parse_args()
    count = options.elements
    print(f"{'':30}  {'isa':7} {'dtype':5} {'ns/element':>10} {'GB/s':>6}")
    for dtype in options.dtype or ("BF16",):
        for isa in options.isa or _C.isas():
            _C.set_isa(isa)
            for name, (tensors, call) in cases(count, dtype).items():
                seconds = best_seconds(call, options.repeats)
                nbytes = tensors * BY_CODE[dtype].bytes_for(count)
                print(
                    f"{name:30}  {isa:7} {dtype:5} {1e9 * seconds / count:10.2f}"
                    f" {nbytes / seconds / 1e9:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
