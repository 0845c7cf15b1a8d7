# make run    set everything up, fetch a model, open a conversation
# make test   the tests (fetches a 97 MB model once)
# Each works from a fresh clone: it makes .venv and installs what constraints.txt pins.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
# The constraint file comes first on every install line: it is what keeps torch the pinned build.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# What the native CPU runner is compiled from, at installation.
NATIVE := hatch_build.py $(wildcard src/ayllu/kernels/native/*.cpp src/ayllu/kernels/native/*.h)
# PostgreSQL and strace, for some tests of the server: installed where this can be done, else those are skipped.
TOOLS := if [ -x "$$(command -v apt-get)" ] && [ "$$(id -u)" = 0 ]; then sh scripts/install_postgres.sh >/dev/null; fi
MODEL ?=
TESTS ?= tests

.PHONY: help run test test-large check format bench docs dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: ayllu needs Python 3.11 or newer. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run-ready: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "Installing ayllu and compiling its CPU runner (about two minutes the first time)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/test-ready: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "Installing ayllu, torch and the development tools, and compiling the CPU runner"
	@$(INSTALL) --editable '.[torch,postgres,oidc,otel,dev]'
	@touch $@ $(VENV)/run-ready

run: $(VENV)/run-ready ## talk to a model; MODEL=name takes another one
	@$(BIN)/ayllu chat --pull $(MODEL)

test: $(VENV)/test-ready ## run the tests
	@$(TOOLS)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(TESTS)

test-large: $(VENV)/test-ready ## run the tests that need the larger models (fetches 1.6 GB)
	@$(BIN)/python -m pytest -m large $(TESTS)

check: $(VENV)/test-ready ## lint, formatting, types, import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/test-ready ## rewrite the code in the house's format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/test-ready ## measure speed and start; results go to benchmarks/results/
	@$(BIN)/ayllu bench smollm2-135m-instruct --pull --concurrency 8
	@$(BIN)/python benchmarks/start.py

docs: $(VENV)/test-ready ## rewrite docs/cli.md from the commands' own help
	@$(BIN)/python docs/cli_reference.py

dist: $(VENV)/test-ready ## build the wheel
	@$(INSTALL) build
	@$(BIN)/python -m build --wheel

clean: ## remove the environment and caches (models stay)
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
