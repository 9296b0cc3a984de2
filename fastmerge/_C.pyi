"""The compiled extension: CPU kernels, the thread pool and file I/O. Its one written interface.

dtype strings are safetensors codes: "F32", "F16", "BF16", and "RAW" for bytes that are only copied.
Every call that touches weights releases the GIL. Bad arguments raise ValueError, I/O errors raise
OSError with the path; neither is meant for users: fastmerge's own layers check first and word it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.selection import Selection, Sparsify

def isa() -> str: ...  # the instruction set in use: scalar, neon, avx2 or avx512
def isas() -> list[str]: ...  # those this CPU can run, best first
def set_isa(name: str) -> None: ...  # for tests; ValueError names the known ones
def tile_entries() -> int: ...  # what select_across's origins are multiples of

class View:
    """``count`` contiguous elements at ``address``; keeps ``owner`` alive. Never copies."""

    def __init__(self, address: int, count: int, dtype: str, owner: object) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def slice(self, begin: int, end: int) -> View: ...
    @property
    def is_gathered(self) -> bool: ...  # has no address

def zeros(count: int, dtype: str) -> View:
    """``count`` zeros, which take no memory; the view has no address, as `gathered`'s."""

def gathered(
    rows: NDArray[np.uint64],
    types: Sequence[str],
    kinds: NDArray[np.uint8],
    cols: int,
    dtype: str,
    owner: object,
) -> View:
    """A matrix whose rows of ``cols`` elements lie at the addresses ``rows``, row i stored as
    types[kinds[i]]: ``dtype``, or any type where that is F32. It has no address; every
    primitive and `copy` read it.
    """

class Program:
    """What a merge does with its tensors, all of one element type and count, once Python has
    decided what does not depend on their numbers.
    """

class Sum(Program):
    """`combine` of the tensors at ``parts`` of a call; with a ``rule``, by the coefficients that it
    makes of their `gram`, and whether they are summed in fp64. ``reference``: which of the parts
    the others' deltas are taken to, for `gram`.
    """

    def __init__(
        self,
        parts: Sequence[int],
        coefficients: Sequence[float] = (),
        *,
        divisor: float | None = None,
        rule: Callable[[list[list[float]]], tuple[Sequence[float], bool]] | None = None,
        reference: int | None = None,
    ) -> None: ...

class Vote(Program):
    """`select` and `consensus` of all tensors but the last, their base; with as many tensors as
    requests they are deltas. No request is for a draw by rank. ``factors``: `Selection.rescale`
    where they are not 1.
    """

    def __init__(
        self,
        specs: Sequence[Sparsify],
        weights: Sequence[float],
        factors: Sequence[float],
        *,
        elect: bool,
        normalize: bool,
        scale: float,
        origin: int,
        votes: int,
        counted: bool,
    ) -> None: ...

class Alike:
    """CPU tensors of one shape that a call has checked: torch's, or NumPy's arrays.

    Whatever is like them in all that `fastmerge.compute.arrays.Operands` checks (class, element
    type, shape, layout, device, memory) is taken by comparison.
    """

    def __init__(self, tensors: list[Any], dtypes: Sequence[str]) -> None: ...
    def views(self, tensors: list[Any]) -> list[View] | None:
        """One of each; None where one differs, for whatever reason."""

    def sink(self, tensor: Any, views: Sequence[View]) -> MemorySink | None:
        """Where one like the first is written, without a check for NaN; None where it differs, is
        read-only, or shares a part of a view's memory.
        """

    def run(
        self,
        program: Program,
        pool: Pool,
        tensors: list[Any],
        out: Any,
        make: Callable[[Any], Any],
        keeps_equal: Callable[[], bool] | None,
    ) -> Any:
        """A program's result for tensors like these, in ``out``, or where that is None in what
        ``make`` gives for the first: as `views`, `sink` and the kernels do, without an object for
        each. None where a tensor or ``out`` is not as it was, and nothing is written then.

        With ``keeps_equal``, tensors that are all equal give the first where it returns true. The
        GIL is released for more than 4 Ki entries.
        """

def usual_threads() -> int:
    """The CPUs this process may use; 0 where FASTMERGE_NUM_THREADS is set, or nobody knows."""

class Pool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class Sink:
    """Where a kernel writes one tensor: memory, or staging buffers on their way to a file."""

    @property
    def count(self) -> int: ...
    @property
    def dtype(self) -> str: ...

class MemorySink(Sink):
    """Not ``checked``: NaN and Inf are not counted, kernels return 0."""

    def __init__(self, out: View, *, checked: bool = True) -> None: ...

