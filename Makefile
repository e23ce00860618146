# make demo and make test do everything on a fresh machine; python3 is 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
STARTED := $(shell date +%s)

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python benchmarks/digits.py --workdir=runs/demo --started=$(STARTED)

test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# PyTorch is for the tests of jdm convert, at the version of constraints.txt.
.venv/installed-test: .venv/installed constraints.txt
	$(BIN)/pip install --quiet --editable '.[test,torch]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info
