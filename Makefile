# Everything runs in .venv, made from $(PYTHON); `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install
# Slicer's stable release: the wheel and the VTK that it is built with. The preview is pinned in constraints.txt.
SLICER_STABLE := slicer-core==5.12.4.0 vtk==9.6.0

TRAINING_TESTS := $(wildcard Testing/core/test_train*.py) $(patsubst %,Testing/core/test_%.py,augment cache check data \
  data_commands datasets exchange loop loss optimiser parallel phantom plan start synthesis)

# Relative, as pip splits this value at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: help demo test test-core test-training test-nodes test-nodes-stable test-gui test-gui-stable train benchmark format lint types check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 20

demo: .venv/installed ## segment a made-up volume, or INPUT=file, and draw it, into build/demo
	$(BIN)/m4oe demo -o build/demo $(if $(INPUT),--input "$(INPUT)")

# Two kinds at a time with threads of OpenMP each would spend most of two cores on waiting for each other.
test: export OMP_NUM_THREADS = 1
test: .venv/installed-test .slicer-stable/installed ## run all tests, two kinds at a time
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-core test-training test-nodes test-nodes-stable test-gui test-gui-stable
	@PATH="$$PATH:/usr/sbin" command -v sshd > /dev/null || \
	  echo 'Skipped: the tests of workers behind ssh, as openssh-server is not installed.'

test-core: .venv/installed-test ## test the package, but for training
	$(BIN)/python -m pytest Testing/core $(addprefix --ignore=,$(TRAINING_TESTS))

test-training: .venv/installed-test ## test training and its data
	$(BIN)/python -m pytest $(TRAINING_TESTS)

test-nodes: .venv/installed-test ## test the node code on Slicer's preview release
	$(BIN)/python -m pytest Testing/nodes

test-nodes-stable: .venv/installed-test .slicer-stable/installed ## test the node code on Slicer's stable release
	PYTHONPATH=.slicer-stable $(BIN)/python -m pytest Testing/nodes

test-gui: .venv/installed-test ## drive the panels on Slicer's preview release
	$(BIN)/python -m pytest Testing/gui

test-gui-stable: .venv/installed-test .slicer-stable/installed ## drive the panels on Slicer's stable release
	PYTHONPATH=.slicer-stable $(BIN)/python -m pytest Testing/gui

train: .venv/installed ## train a model on made-up volumes, into build/train
	$(BIN)/m4oe train --phantoms -o build/train

benchmark: .venv/installed ## measure speed and memory
	$(BIN)/python Testing/benchmarks/inference.py
	$(BIN)/python Testing/benchmarks/memory.py
	$(BIN)/python Testing/benchmarks/loading.py
	$(BIN)/python Testing/benchmarks/training.py

format: .venv/installed-test ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

lint: .venv/installed-test ## look for faults and for code that is not formatted
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/installed-test ## check the type annotations
	$(BIN)/mypy

check: lint types ## lint and types: what to run before a commit

clean: ## remove all that make has made
	rm -rf .venv .slicer-stable build .mypy_cache .pytest_cache .ruff_cache .hypothesis Core/m4oe.egg-info

# The file pip.conf holds the constraints for a pip that somebody starts by hand; it is written last, so it tells
# that the environment is whole.
.venv/pip.conf:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'M4oE needs Python 3.11 or later. Name one: make PYTHON=/path/to/python3.12'; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv'; \
	  echo 'Or name a Python that can: make PYTHON=/path/to/python3.12'; exit 1; } >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -c 'from pathlib import Path; print("[install]\nconstraint =", Path("constraints.txt").absolute().as_uri())' > $@

.venv/installed: pyproject.toml constraints.txt | .venv/pip.conf
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP_INSTALL) --quiet --editable '.[test]'
	$(PIP_INSTALL) --quiet --no-deps timm
	@touch $@

# Laid over the preview by PYTHONPATH, and the one install without constraints.
.slicer-stable/installed: Makefile | .venv/pip.conf
	rm -rf .slicer-stable
	PIP_CONSTRAINT=/dev/null $(PIP_INSTALL) --quiet --no-deps --target .slicer-stable $(SLICER_STABLE)
	@touch $@
