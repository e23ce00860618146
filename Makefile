# make demo and make test do everything on a fresh machine; python3 is 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
STARTED := $(shell date +%s)
PYTEST := $(BIN)/python -m pytest -n 2
# Tests start many processes; none should compile Python's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check lint docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: .venv/installed  ## install, train on real digits, sample, classify; into runs/demo
	$(BIN)/python benchmarks/digits.py --workdir=runs/demo --started=$(STARTED)

test: .venv/installed-test  ## install, then the whole test suite
	$(PYTEST) --dist loadfile --no-loadscope-reorder

check: lint  ## lint and the fast tests
	$(PYTEST) -m "not slow" --dist load

lint: .venv/installed-test  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed-docs  ## the pages of docs/ as a site to read offline, in build/site
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo build/site/index.html

# Python compiles a module when it is first imported; to compile all of them now takes longer.
PIP := $(BIN)/pip install --quiet --no-compile

# The pip that comes with Python 3.11 takes twice as long to install what follows as today's.
.venv/pip:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	touch $@

.venv/installed: .venv/pip setup.cfg pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/installed-docs: .venv/pip setup.cfg pyproject.toml
	$(PIP) --editable '.[docs]'
	touch .venv/installed $@

# PyTorch is for the tests of jdm convert, at the version of constraints.txt.
.venv/installed-test: .venv/pip setup.cfg pyproject.toml constraints.txt
	$(PIP) --editable '.[test,torch,serve,gcs]' --constraint constraints.txt
	touch .venv/installed $@

clean:  ## remove the environment and caches
	rm -rf .venv .cache .mypy_cache build *.egg-info
