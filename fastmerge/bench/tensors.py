"""`fastmerge.ops` on tensors in memory, beside copying and reading as many bytes, and beside the
best expression in plain torch.

All have the same number of threads and give a new tensor of their inputs' type. In each round all
run in turn, small tensors many times in a row; torch's is the one with the least median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C, ops
from fastmerge.bench import ceilings
from fastmerge.bench.check import near
from fastmerge.bench.rows import Row, WrongResultError, ratios, spread
from fastmerge.compute.cpu import cpu
from fastmerge.compute.reference import Array, round_to, widen
from fastmerge.dtypes import BY_CODE
from fastmerge.methods.types import Float64
from fastmerge.models.memory import view_of
from fastmerge.selection import MAGNITUDE, Sparsify, keep_count

SIZES = {"64K": 1 << 16, "1M": 1 << 20, "4M": 1 << 22, "16M": 1 << 24, "64M": 1 << 26,
         "256M": 1 << 28, "1G": 1 << 30}  # fmt: skip
OPS = ("linear", "slerp", "ties", "dare_linear")
WEIGHTS, T, DENSITY = [0.3, 0.7], 0.3, 0.5
_BATCH_SECONDS = 2e-3  # how long a round's calls of one expression take together at least
# Before each: torch's OpenMP threads look for work for milliseconds after a call, on a core that
# another expression's second thread then waits for.
_PAUSE_SECONDS = 10e-3
_LONG_SECONDS = 50e-3  # beside a call that long it does not show that its threads had to wake
_FEW = 1 << 25  # entries: of more, torch's TIES takes 5 to 10 s a call
_SLICE = 1 << 24  # entries compared at a time: of 1 GiB all in float64 are 4 GiB a tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Ours, torch's candidates, whether a result is right (which says what it compared), and the
    tensors that it cannot but read, besides the one written.
    """

    ours: Call
    torch: dict[str, Call]
    check: Callable[[Array], str]
    reads: int


