# Two commands to a result: `make demo`, `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKDIR ?= runs/tiny

.PHONY: help env demo test test-fast test-slow format lint clean

help:  ## Lists the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

env: $(VENV)/core.stamp  ## Creates .venv with what a CPU run needs.

$(VENV)/core.stamp: pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	@$(PIP_INSTALL) torch==2.13.0
	@$(PIP_INSTALL) -e .[dev]
	@touch $@

demo: env  ## The whole loop on the toy world: at most 15 minutes on two cores.
	@$(BIN)/python -m launch.self_develop --config=configs/tiny.py --workdir=$(WORKDIR)

test: test-fast test-slow  ## All tests, the fast ones first.

test-fast: $(VENV)/dev.stamp  ## The fast tests: under two minutes.
	@$(BIN)/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile

test-slow: $(VENV)/dev.stamp  ## The whole-loop tests.
	@$(BIN)/python -m pytest -m slow

format: $(VENV)/dev.stamp  ## Formats the code and mends what ruff can.
	@$(BIN)/python -m pyink --quiet selfdev_jax configs launch tests
	@$(BIN)/python -m ruff check --fix --quiet selfdev_jax configs launch tests

lint: $(VENV)/dev.stamp  ## Fails on unformatted code and on what ruff finds.
	@$(BIN)/python -m pyink --check --quiet selfdev_jax configs launch tests
	@$(BIN)/python -m ruff check selfdev_jax configs launch tests

clean:  ## Removes the virtual environment and the runs, not the cached toy world.
	rm -rf $(VENV) runs
