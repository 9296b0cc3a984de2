"""What a caller's type checker knows of what comes back; `make check` runs mypy over it."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import fastmerge
from fastmerge import MergeReport, ops
from fastmerge.planning.plan import Plan

a: NDArray[np.float32] = np.zeros(4, np.float32)
assert_type(ops.linear([a, a], [0.5, 0.5]), NDArray[np.float32])
assert_type(ops.ties(a, [a], [1.0], density=0.5, out=a), NDArray[np.float32])
assert_type(ops.merge("slerp", [a, a], {"t": 0.5}), NDArray[np.float32])
assert_type(ops.combine([a], [2]), NDArray[np.float32])
assert_type(fastmerge.plan("r.yml"), Plan)
assert_type(fastmerge.merge("r.yml", Path("out"), progress=True), MergeReport)
