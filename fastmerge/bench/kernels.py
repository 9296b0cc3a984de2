"""The CPU's primitives on one thread, beside copying and reading as many bytes.

Inputs are a base and two fine-tunes whose deltas tie as real ones do. Seconds are the process's CPU
seconds, which a busy machine stretches less than the clock's; in each round every kernel runs, and
the copy and the read that are its ceiling, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C
from fastmerge.bench import ceilings
from fastmerge.bench.numpy_backend import view_of
from fastmerge.bench.rows import Row, WrongResultError, ratios, spread
from fastmerge.compute import reference
from fastmerge.compute.reference import round_to, widen
from fastmerge.dtypes import BY_CODE
from fastmerge.selection import MAGNITUDE, RANDOM, Selection, Sparsify, keep_below, keep_count

Work = Callable[[], Any]
ENTRIES = 1 << 22
DTYPES = ("BF16", "F16", "F32")
_ALL = [Selection()] * 2
_MODES: dict[str, dict[str, Any]] = {
    "TIES": {"elect": True, "normalize": True},
    "DARE-TIES": {"elect": True, "normalize": False},
    "untrimmed": {"elect": True, "normalize": True},
    "task arithmetic": {"elect": False, "normalize": False},
}


class Kernel(NamedTuple):
    """A call, the tensors that it reads and writes, and what it should come to: of tensors their
    bits, else what it returns.
    """

    reads: int
    writes: int
    call: Work
    right: Work


def cases(count: int, dtype: str) -> tuple[dict[str, Kernel], NDArray[Any]]:
    """By name, of tensors of ``count`` entries; and where those that write do."""
    rng = np.random.default_rng(0)
    base = round_to((0.02 * rng.standard_normal(count)).astype(np.float32), dtype)
    tuned = [
        round_to(widen(base) + np.float32(1e-4) * rng.standard_normal(count, np.float32), dtype)
        for _ in range(2)
    ]
    out = np.zeros_like(base)
    pool, origin = _C.Pool(1), view_of(base, dtype)
    inputs, sink = [view_of(x, dtype) for x in tuned], _C.MemorySink(view_of(out, dtype))
    trim = [Sparsify(MAGNITUDE, keep_count(0.5, count))] * 2
    dare = [Sparsify(RANDOM, keep_below=keep_below(0.5), key=k, rescale=True) for k in (1, 2)]
    chosen = {
        "TIES": _C.select(pool, inputs, origin, trim),
        "DARE-TIES": _C.select(pool, inputs, origin, dare),
        "untrimmed": _ALL,
        "task arithmetic": _ALL,
    }
    halves, pair = [0.5, 0.5], np.array([0.3, 0.7])

    def rounded(values: NDArray[Any]) -> NDArray[Any]:
        return round_to(np.asarray(values, np.float32), dtype)

    def combined() -> NDArray[Any]:
        return rounded(reference.combine(tuned, pair, arithmetic=np.float32))

    def agreed(name: str) -> NDArray[Any]:
        made = reference.consensus(
            tuned, base, halves, chosen[name], arithmetic=np.float32, **_MODES[name]
        )
        return rounded(made)

    def consensus(name: str) -> Kernel:
        given = (pool, inputs, origin, halves, chosen[name], sink)
        return Kernel(3, 1, lambda: _C.consensus(*given, **_MODES[name]), partial(agreed, name))

    def select(specs: Sequence[Sparsify]) -> Kernel:
        right = partial(reference.select, tuned, base, specs)
        return Kernel(3, 0, lambda: _C.select(pool, inputs, origin, specs), right)

    def gram(own: Sequence[Any], views: Sequence[_C.View], based: bool) -> Kernel:
        right = partial(reference.gram, own, base if based else None)
        given = (pool, views, origin) if based else (pool, views)
        return Kernel(len(views) + based, 0, lambda: _C.gram(*given), right)

    return {
        "copy": Kernel(1, 1, lambda: _C.copy(pool, origin, sink), lambda: base),
        "gram, 2": gram(tuned, inputs, False),
        "gram, 3": gram([base, *tuned], [origin, *inputs], False),
        "gram, base + 2": gram(tuned, inputs, True),
        "combine, 2": Kernel(2, 1, lambda: _C.combine(pool, inputs, pair, sink), combined),
        "select, trim 2": select(trim),
        "select, random 2": select(dare),
        **{f"consensus, {name} 2": consensus(name) for name in _MODES},
    }, out


def check(name: str, kernel: Kernel, out: NDArray[Any], right: Any) -> None:
    """Runs the kernel once, over a poisoned output; WrongResultError where NumPy says otherwise."""
    out.view(np.uint8)[:] = 0xFF
    made = kernel.call()
    if kernel.writes:
        bad = np.flatnonzero(out != right)
        if bad.size:
            raise WrongResultError(
                f"{name} on {_C.isa()}: wrong: {bad.size} of {out.size} entries have other bits "
                f"than NumPy's, the first at {int(bad[0])}; no figure is given. Please report it"
            )
        return
    if isinstance(right, np.ndarray):
        same = np.allclose(made, right, rtol=1e-9, atol=0)
    else:
        # Sums of magnitudes are taken in another order.
        same = all(
            own._replace(rescale=1.0) == wanted._replace(rescale=1.0)
            and abs(own.rescale / wanted.rescale - 1) < 1e-6
            for own, wanted in zip(made, right, strict=True)
        )
    if not same:
        raise WrongResultError(
            f"{name} on {_C.isa()}: wrong: {made}, not {right}; no figure is given. Please report "
            "it"
        )


def bench(
    entries: int,
    dtypes: Sequence[str],
    isas: Sequence[str],
    repeat: int,
    tell: Callable[[str], None],
) -> list[Row]:
    """A row for each kernel, type and instruction set; the process's own is the same afterwards."""
    before = _C.isa()
    rows = []
    try:
        for dtype in dtypes:
            kernels, out = cases(entries, dtype)
            right: dict[str, Any] = {}
            for isa in isas:
                _C.set_isa(isa)
                tell(f"kernels, {dtype}, {isa}: compared with NumPy, then {repeat} rounds")
                for name, kernel in kernels.items():
                    if name not in right:
                        right[name] = kernel.right()
                    check(name, kernel, out, right[name])
                rows += _rows(kernels, entries, dtype, isa, repeat)
    finally:
        _C.set_isa(before)
    return rows


