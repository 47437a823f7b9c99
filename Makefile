# All in a virtual environment of its own, .venv:
# make quickstart   a small reasoner from random weights, in minutes
# make test         the suite
# make test-slow    the tests that take minutes
# make lint         style; make format mends it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow lint format clean

quickstart: $(VENV)/.quickstart
	@JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Anew whenever the dependencies change.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# What runs need, without what tests compare with.
$(VENV)/.quickstart: pyproject.toml
	@echo "installing into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable ".[quickstart]"
	@touch $@

clean:
	rm -rf $(VENV) .cache build *.egg-info
