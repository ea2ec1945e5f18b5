# make demo: set up, then erase an object and a style from the embedded base, and measure both.
# make test: set up, then check and test everything. Nothing but Python 3.11 and git is needed.

PYTHON ?= python3
# torch is pinned to what the numbers in the README were measured with; the package itself needs 2.6 or newer
BIN := .venv/bin

.PHONY: all setup demo test check style

all: test

setup: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; try make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --group dev --editable .
	touch $@

demo: setup
	$(BIN)/python examples/demo.py --out runs/demo

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

style: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
