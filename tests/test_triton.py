"""The Triton kernels without a GPU: interpreted against the CPU's, and cross-compiled for the
targets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _run(file: str, *arguments: str, interpret: bool) -> str:
    """A test file in its own process: triton reads TRITON_INTERPRET once, when it is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    environment["PYTHONSAFEPATH"] = "1"
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("part", ["combine or fp8 or rounding", "gram or refuse", "select", "rest"])
def test_kernels_equal_the_cpu_kernels(part: str) -> None:
    named = "combine or fp8 or rounding or gram or refuse or select"
    output = _run("triton_cases.py", "-k", f"not ({named})" if part == "rest" else part,
                  interpret=True)  # fmt: skip
    assert " passed" in output and "failed" not in output


@pytest.mark.parametrize(
    "file",
    [
        "triton_draw_cases.py",
        "triton_leaf_cases.py",
        "triton_pointwise_cases.py",
        "triton_resident_cases.py",
        "triton_stream_cases.py",
        "triton_wide_cases.py",
    ],
)
def test_models_equal_the_cpu_engine(file: str) -> None:
    output = _run(file, interpret=True)
    assert " passed" in output and "failed" not in output


@pytest.mark.parametrize("part", ["cuda80", "cuda90", "cuda100", "gfx942", "per_element"])
def test_kernels_compile_without_a_gpu(part: str) -> None:
    output = _run("triton_targets.py", "-k", part, interpret=False)
    assert " passed" in output and "failed" not in output


def test_importing_the_package_of_kernels_imports_no_torch() -> None:
    code = "import fastmerge.kernels, sys; print('torch' in sys.modules or 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