# --- kernels: the four primitives ---
# axis: None = the whole tensor is one vector; 1 = each row of a (rows, cols) matrix is one (vectors
# = rows); 0 = each column is one (vectors = cols). rows and cols are ignored when axis is None.

def gram(
    pool: Pool,
    inputs: Sequence[View],
    base: View | None = None,
    *,
    axis: int | None = None,
    rows: int = 1,
    cols: int = 0,
) -> NDArray[np.float64]:
    """Inner products, float64, shape (m, m) or (vectors, m, m).

    Without base, m = k and G[i, j] = <x_i, x_j>. With base, m = k + 1 and the vectors are
    [base, x_1 - base, ..., x_k - base] in that order, differences rounded to fp32.
    """

def combine(
    pool: Pool,
    inputs: Sequence[View],
    coefficients: NDArray[np.float64],
    out: Sink,
    *,
    divisor: float | None = None,
    axis: int | None = None,
    rows: int = 1,
    cols: int = 0,
    wide: bool = False,
) -> int:
    """out = (sum_i c_i x_i) / divisor, fp32 FMA in input order, one rounding; returns how many
    outputs are NaN/Inf.

    ``wide``: in fp64, products and sums each rounded there, then to fp32; no divisor.
    coefficients: shape (k,) or (vectors, k), rounded to fp32 unless ``wide``. An input whose
    coefficient is exactly 0 is skipped (so c = (1, 0) returns x_0 bit for bit, NaN and -0.0
    included); all-zero coefficients give +0.
    """

def select(
    pool: Pool,
    inputs: Sequence[View],
    base: View,
    specs: Sequence[Sparsify],
    masks: Sequence[View | None] = (),
) -> list[Selection]:
    """For each delta x_i - base (fp32), which entries survive: exactly those that
    fastmerge.selection says. The bits of a RANKED request go to its mask, F32 memory for 32
    elements a word, and so do those of a RANDOM one that has a mask, unless it keeps all or none;
    the selections' own are None. A rescale is the quotient of two float64 sums,
    rounded to fp32, and 1 where either is below 1e-7 (as in mergekit 0.1.5).
    """

def select_across(
    pool: Pool,
    inputs: Sequence[Sequence[View]],
    bases: Sequence[View],
    origins: Sequence[int],
    specs: Sequence[Sparsify],
    ends: Sequence[int] = (),
    passes: Callable[[int, Callable[[int], bytes]], Sequence[bytes]] | None = None,
) -> list[Selection]:
    """`select` of several tensors as one long vector: ``inputs`` and ``bases`` by tensor. The flat
    index of a tensor's first element is its origin: rising multiples of `tile_entries` with room
    for it. With ``passes`` other processes share the work: piece i of the tensors ends before
    tensor ends[i], and each pass over them is passes(pieces, count), which gives every piece's
    result in order: count(piece), in any process. All processes make the same passes.
    """

def consensus(
    pool: Pool,
    inputs: Sequence[View],
    base: View,
    weights: Sequence[float],
    selections: Sequence[Selection],
    out: Sink,
    masks: Sequence[View | None] = (),
    *,
    elect: bool,
    normalize: bool,
    scale: float = 1.0,
    origin: int = 0,
    votes: int = 0,
    counted: bool = False,
) -> int:
    """out = base + scale * merge(mask_i * rescale_i * (x_i - base) * w_i), fp32, no FMA, one
    rounding; returns how many outputs are NaN/Inf.

    merge is the sum, or with elect, per entry, the sum of those with the sign of the fp32 sum of
    all (zero counts as +); with normalize, over the sum of their weights, which counts as 1 where
    it is 0 (elect) or below 1e-8 in size. Order of operations as mergekit 0.1.5 in float32 (task
    arithmetic; TIES: Yadav et al., arXiv:2306.01708; DARE: Yu et al., arXiv:2311.03099): masks
    multiply, so that NaN and Inf survive them, and sums start from +0. masks: those of RANKED
    selections, as `select` filled them, and of RANDOM ones that need not be drawn again. origin:
    the flat index of the first element (see select_across).

    votes: with elect, the sign is that of the sum of the masked, rescaled deltas without their
    weights (1: TIES' paper, section 4.2; PEFT 0.21's "total") or of those deltas' signs, NaN
    counting as 0 (2: PEFT's "frequency"); a delta agrees where its own sign is that one, and its
    weight comes after. counted: a delta that takes part counts as 1 in the divisor, not its weight.
    """

