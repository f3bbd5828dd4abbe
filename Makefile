# Needs Python >= 3.11 with venv, and a package registry; everything else is installed into .venv once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types layers docs clean

demo: .venv/installed
	$(BIN)/vrm demo

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

layers: .venv/installed
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/performance.py
	$(BIN)/python docs/relations.py
	$(BIN)/python docs/figures/demo.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
