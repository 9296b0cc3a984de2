"""What a caller's type checker knows of calls and of what comes back; `make check` runs mypy over
it, and over the Python of docs/callers.md (docs/examples.py --python callers.md).

A comment that ignores an error is one that mypy must find: --strict tells those it does not need.
"""

from collections.abc import Mapping
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

# Deltas: every method that takes no more of its models, without a base.
assert_type(ops.task_arithmetic(None, [a], [1.0]), NDArray[np.float32])
assert_type(ops.ties(None, [a], [1.0], votes="plain", divisor="count"), NDArray[np.float32])
assert_type(ops.dare_linear(None, [a], [1.0], density=0.5, seed=1), NDArray[np.float32])
assert_type(ops.dare_ties(None, [a], [1.0], density=0.5, seed=1), NDArray[np.float32])
assert_type(ops.breadcrumbs(None, [a], [1.0]), NDArray[np.float32])
assert_type(ops.breadcrumbs_ties(None, [a], [1.0]), NDArray[np.float32])
assert_type(ops.della(None, [a], [1.0], density=0.5, seed=1), NDArray[np.float32])
assert_type(ops.della_linear(None, [a], [1.0], density=0.5, seed=1), NDArray[np.float32])
assert_type(ops.sce(None, [a]), NDArray[np.float32])
assert_type(ops.ram(None, [a]), NDArray[np.float32])
assert_type(ops.ramplus_tl(None, [a]), NDArray[np.float32])
assert_type(ops.magmax(None, [a]), NDArray[np.float32])
assert_type(ops.consensus_ta(None, [a]), NDArray[np.float32])
ops.model_stock(None, [a])  # type: ignore[type-var]
ops.ties(a, [a], [1.0], votes="plein")  # type: ignore[arg-type]
ops.prune(a, 0.5, "largest")  # type: ignore[arg-type]

# Models by any key, in a dictionary of whatever type.
by_name: dict[str, dict[str, NDArray[np.float32]]] = {"a": {"w": a}, "b": {"w": a}}
by_number: Mapping[int, object] = {0: {"w": a}, 1: {"w": a}}
fastmerge.merge_state_dicts(by_name, "slerp", base="a", parameters={"t": 0.5})
fastmerge.merge_state_dicts(by_number, "slerp", base=0, parameters={"t": 0.5})

# Options that are passed on to merge are known by name and type.
fastmerge.average(["a", "b"], "out", overwrite=True, device="cuda:1", io="direct")
fastmerge.average(["a", "b"], "out", overwrit=True)  # type: ignore[call-arg]
fastmerge.fold("base", "lora", "out", overwrite="yes")  # type: ignore[arg-type]
fastmerge.merge("r.yml", "out", io="fast")  # type: ignore[arg-type]
fastmerge.merg("r.yml", "out")  # type: ignore[attr-defined]

# Submodules are there.
there = (fastmerge.search.run, fastmerge.methods.register, fastmerge.averages.average)
packages = (fastmerge.evaluation, fastmerge.integrations, fastmerge.state_dicts)