def low_rank(
    base: View,
    left: View,
    right: View,
    rank: int,
    scale: float,
    *,
    factors: NDArray[np.float32] | None = None,
    by_column: bool = False,
    matrices: int = 1,
) -> View:
    """base + scale * (left @ right): an F32 matrix that has no address; every primitive and `copy`
    compute it where they read it.

    left: (rows, rank) and right: (rank, cols), F32 with an address; of several ``matrices``, which
    take no factors, all lefts one after another and all rights. Entry (i, j) is fp32: the sum
    of left[i, k] * right[k, j] from +0 in the order of k, each a fused multiply-add; one more of
    that sum, the scale and the base's entry; with ``factors``, that times the row's factor, or
    (by_column) the column's. (Hu et al., arXiv:2106.09685, section 4.1; factors: DoRA, Liu et al.,
    arXiv:2402.09353, equation 5.)
    """

def pointwise(
    formula: str,
    inputs: Sequence[View],
    base: View,
    numbers: Sequence[float],
    *,
    selection: Selection | None = None,
    factors: NDArray[np.float32] | None = None,
    operations: Sequence[tuple[str, int, int, int, int]] = (),
) -> View:
    """An F32 tensor that has no address: every primitive and `copy` compute it where they read it.

    Entry by entry of d_i = x_i - base, fp32 operations in this order, no FMA; sums start from +0
    and run in the models' order, and [c] is 1 where c holds, else 0, by which numbers are
    multiplied (so that NaN and Inf survive). ``numbers`` in brackets; ``factors``: f, one for each
    row. keep is 1 where ``selection`` keeps the variance, or where there is none.

    zero: 0.
    near_swap [t]: w x + (1 - w) base, w = min(max(1 / max(|base - x|, 1e-6) * t, 0), 1).
    active [e, n]: [exactly n of the |d_i| > e].
    reinforced [e, g_1 ... g_k]: base + sum_i (a_i [n = 1] g_i + a_i [n > 1] / max(n, 1)), a_i = d_i
    [|d_i| > e], n how many are.
    variance: of the d_i over the models, fp64 (Welford), rounded.
    varied: keep. varied_delta [i]: d_i keep.
    select_and_erase [w_1 ... w_k]: base + sum_i D_i u_i / max(sum_i u_i, 1e-6), D_i = d_i keep,
    u_i = w_i [D_i has the sign of sum_i D_i, 0 counting as +].
    importance, f: |d| f. fuse [s], f: base + d [|d| f >= s].
    largest [s]: base + d s, d the d_i of largest size, the first of equals.
    agreed [n, s, w_1, l_1 ...]: base + S [at least n of |d_i| >= |S - d_i| l_i] s, S = sum_i d_i
    w_i.
    expression [c_0 ...]: what the last of the ``operations`` gives, each (name, to, a, b, c): place
    ``to`` from the places a, b and c. Places are numbered: the k inputs, the base, then results,
    which are written before they are read and never by what reads them. constant: c_a. copy: a.
    add, subtract, multiply, divide: of a and b. negative, absolute: of a. minimum: b where b < a,
    else a; maximum: b where b > a, else a. less, less_equal: [a < b], [a <= b]. where: b where a is
    not 0, else c.
    """

def dequantised(
    coding: str,
    codes: View,
    scales: View,
    *,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
) -> View:
    """An F32 tensor that has no address: matrices of (rows, cols), each number a code times the
    scale of its block of (block_rows, block_cols), fp32, one rounding; blocks at a matrix's ends
    are cut short. Every primitive and `copy` compute it where they read it.

    ``codes`` are RAW bytes. coding "e4m3" and "e5m2": one byte a number (Micikevicius et al.,
    arXiv:2209.05433), row-major; scales F32, F16, BF16, or RAW for E8M0, 2^(byte - 127), one for
    each block, row-major, matrix by matrix. "mxfp4" (OCP Microscaling Formats v1.0): E2M1, two
    numbers to a byte, the low four bits first, each matrix stored transposed as (cols, rows / 2);
    RAW E8M0 scales for blocks of (32, 1), stored (cols, rows / 32). 255 is E8M0's NaN.
    """

def narrowed(numbers: View) -> View:
    """An F32 tensor that has no address: float64 ``numbers``, RAW bytes, each rounded once, to
    nearest even. Every primitive and `copy` compute it where they read it.
    """

