# Every command makes its own environment in .venv; nothing else needs to be installed but Python 3.10+ and a C++17 compiler.
.PHONY: help demo test check format bench wheel clean
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
CONSTRAINTS := tests/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)
BUILD_INPUTS := pyproject.toml setup.py $(CONSTRAINTS) $(shell find csrc -type f)

help:
	@echo "make demo    two small llamas, merged, compared and asked a question"
	@echo "make test    every test, in .venv"
	@echo "make check   ruff, ruff format, mypy --strict, clang-format"
	@echo "make format  rewrites the sources as check wants them"
	@echo "make bench   merge speed against mergekit and the machine's floor (BENCH=... for options)"
	@echo "make wheel   sdist and wheel in dist/"

# One environment per set of extras would cost minutes; one environment grows from demo to test.
.venv/.demo .venv/.test: .venv/.%: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools wheel pybind11
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $@

demo: .venv/.demo
	$(BIN)/python benchmarks/demo.py $(DEMO)

# PYTHONSAFEPATH keeps the repository's root, and with it the bare name `kernels`, off sys.path.
test: .venv/.test
	PYTHONSAFEPATH=1 $(BIN)/pytest -q -n $(JOBS) $(TEST)

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run -Werror

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format -i

bench: .venv/.test
	$(BIN)/python benchmarks/merge_model.py $(BENCH)

wheel: .venv/.test
	$(PIP) build
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist demo *.egg-info fastmerge/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
