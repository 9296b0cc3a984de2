"""Every kernel in its hot configurations, compiled for each target without a GPU: no register
spills, 16-byte loads and stores, no contraction. test_triton.py runs this file without
TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmerge.kernels import (
    combine,
    common,
    consensus,
    divergence,
    draw,
    gram,
    leaves,
    pointwise,
    ranking,
    select,
)

TARGETS = {
    "cuda80": GPUTarget("cuda", 80, 32),
    "cuda90": GPUTarget("cuda", 90, 32),
    "cuda100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, BF16, E4M3 = 0, 2, 3
SHARED = {"HEAD": common.HEAD, "CHUNK": common.CHUNK, "ALIGNED": True}


def all_lanes(lanes):
    """A constant that depends on the target: the threads of one program."""
    return lanes


SEGMENTS = {"table": "*i64", "owners": "*i32"}


def _combine(codes, **more):
    constants = {**SHARED, "CODES": codes, "OUT": BF16, "DIVIDE": False, "WIDE": False, **more}
    numbers = "*fp64" if constants["WIDE"] else "*fp32"
    arguments = {**SEGMENTS, "coefficients": numbers, "bad_counts": "*i64"}
    constants["BLOCK"] = lambda lanes: common.per_lane(len(codes)) * lanes
    return combine.combine_kernel, arguments, constants


def _combine_vectors(axis, wide=False):
    numbers = "*fp64" if wide else "*fp32"
    arguments = {"table": "*i64", "coefficients": numbers, "bad_counts": "*i64", "divisor": "fp32"}
    arguments |= {"rows": "i32", "cols": "i32"}
    constants = {"CODES": (BF16, BF16), "OUT": BF16, "DIVIDE": False, "WIDE": wide, "AXIS": axis}
    constants |= {"BLOCK_ROWS": 2, "BLOCK_COLS": 1024, "HEAD": common.HEAD}
    return combine.combine_vectors_kernel, arguments, constants


def _gram(codes, based, tile=None):
    tile = tile or (0, len(codes), 0, len(codes))
    constants = {**SHARED, "CODES": codes, "BASED": based, "TILE": tile, "LANES": all_lanes}
    constants["VECTOR"] = gram.vector_elements(codes)
    return gram.gram_kernel, {**SEGMENTS, "partials": "*fp64"}, constants


def _gram_vectors(axis):
    arguments = {"table": "*i64", "result": "*fp64", "rows": "i32", "cols": "i32"}
    constants = {"CODES": (BF16, BF16, BF16), "BASED": True, "TILE": (0, 3, 0, 3), "AXIS": axis}
    constants |= {
        "LANES": all_lanes if axis else 32,
        "STEP": 4 if axis else 32,
        "HEAD": common.HEAD,
    }
    return gram.gram_vectors_kernel, arguments, constants


def _reduce():
    arguments = {"partials": "*fp64", "firsts": "*i64", "result": "*fp64"}
    return gram.reduce_kernel, arguments, {"PAIRS": 3, "WIDTH": 4, "STEP": 256}


def _consensus(modes, rescaled=False, elect=True, exact=False, votes=0):
    k = len(modes)
    arguments = {**SEGMENTS, "rules": "*i64", "numbers": "*fp32", "origins": "*i64"}
    arguments["bad_counts"] = "*i64"
    constants = {**SHARED, "CODES": (BF16,) * (k + 1), "OUT": BF16, "MODES": modes, "WIDE": False}
    constants |= {
        "RESCALED": (rescaled,) * k,
        "ELECT": elect,
        "NORMALIZE": True,
        "SCALED": not exact,
    }
    constants |= {"EXACT": exact, "VOTES": votes, "COUNTED": bool(votes)}
    constants |= {"BLOCK": partial(consensus.block, k), "RULE": consensus.RULE}
    return consensus.consensus_kernel, arguments, constants


def _rank(ranked, sample, kind=BF16):
    arguments = {**SEGMENTS, "strides": "*i64", "windows": "*i64", "counts": "*i64"}
    arguments["buffer"] = "*i64"
    constants = {**SHARED, "CODES": (kind,) * (len(ranked) + 1), "RANKED": ranked, "SAMPLE": sample}
    constants |= {"WIDE": False, "LANES": all_lanes, "SECTOR": select.SECTOR}
    constants |= {"WINDOW": select.WINDOW, "COUNTS": select.COUNTS, "GRANULE": select.GRANULE}
    return ranking.rank_kernel, arguments, constants


def _measure(mode=1):
    arguments = {**SEGMENTS, "rules": "*i64", "partials": "*fp64", "kept_counts": "*i64"}
    constants = {**SHARED, "CODES": (BF16, BF16, BF16), "MODES": (mode, mode), "WIDE": False}
    constants |= {
        "STEP": lambda lanes: ranking.VECTOR.value * lanes,
        "LANES": all_lanes,
        "RULE": consensus.RULE,
    }
    return ranking.measure_kernel, arguments, constants


def _nth():
    arguments = {"buffer": "*i64", "queries": "*i64", "owners": "*i32", "histograms": "*i32"}
    constants = {"QUERY": select.QUERY, "LEVELS": select.LEVELS, "PART": select.PART, "STEP": 2048}
    return ranking.nth_kernel, {**arguments, "answers": "*i64", "level": "i32"}, constants


DRAWN = {"CODES": (BF16, BF16), "HEAD": common.HEAD, "DRAW": draw.DRAW}


def _sample(width):
    arguments = {**SEGMENTS, "draws": "*i64", "samples": "*i64", "count": "i32"}
    constants = {**DRAWN, "SPLITTERS": width, "RUN": min(draw.RUN, width)}
    return draw.sample_kernel, arguments, {**constants, "BLOCK": lambda lanes: 8 * lanes}


def _count(strided):
    pointers = ("draws", "firsts", "splitters")
    arguments = {**SEGMENTS, **dict.fromkeys(pointers, "*i64"), "counts": "*i32", "steps": "i32"}
    constants = {**DRAWN, "STRIDED": strided, "CHUNK": common.CHUNK}
    return draw.count_kernel, arguments, {**constants, "BLOCK": lambda lanes: 8 * lanes}


def _decide(strided):
    pointers = ("draws", "splitters", "before", "bounds")
    arguments = {**SEGMENTS, **dict.fromkeys(pointers, "*i64"), "kept": "*i32"}
    arguments |= {"undecided": "*i32", "steps": "i32"}
    constants = {**DRAWN, "STRIDED": strided, "SPLITTERS": draw.SPLITTERS, "CHUNK": common.CHUNK}
    return draw.decide_kernel, arguments, {**constants, "BLOCK": lambda lanes: 8 * lanes}


def _look():
    pointers = ("table", "draws", "owners", "indices", "values", "vectors", "words")
    arguments = {**dict.fromkeys(pointers, "*i64"), "count": "i32"}
    return draw.look_kernel, arguments, {**DRAWN, "BLOCK": lambda lanes: 8 * lanes}


def _pointwise(formula, k, mode=0):
    shape = pointwise.FORMULAS[formula]
    arguments = {**SEGMENTS, "numbers": "*fp32", "rules": "*i64", "factors": "*fp32"}
    arguments |= {"origins": "*i64", "bad_counts": "*i64", "cols": "i32"}
    constants = {**SHARED, "CODES": (BF16,) * (k + 1), "OUT": BF16, "MODE": mode, "WIDE": False}
    constants |= {"FORMULA": shape.code, "NUMBERS": shape.numbers + k * shape.per_input + 1}
    constants |= {"BLOCK": partial(pointwise.block, k), "RULE": consensus.RULE}
    return pointwise.pointwise_kernel, arguments, constants


def _divergence(what):
    arguments = {"table": "*i64", "largest": "*fp32", "factors": "*fp64"}
    arguments |= {"found": "*fp32" if what == divergence.LARGEST else "*fp64"}
    arguments |= {"rows": "i32", "cols": "i32", "tiles": "i32"}
    constants = {"CODES": (BF16,) * 2, "WHAT": what, "TILE": divergence.TILE}
    constants |= {"UNITS": divergence.units, "SUM_LANES": divergence.SUM_LANES}
    return divergence.divergence_kernel, arguments, constants


def _moves(what):
    arguments = {"table": "*i64", "row_numbers": "*fp32", "found": "*fp64"}
    arguments |= {"rows": "i32", "cols": "i32", "tiles": "i32"}
    constants = {"CODES": (BF16,) * 2, "WHAT": what, "TILE": divergence.TILE}
    constants |= {"UNITS": divergence.moved_units, "MOVE_LANES": divergence.MOVE_LANES}
    return divergence.moves_kernel, arguments, constants


def _dequantise(coding):
    arguments = {"codes": "*u8" if coding == "mxfp4" else "*i8"}
    arguments |= {"scales": "*u8" if coding == "mxfp4" else "*fp32", "out": "*fp32"}
    sizes = ("total_rows", "rows", "cols", "block_rows", "block_cols")
    constants = {"CODING": leaves.CODINGS[coding], "ROWS": leaves.ROWS, "COLS": leaves.COLS}
    return leaves.dequantise_kernel, arguments | dict.fromkeys(sizes, "i32"), constants


def _low_rank(code, raw):
    arguments = {"base": raw, "left": "*fp32", "right": "*fp32", "out": "*fp32"}
    arguments |= {"rows": "i32", "cols": "i32", "rank": "i32", "scale": "fp32"}
    return leaves.low_rank_kernel, arguments, {
        "CODE": code, "ROWS": leaves.ROWS, "COLS": leaves.COLS,
    }  # fmt: skip


# name -> (kernel, arguments, constants), vector loads and stores expected
CASES = {
    "combine_1": (_combine((BF16,)), True),
    "combine_2": (_combine((BF16,) * 2), True),
    "combine_3": (_combine((BF16,) * 3), True),
    "combine_16": (_combine((BF16,) * 16, DIVIDE=True), True),
    "combine_f32": (_combine((F32, F32), OUT=F32), True),
    "combine_fp8": (_combine((E4M3, E4M3)), True),
    "combine_wide": (_combine((F32, F32), OUT=F32, WIDE=True), True),
    "combine_wide_3": (_combine((BF16,) * 3, OUT=F32, WIDE=True), True),
    "combine_wide_16": (_combine((BF16,) * 16, OUT=F32, WIDE=True), True),
    "combine_rows": (_combine_vectors(1), False),
    "combine_wide_rows": (_combine_vectors(1, True), False),
    "combine_columns": (_combine_vectors(0), False),
    "gram_2": (_gram((BF16,) * 2, False), True),
    "gram_based": (_gram((BF16,) * 3, True), True),
    "gram_6": (_gram((BF16,) * 6, False), True),
    "gram_tile": (_gram((BF16,) * 17, True, (4, 8, 0, 4)), True),
    "gram_mixed": (_gram((BF16, F32), False), True),
    "gram_rows": (_gram_vectors(1), False),
    "gram_columns": (_gram_vectors(0), False),
    "reduce": (_reduce(), False),
    "consensus_ties": (_consensus((2, 2)), True),
    "consensus_band": (_consensus((4, 5)), True),
    "consensus_exact": (_consensus((2, 2), exact=True), True),
    "consensus_votes": (_consensus((2, 2), votes=2), True),
    "consensus_task": (_consensus((0, 0), elect=False), True),
    "consensus_dare": (_consensus((1, 1), rescaled=True), True),
    "consensus_8": (_consensus((2,) * 8), True),
    "consensus_16": (_consensus((2,) * 16), False),
    "rank": (_rank((1, 1), False), True),
    "rank_index": (_rank((2, 2), False), True),
    "rank_4": (_rank((1,) * 4, False), True),
    "rank_f32": (_rank((1, 1), False, F32), True),
    "rank_sample": (_rank((1, 1), True), False),
    "nth": (_nth(), False),
    "measure": (_measure(), True),
    "measure_masked": (_measure(6), True),
    "consensus_masked": (_consensus((6, 6), rescaled=True), True),
    "draw_sample": (_sample(draw.SPLITTERS), False),
    "draw_sample_1": (_sample(1), False),
    "draw_count": (_count(False), False),
    "draw_count_strided": (_count(True), False),
    "draw_decide": (_decide(False), False),
    "draw_decide_strided": (_decide(True), False),
    "draw_look": (_look(), False),
    "pointwise_near_swap": (_pointwise("near_swap", 1), True),
    "pointwise_reinforced": (_pointwise("reinforced", 3), True),
    "pointwise_sce": (_pointwise("select_and_erase", 3, 2), True),
    "pointwise_fuse": (_pointwise("fuse", 1), True),
    "pointwise_agreed": (_pointwise("agreed", 3), True),
    "pointwise_16": (_pointwise("reinforced", 16), False),
    "pointwise_sce_4": (_pointwise("select_and_erase", 4, 2), True),
    "pointwise_sce_8": (_pointwise("select_and_erase", 8, 2), False),
    "pointwise_sce_16": (_pointwise("select_and_erase", 16, 2), False),
    "divergence_largest": (_divergence(divergence.LARGEST), False),
    "divergence_sum": (_divergence(divergence.SUM), False),
    "divergence": (_divergence(divergence.DIVERGENCE), False),
    "divergence_far": (_moves(divergence.FAR), False),
    "divergence_terms": (_moves(divergence.TERMS), False),
    "dequantise_e4m3": (_dequantise("e4m3"), False),
    "dequantise_mxfp4": (_dequantise("mxfp4"), False),
    "low_rank": (_low_rank(BF16, "*i16"), False),
    "low_rank_f32": (_low_rank(F32, "*i32"), False),
}


def _registers(case, constants):
    """The limit that the launch of this case sets; None where it sets none."""
    if case.startswith(("rank", "nth", "measure", "pointwise", "draw")):
        return common.MOST_REGISTERS
    if case.startswith("consensus"):
        return common.register_limit(2 * len(constants["MODES"]))
    if case.startswith("gram") and case not in ("gram_rows", "gram_columns"):
        return common.register_limit(2 * len(constants["CODES"]))
    return common.register_limit(len(constants["CODES"])) if case.startswith("combine") else None


def _compiled(case, target):
    kernel, arguments, constants = CASES[case][0]
    lanes = common.WARPS * target.warp_size
    constants = {k: v(lanes) if callable(v) else v for k, v in constants.items()}
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(arguments.values()) if "*" in t
    }
    source = ASTSource(kernel, signature, constants, aligned)
    fused = gram.FUSED if kernel is gram.gram_kernel else False
    options = {"num_warps": common.WARPS, "enable_fp_fusion": fused}
    if target.backend == "cuda" and (limit := _registers(case, constants)):
        options["maxnreg"] = limit
    return triton.compile(source, target=target, options=options)


def _ptxas_spills(ptx: str, folder: Path) -> list[int]:
    """Bytes spilled, as ptxas counts them (a cubin's own figures need a device to be read)."""
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    (folder / "kernel.ptx").write_text(ptx)
    command = ["-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("ptxas-blackwell", "ptxas"):  # the newer one, where this triton has it
        if (binaries / name).exists():
            whole = [str(binaries / name), *command]
            done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=True)
            break
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr + done.stdout)
    assert found, done.stderr
    return [int(count) for count in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, case, tmp_path):
    compiled = _compiled(case, TARGETS[target])
    (_, _, constants), wide = CASES[case]
    inputs = 8 if case == "gram_tile" else len(constants.get("CODES", ()))
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers, not to memory, and are let be.
        assert re.search(r"\.vgpr_spill_count:\s+0\b", code)
        assert re.search(r"\.private_segment_fixed_size:\s+0\b", code), "scratch memory in use"
        assert code.count("global_load_dwordx4") >= inputs or not wide
        fused = re.findall(r"\bv_(?:pk_)?fma_f32|\bv_(?:mac|fmac|mad)_f32", code)
    else:
        code = compiled.asm["ptx"]
        assert not any(_ptxas_spills(code, tmp_path))
        if wide:
            loads = re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64|8\.b16)", code)
            assert len(loads) >= inputs
        # One term's sum starts from -0.0, which is the product itself, and not from 0.0.
        assert case != "combine_1" or not re.search(r"fma\S*f32[^;]*, 0f00000000;", code)
        if wide and case.startswith(("combine", "consensus", "pointwise")):
            assert re.search(r"st\.global\S*\.v(?:4\.b32|2\.b64|8\.b16)", code)
            # By the GPU's own rounding; a rounding by hand is eight instructions an element.
            assert constants.get("OUT") != BF16 or "cvt.rn.bf16" in code
        assert ".ftz" not in code
        fused = re.findall(r"\bfma\.rn\S*f32\S*", code)
    # These are written with FMA; elsewhere one would be a contraction. (AMD divides with FMAs.)
    divides = target == "gfx942" and case.startswith(
        ("consensus", "rank_sample", "pointwise", "divergence", "draw_count", "draw_decide")
    )
    written = (
        case.startswith(("combine", "low_rank"))
        and case != "combine_1"
        and (not constants.get("WIDE"))
    )
    assert bool(fused) == written or divides


