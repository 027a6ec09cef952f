# Two commands matter: `make demo` and `make test`. Both build .venv once and reuse it until
# pyproject.toml or constraints.txt change.
#
# On Linux PyPI's torch brings several gigabytes of CUDA packages. The index below also offers 2.13.0+cpu, which
# sorts above PyPI's 2.13.0, so the small build wins; where the index cannot be reached pip warns and goes on without it.
# For a GPU build, from an empty .venv (make clean):
#   make demo TORCH_INDEX=                                            what PyPI has
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cuXXX      another CUDA version, see pytorch.org
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTHON ?= python3

BIN := .venv/bin
PIP = $(BIN)/python -m pip install -q --no-input --disable-pip-version-check -c constraints.txt

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: help demo test clean

help:
	@echo 'make demo    train a small spiking network down to one timestep, measure it, write a report (runs/demo)'
	@echo 'make test    lint, types, layers and tests'
	@echo 'make clean   remove .venv, caches and build leftovers; runs/ stays'

demo: .venv/.core
	$(BIN)/unitstep train fashion-mini --out runs/demo
	$(BIN)/unitstep measure runs/demo
	$(BIN)/unitstep report runs/demo --out runs/demo/report.html

test: export OMP_NUM_THREADS = 1
test: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# --no-deps: only torch itself is looked up on the extra index. Few retries: an unreachable index costs seconds.
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --no-deps --retries 1 --timeout 10 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/.core: .venv/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

# spikingjelly and norse declare torchvision; what they need of the rest is in the test extra.
.venv/.test: .venv/.core
	$(PIP) -e '.[test]'
	$(PIP) --no-deps spikingjelly norse
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find . -name .git -prune -o -type d \( -name __pycache__ -o -name .mypy_cache \) -prune -exec rm -rf {} +