def quantise(
    pool: Pool,
    source: View,
    coding: str,
    codes: Sink,
    scales: Sink,
    *,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    power_of_two: bool,
) -> tuple[int, float, float]:
    """The inverse of `dequantised`: fp32 numbers at one address to ``codes`` (RAW) and ``scales``
    (RAW: E8M0), in its layouts. Returns how many numbers are NaN or Inf, and the fp64 sums over the
    others of (code * scale - x)^2 and of x^2.

    Eight-bit floats: a block's scale is its largest finite size over the coding's largest number
    (448, 57344), the quotient in fp32, with ``power_of_two`` or in E8M0 the next power of two, then
    rounded to its type; 1 where that is 0. Codes are x over the stored scale in fp32, to nearest
    even, no larger than the largest: infinities too; NaN is 0x7F. MXFP4 by OCP Microscaling Formats
    v1.0, section 6.3: the scale is 2^(floor(log2(largest)) - 2), exponents kept within E8M0's, 1
    where all are 0; codes as above.
    """

def bad_scale(scales: View) -> int | None:
    """The index of the first scale that is no finite number above 0; of RAW ones, which are E8M0,
    of the first 255.
    """

def divergences(pool: Pool, x: View, base: View, cols: int) -> NDArray[np.float64]:
    """Of each row of ``cols`` elements, sum p ln(p / q), p and q the softmax of x and of the base,
    each plus 1e-8; fp64, right to some 1e-6 however little a row has moved (rows within 1/8 of the
    base by fp32 terms in which nothing cancels: csrc/kernels/divergence.inl).
    """

def equal(pool: Pool, a: View, b: View) -> bool:
    """Whether both have one dtype and the same bytes; reads little where they differ early."""

def copy(pool: Pool, source: View, out: Sink) -> None:
    """Copies bytes; source and out have the same dtype and count."""

# --- reading ---

class Mapping:
    """A file mapped read-only."""

    def __init__(self, path: str) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def torn(self) -> bool:
        """Whether a page of it was gone when it was read (the file shrank, its disk failed): that
        page and all after it have read as zeros since.
        """
    def view(self, offset: int, count: int, dtype: str) -> View: ...
    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks for the pages soon to be read: read-ahead if cold, page tables filled at once if
        warm."""

    def drop(self, offset: int, nbytes: int) -> None:
        """Unmaps whole pages of the range that will not be read again (they stay in the page
        cache)."""

# --- writing ---

class Checksum:
    """The sums of a tensor's blocks of 4096 bytes, counted from its first byte, the last block
    filled up with zeros: sum over the block's 1024 words of 32 bits (little endian) of
    word_j * key_j mod 2^64, key_j being output j of splitmix64 from state 0. Any pieces, any order,
    any number of threads, the same sums.
    """

    def __init__(self, nbytes: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def add_all(self, pool: Pool, tensor: View) -> None:
        """A whole tensor in memory; a sink adds its own bytes."""

    def sums(self) -> NDArray[np.uint64]:
        """One for each block; RuntimeError before every byte was added."""

class Staging:
    """A bounded set of aligned buffers and the threads that write them out; shared by all shards of
    a merge.

    buffer_bytes: a power of two. With W tensors in flight in file order, 2 W + 2 buffers never wait
    for each other; fewer still work, by writing unfinished chunks and reading them back (``spills``
    counts those).
    """

    def __init__(self, buffer_bytes: int, buffers: int, threads: int) -> None: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def spills(self) -> int: ...
    def close(self) -> None: ...

class StagedFile:
    """A preallocated file filled out of order in aligned chunks, by direct I/O where the file
    system has it.

    io: "auto" (direct where it works, else buffered), "direct" (OSError where it does not) or
    "buffered".
    """

    def __init__(
        self, staging: Staging, path: str, size: int, *, io: str = "auto", resume: bool = False
    ) -> None: ...
    @property
    def direct(self) -> bool: ...
    def sink(
        self,
        offset: int,
        count: int,
        dtype: str,
        *,
        checksum: Checksum | None = None,
        first: int = 0,
    ) -> Sink:
        """The sink of one tensor at a byte offset; its bytes are added to the checksum as those
        from byte ``first`` on.
        """

    def write(self, offset: int, data: bytes) -> None:
        """Fills a range from memory (a header, say), piece by piece as a kernel would."""

    def done(self, offset: int, nbytes: int) -> bool:
        """Whether every byte of the range has been handed to the kernel by a finished write."""

    def keep(self, offset: int, nbytes: int) -> None:
        """On resume: these bytes are already in the file; chunks shared with others preload
        them."""

    def finish(self) -> None:
        """Waits for the writes, fsyncs, truncates to size; raises the first write error (OSError
        with the path)."""

    def abandon(self) -> None:
        """Stops writing and closes without a word."""