def _rows(kernels: dict[str, Kernel], entries: int, dtype: str, isa: str, repeat: int) -> list[Row]:
    nbytes = BY_CODE[dtype].bytes_for(entries)
    # Of three tensors, as most kernels read: one again and again would stay in a cache.
    source, to = np.zeros(3 * nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    calls: dict[str, Work] = {
        **{name: partial(copy, source[:nbytes], to) for name, copy in ceilings.COPIES.items()},
        "read": partial(ceilings.read, source),
        **{name: kernel.call for name, kernel in kernels.items()},
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeat + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:  # the first warms up
                found[name].append(time.process_time() - began)
    copies = {name: found[name] for name in ceilings.COPIES}
    limits = {**copies, "read": found["read"]}
    _, copied = ceilings.fastest(copies)
    rows = []
    for name, kernel in kernels.items():
        # What it writes is copied from somewhere; the other tensors are read.
        ceiling = [
            kernel.writes * copy + (kernel.reads - kernel.writes) * read / 3
            for copy, read in zip(copied, found["read"], strict=True)
        ]
        seconds, moved = spread(found[name]), (kernel.reads + kernel.writes) * nbytes
        rows.append({
            "kind": "kernels", "job": name, "dtype": BY_CODE[dtype].name, "isa": isa,
            "entries": entries, "cache": "in memory", "bytes": moved, "seconds": seconds,
            "nanoseconds_per_entry": 1e9 * seconds["median"] / entries,
            "gigabytes_per_second": moved / seconds["median"] / 1e9,
            "ceiling_seconds": spread(ceiling), "share_of_ceiling": ratios(ceiling, found[name]),
            "checked": "against NumPy", "runs": {"fastmerge": found[name], **limits},
        })  # fmt: skip
    return rows
