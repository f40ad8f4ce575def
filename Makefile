# make demo: watch an agent improve, from a fresh clone.   make test: every check.   make clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

demo: .venv/demo.stamp
	$(BIN)/selfwright run recipes/quickstart.yaml --output runs/quickstart

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# First and by itself, so that a CPU build is kept where one was found and nothing pulls in another.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable .
	touch $@

# Checkers cannot see through an editable install; the link shows them the package.
.venv/test.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev]'
	mkdir -p .venv/types
	ln -sfn ../.. .venv/types/selfwright
	touch $@ .venv/demo.stamp