# Of the hot loop for each element (sm_90, triton 3.6 to 3.9): machine instructions, and a few more;
# bytes that it reads and writes, which are those of its tensors. An H200's schedulers issue 0.92e12
# instructions a second for 32 lanes, so that each takes 0.23 ms of 6.7e9 elements; its memory takes
# 1.6 ms for each byte of them.
MOST_PER_ELEMENT = {
    "combine_2": (14, 4, 2),
    "combine_3": (17, 6, 2),
    "gram_2": (13, 4, 0),
    "rank": (88, 6, 18),  # would write so much if all lay in the window, where 1 % or so do
    "nth": (28, 8, 0),  # of a value that was gathered
    "measure": (61, 4, 0),  # of one delta
    "consensus_ties": (76, 6, 2),
    "consensus_exact": (60, 6, 2),
    "consensus_dare": (94, 6, 2),
    "pointwise_near_swap": (40, 4, 2),
    "pointwise_reinforced": (98, 8, 2),
    "pointwise_agreed": (44, 8, 2),
}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; 4 without a word


def _bytes(instruction: str) -> int:
    """What one thread moves by it."""
    return next((WIDTHS[word] for word in instruction.split(".") if word in WIDTHS), 4)


def _hot_loop(case, folder):
    """The instructions of the longest loop, each with its modifiers."""
    (folder / "kernel.cubin").write_bytes(_compiled(case, TARGETS["cuda90"]).asm["cubin"])
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(binary), "-c", str(folder / "kernel.cubin")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    every: list[str] = []
    longest: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(every)
        elif word := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            every.append(word[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, every[labels[back[1]] :], key=len)
    return longest


@pytest.mark.parametrize("case", MOST_PER_ELEMENT)
def test_work_per_element(case, tmp_path):
    """What can be known of a kernel's speed without a GPU."""
    _, _, constants = CASES[case][0]
    lanes = common.WARPS * 32
    if "BLOCK" in constants:
        step = constants["BLOCK"](lanes)
    else:
        step = constants["STEP"] if case == "nth" else ranking.VECTOR.value * lanes
    loop = _hot_loop(case, tmp_path)
    read = sum(_bytes(word) for word in loop if word.startswith("LDG"))
    written = sum(_bytes(word) for word in loop if word.startswith("STG"))
    found = tuple(count * lanes / step for count in (len(loop), read, written))
    print(f"{case}: {found[0]:.1f} instructions, {found[1]:g} bytes read, {found[2]:g} written")
    assert found[0] > 0 and found[1] > 0
    assert all(a <= b for a, b in zip(found, MOST_PER_ELEMENT[case], strict=True)), found