def timed(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds a call, of each in each round; at least five rounds."""
    batch: dict[str, int] = {}
    long: set[str] = set()
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
        batch[name] = max(1, round(_BATCH_SECONDS / took))
        if took > _LONG_SECONDS:
            long.add(name)
    found: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while len(found[next(iter(calls))]) < 5 or time.perf_counter() < until:
        for name, call in calls.items():
            time.sleep(_PAUSE_SECONDS)
            if name not in long:
                call()  # which wakes its threads
            began = time.perf_counter()
            for _ in range(batch[name]):
                call()
            found[name].append((time.perf_counter() - began) / batch[name])
    return found


def _exact_ties(base: Array, tuned: Sequence[Array]) -> tuple[Float64, NDArray[np.bool_]]:
    """TIES in float64, and which entries it is sure of: not those that tie at a threshold, of which
    either may be kept, nor those whose deltas cancel, where fp32 may elect either sign.
    """
    origin = widen(base)
    sure = np.ones(origin.size, np.bool_)
    deltas: list[Float64] = []
    for weight, x in zip(WEIGHTS, tuned, strict=True):
        delta = widen(x) - origin  # fp32, as the kernels compare them
        size, keep = np.abs(delta), keep_count(DENSITY, delta.size)
        threshold = np.partition(size, delta.size - keep)[delta.size - keep]
        sure &= size != threshold
        deltas.append(weight * delta.astype(np.float64) * (size > threshold))
    total = np.sum(deltas, axis=0)
    most = np.max(np.abs(deltas), axis=0)
    sure &= (np.abs(total) > 1e-6 * most) | (most == 0)
    elected = np.where(total >= 0, 1.0, -1.0)
    agree = [np.sign(delta) == elected for delta in deltas]
    weights = np.sum([w * own for w, own in zip(WEIGHTS, agree, strict=True)], axis=0)
    summed = np.sum([delta * own for delta, own in zip(deltas, agree, strict=True)], axis=0)
    return origin + summed / np.where(weights == 0, 1.0, weights), sure


def _is_dare(base: Array, tuned: Sequence[Array], dtype: str, made: Array) -> str:
    """Half of each delta is gone, and what is left has the mean of all."""
    same, along, square = 0, 0.0, 0.0
    for part in _parts(base.size):
        origin = _wide(base[part])
        delta = _wide(made[part]) - origin
        mean = np.sum(
            [w * (_wide(x[part]) - origin) for w, x in zip(WEIGHTS, tuned, strict=True)], axis=0
        )
        same += int((delta == 0).sum())
        along += float(delta @ mean)
        square += float(mean @ mean)
    untouched, share = same / base.size, along / square
    drawn = abs(untouched - (1 - DENSITY) ** 2) < 0.05 or dtype == "BF16"  # rounded to the base
    if not drawn or abs(share - 1) > 0.05:
        raise WrongResultError(
            f"ops.dare_linear: wrong: {untouched:.1%} of the entries are the base's and the mean "
            f"is {share:.3f} of the deltas'; no figure is given. Please report it"
        )
    return "mean and share kept"


def _parts(count: int) -> list[slice]:
    return [slice(begin, begin + _SLICE) for begin in range(0, count, _SLICE)]


def _wide(array: Array) -> Float64:
    return widen(array).astype(np.float64)


def cases(count: int, dtype: str, *, threads: int, torch: bool) -> dict[str, Case]:
    """Of ``count`` entries, a base and two fine-tunes: NumPy arrays, or torch tensors."""
    rng = np.random.default_rng(count)
    base: Any = round_to(np.float32(0.02) * rng.standard_normal(count, np.float32), dtype)
    a, b = (
        round_to(widen(base) + np.float32(0.01) * rng.standard_normal(count, np.float32), dtype)
        for _ in range(2)
    )
    plain = base, [a, b]
    products = np.zeros((2, 2))
    for part in _parts(count):
        both = np.stack([_wide(a[part]), _wide(b[part])])
        products += both @ both.T
    angle = np.arccos(products[0, 1] / np.sqrt(products[0, 0] * products[1, 1]))
    on_arc = [np.sin(share * angle) / np.sin(angle) for share in (1 - T, T)]
    theirs: dict[str, dict[str, Call]] = {op: {} for op in OPS}
    if torch:
        base, a, b = (_tensor(array, dtype) for array in (base, a, b))
        theirs = _expressions(base, a, b, count)

    def sums(op: str, factors: Sequence[float]) -> Callable[[Array], str]:
        def check(made: Array) -> str:
            for part in _parts(count):
                own = [f * _wide(x[part]) for f, x in zip(factors, plain[1], strict=True)]
                near(made[part], np.sum(own, axis=0), dtype, f"ops.{op}")
            return "against NumPy"

        return check

    def of_ties(made: Array) -> str:
        right, sure = _exact_ties(*plain)
        near(made[sure], right[sure], dtype, "ops.ties")
        return f"against NumPy ({(~sure).mean():.2%} tie)"

    given: dict[str, Any] = {"density": DENSITY, "threads": threads}
    return {
        "linear": Case(
            lambda: ops.linear([a, b], WEIGHTS, threads=threads), theirs["linear"],
            sums("linear", WEIGHTS), 2,
        ),
        "slerp": Case(
            lambda: ops.slerp(a, b, T, threads=threads), theirs["slerp"], sums("slerp", on_arc), 2
        ),
        "ties": Case(
            lambda: ops.ties(base, [a, b], WEIGHTS, **given), theirs["ties"], of_ties, 3
        ),
        "dare_linear": Case(
            lambda: ops.dare_linear(base, [a, b], WEIGHTS, seed=1, **given), theirs["dare_linear"],
            partial(_is_dare, *plain, dtype), 3,
        ),
    }  # fmt: skip


def _tensor(array: Array, dtype: str) -> Any:
    from fastmerge.models.memory import as_torch

    return as_torch(array, BY_CODE[dtype], array.shape)


def _expressions(base: Any, a: Any, b: Any, count: int) -> dict[str, dict[str, Call]]:
    import torch

    from fastmerge.bench import expressions as plain

    few = count > _FEW  # the ways that are the fastest of tensors of 64 MiB
    trims, draws = (("kthvalue",), ("rand",)) if few else (plain.TRIMS, plain.DRAWS)
    return {
        "linear": {
            "lerp": lambda: torch.lerp(a, b, WEIGHTS[1]),
            "mul, add_": lambda: (a * WEIGHTS[0]).add_(b, alpha=WEIGHTS[1]),
        },
        "slerp": {
            "as they are": lambda: plain.slerp(a, b, T, wide=False),
            "in fp32": lambda: plain.slerp(a, b, T, wide=True),
        },
        "ties": {how: partial(plain.ties, base, [a, b], WEIGHTS, DENSITY, how) for how in trims},
        "dare_linear": {
            how: partial(plain.dare_linear, base, [a, b], WEIGHTS, DENSITY, how) for how in draws
        },
    }


def _bits(made: Any, dtype: str) -> Array:
    """A result as an array; bfloat16's bits."""
    if isinstance(made, np.ndarray):
        return made
    import torch

    array: NDArray[Any] = (made.view(torch.uint16) if dtype == "BF16" else made).numpy()
    return array


def bench(
    size: str, dtype: str, wanted: Sequence[str], seconds: float, *, threads: int, torch: bool
) -> list[Row]:
    """A row for each op, on tensors of ``size``."""
    nbytes = SIZES[size]
    count = nbytes * 8 // BY_CODE[dtype].bits
    if torch:
        import torch as pytorch

        pytorch.set_num_threads(threads)
    found_cases = cases(count, dtype, threads=threads, torch=torch)
    source, to = (np.zeros(nbytes, np.uint8) for _ in range(2))
    sources, tos = (np.array_split(array, threads) for array in (source, to))
    rows = []
    with ThreadPoolExecutor(threads) as pool:
        for op in wanted:
            case = found_cases[op]
            said = case.check(_bits(case.ours(), dtype).ravel())
            copies: dict[str, Call] = {
                name: partial(_together, pool, copy, sources, tos)
                for name, copy in ceilings.COPIES.items()
            }
            calls: dict[str, Call] = {
                "ours": case.ours, **case.torch, **copies,
                "read": partial(_together, pool, ceilings.read, sources),
            }  # fmt: skip
            if nbytes <= ceilings.ONE_THREAD:  # handing it to threads would take longer
                copies = {name: partial(c, source, to) for name, c in ceilings.COPIES.items()}
                calls |= {**copies, "read": partial(ceilings.read, source)}
            found = timed(calls, seconds)
            rows.append(_row(op, size, dtype, case, found, said, threads))
    return rows


def _together(pool: ThreadPoolExecutor, work: Callable[..., None], *pieces: list[Any]) -> None:
    list(pool.map(work, *pieces))


def _row(
    op: str,
    size: str,
    dtype: str,
    case: Case,
    found: dict[str, list[float]],
    checked: str,
    threads: int,
) -> Row:
    _, copied = ceilings.fastest({name: found[name] for name in ceilings.COPIES})
    ceiling = [c + (case.reads - 1) * r for c, r in zip(copied, found["read"], strict=True)]
    ours, moved = spread(found["ours"]), (case.reads + 1) * SIZES[size]
    row: Row = {
        "kind": "ops", "job": op, "tensor": size, "dtype": BY_CODE[dtype].name,
        "cache": "in memory", "threads": threads, "bytes": moved, "seconds": ours,
        "gigabytes_per_second": moved / ours["median"] / 1e9,
        "ceiling_seconds": spread(ceiling), "share_of_ceiling": ratios(ceiling, found["ours"]),
        "checked": checked, "peers": {},
        "runs": {"fastmerge" if name == "ours" else name: own for name, own in found.items()},
    }  # fmt: skip
    if case.torch:
        best = min(case.torch, key=lambda name: statistics.median(found[name]))
        row["peers"]["torch"] = {
            "seconds": spread(found[best]),
            "times": ratios(found[best], found["ours"]),
            "by": best,
        }
    return row


def own_costs(seconds: float, threads: int, *, torch: bool) -> list[Row]:
    """What a call for tensors of 4 Ki entries takes, and what its kernels do: the difference is the
    call's own. Of torch's tensors or NumPy's arrays.
    """
    count = 4096
    rng = np.random.default_rng(0)
    arrays: list[Any] = [rng.standard_normal(count).astype(np.float32) for _ in range(4)]
    base, a, b, out = [_tensor(array, "F32") for array in arrays] if torch else arrays
    views = [view_of(tensor, "") for tensor in (a, b)]
    origin, sink = view_of(base, ""), _C.MemorySink(view_of(out, "", writable=True), checked=False)
    pool, pair = cpu(threads).pool, np.array(WEIGHTS)
    trim = [Sparsify(MAGNITUDE, keep_count(DENSITY, count))] * 2

    def ties() -> None:
        kept = _C.select(pool, views, origin, trim)
        _C.consensus(pool, views, origin, WEIGHTS, kept, sink, elect=True, normalize=True)

    def slerp() -> None:
        _C.gram(pool, views)
        _C.combine(pool, views, pair, sink, wide=True)  # as fp32's measured sums are

    def combine() -> None:
        _C.combine(pool, views, pair, sink)

    how: dict[str, Any] = {"threads": threads}
    calls: dict[str, tuple[Call, Call]] = {
        "combine": (lambda: ops.combine([a, b], WEIGHTS, **how), combine),
        "linear": (lambda: ops.linear([a, b], WEIGHTS, **how), combine),
        "slerp": (lambda: ops.slerp(a, b, T, **how), slerp),
        "ties": (lambda: ops.ties(base, [a, b], WEIGHTS, density=DENSITY, **how), ties),
    }
    rows = []
    for op, (whole, kernels) in calls.items():
        found = timed({"call": whole, "kernels": kernels}, seconds)
        own = [c - k for c, k in zip(found["call"], found["kernels"], strict=True)]
        row = {"op": op, "of": "torch" if torch else "NumPy", "own": spread(own)}
        rows.append(row | {k: spread(v) for k, v in found.items()})
    return rows
