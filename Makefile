# Two commands do all set-up: `make demo` and `make test`. Both make .venv if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types layers examples check clean

demo: $(VENV)/.demo
	$(BIN)/fisherprint demo -o runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

examples: $(VENV)/.dev
	@printf '%s\n' examples/*.py | OMP_NUM_THREADS=1 xargs -n 1 -P 2 sh -c \
	    'said=$$($(BIN)/python "$$0" 2>&1); code=$$?; echo "$$0"; echo "$$said"; exit $$code'

check: test lint types layers examples

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
	    echo "fisherprint needs Python 3.11 or later; $(PYTHON) is:" \
	        "$$($(PYTHON) --version 2>&1). Name another: make demo PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fisherprint and its dependencies into $(VENV) (once, a few minutes)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing fisherprint and its dependencies into $(VENV) (once, a few minutes)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	@touch $@

# Results in runs/ stay: they may have taken hours.
clean:
	rm -rf $(VENV)
