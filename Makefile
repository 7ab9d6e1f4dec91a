# Every target works on a fresh checkout: it first makes `.venv` with what it needs, and skips that when nothing changed.
# Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install
TORCH := $(shell grep '^torch==' constraints.txt)
CODE := $(wildcard vislora train_scripts benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench samples clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/run.stamp  ## train a style, stack it with another, convert it: offline, into demo/
	$(BIN)/python train_scripts/demo.py

# One thread per worker: workers that each take all cores are slower than one process alone.
test: $(VENV)/dev.stamp  ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

test-slow: $(VENV)/dev.stamp  ## all other tests: the rest of the variants, whole trainings (before a release)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 8

check: $(VENV)/dev.stamp  ## style, types, direction of imports
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(CODE)
	@$(BIN)/lint-imports

bench: $(VENV)/dev.stamp  ## side-by-side measurements against peers
	@if [ -f benchmarks/run.py ]; then $(BIN)/python benchmarks/run.py; else \
	for file in benchmarks/[a-z]*.py; do \
	[ -f "$$file" ] || { echo "there are no benchmarks yet"; exit 1; }; \
	echo "== $$file"; $(BIN)/python "$$file" || exit 1; done; fi

samples: $(VENV)/samples.stamp  ## make the sample images again (needs npm)
	$(BIN)/python train_scripts/make_samples.py --out samples

clean:  ## remove what demo, tests and builds leave; keep .venv, runs/ and outputs/
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find $(CODE) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, in the version that constraints.txt pins, so that nothing else chooses its build.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "vislora needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	echo "name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@[ -x $(BIN)/python ] || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) $(TORCH)
	@echo "installing vislora and what it needs into $(VENV)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "installing the tools for tests and checks into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[test,dev]'
	@touch $@

$(VENV)/samples.stamp: $(VENV)/run.stamp
	@echo "installing the tool that draws the samples into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[samples]'
	@touch $@
