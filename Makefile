# `make train` and `make test` do everything on a machine that has Python 3.10 or newer.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check setup clean

train: .venv/stamp  ## set up, then train the main job
	$(BIN)/holdfast train experiment=main_job $(ARGS)

test: .venv/stamp  ## set up, then run the whole suite; one part of it: make test ARGS=tests/unit
	$(BIN)/python -m pytest $(ARGS)

check: .venv/stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

setup: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt scripts/set_up.py
	@$(PYTHON) scripts/set_up.py

clean:  ## everything that can be made again; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
