# Every target does its own set-up, once: .venv, torch (the CPU build where there is no GPU), the rest.
# PYTHON=/path/to/python3.12 picks the Python that .venv is made with.

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
SETUP := PYTHON="$(PYTHON)" launch/setup.sh
# Whoever is done takes over tests of the other; the slow ones, in e2e/ and numerics/, come first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
SETUP_FILES := pyproject.toml launch/setup.sh launch/constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-exhaustive check lint format gpu wheel clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-16s %s\n", $$1, $$2 }'

quickstart: .venv/.ready ## Write pairs from the Python code on this machine, train on them, score
	$(BIN)/largebatch pairs code
	$(BIN)/largebatch train quickstart

test: .venv/.ready-dev ## Run all tests; where options multiply, all pairs of their values
	$(PYTEST) $(PYTEST_ARGS)

test-exhaustive: .venv/.ready-dev ## ... all combinations of them: run it when the step or parallel/ changes
	$(PYTEST) --exhaustive $(PYTEST_ARGS)

check: lint ## Lint, types and all tests but the slow ones: what to run before each commit
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: .venv/.ready-dev ## Check format, lint, types, spelling and shell scripts
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/codespell
	$(BIN)/shellcheck .ci/run launch/*.sh

format: .venv/.ready-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

gpu: .venv/.ready-dev ## On a machine with a GPU: its tests, the bench, the peers; writes a page of results
	test -d data/code/train || $(BIN)/largebatch pairs code
	$(BIN)/python benchmarks/gpu.py

wheel: .venv/.ready-dev ## Build dist/*.whl
	rm -rf build
	$(BIN)/python -m build --wheel

clean: ## Remove what was built; leaves .venv, data/ and runs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find largebatch conf tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The code and conf/ are installed in editable mode, so only these files ask for a new set-up.
.venv/.ready: $(SETUP_FILES)
	@$(SETUP)

.venv/.ready-dev: $(SETUP_FILES)
	@$(SETUP) dev
