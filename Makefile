# One script for people and for CI. `make help` lists the targets; ARGS="-k name" goes to pytest.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -qq --prefer-binary --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install run test test-all check sanitize emulate format docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

install: $(VENV)/.test  ## the venv with everything that tests and checks need

run: $(VENV)/.run  ## serve the bundled model; prints its URL and a curl line
	@$(BIN)/penstock serve

test: $(VENV)/.test  ## every test but the slow ones
	$(PYTEST) -n 2 $(ARGS)

test-all: $(VENV)/.test  ## every test, with more examples of each property
	$(PYTEST) -n 2 --all --timeout=1200 $(ARGS)

check: $(VENV)/.test  ## lint, format, types, house rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -q tests/null/test_house.py

sanitize: $(VENV)/.test  ## the kernels' tests under AddressSanitizer, UBSan and valgrind
	VENV=$(VENV) tests/native/sanitize $(ARGS)

emulate: $(VENV)/.test  ## the kernels of other processors: AVX-512 through SIMDe, NEON under qemu
	VENV=$(VENV) tests/native/emulate $(ARGS)

format: $(VENV)/.test  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.test  ## rewrite the pages that are made from the code
	$(BIN)/python tests/null/pages.py

clean:  ## remove the venv and every cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is remade when the dependencies or the native sources change. `run` installs only what serving needs.
$(VENV)/.run $(VENV)/.test: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Penstock needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python cannot make a venv: sudo apt install python3-venv (or use another PYTHON=...)" >&2; exit 1; }
	@echo "installing into $(VENV) and building the native kernels: two or three minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) scikit-build-core nanobind cmake ninja
	@$(PIP) --no-build-isolation -e '.$(if $(filter %.test,$@),[test])'
	@touch $@
