# Every target works in a fresh clone with Python 3.11 or newer, make and gcc, and nothing else.
# The first one to run makes .venv; the next ones find it ready and start at once.

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; \
	done)
VENV ?= .venv
TEST_PROCESSES ?= 2
DEMO_OUT ?= demo_output
BENCH_OPTIONS ?=

INSTALLED_PYTHON := $(VENV)/bin/python
INSTALL := $(INSTALLED_PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types layers readme check bench soak fuzz clean

help:  ## say what each target does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "  PYTHON=python3.12 make test   picks the interpreter that makes $(VENV)"

# torch is installed first and alone, at the pinned version: with it in place no later package
# makes pip look for another build of it.
$(VENV)/.torch-ready: constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: name one with PYTHON=/path/to/python make ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) -e '.[pack,report]'
	@touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.demo-ready

demo: $(VENV)/.demo-ready  ## make a small cohort, pack it, train natural and balanced, resume, audit
	$(VENV)/bin/streaming-balance demo --out $(DEMO_OUT)

test: $(VENV)/.test-ready  ## run every test and doctest that takes less than minutes, with coverage
	$(INSTALLED_PYTHON) -m pytest -n $(TEST_PROCESSES) -m "not slow" --cov --cov-branch --cov-report=
	$(INSTALLED_PYTHON) -m coverage report

lint: $(VENV)/.test-ready  ## check formatting and style, change nothing
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: $(VENV)/.test-ready  ## rewrite files in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

types: $(VENV)/.test-ready  ## mypy --strict over package, tests and tools
	$(VENV)/bin/mypy --strict

layers: $(VENV)/.test-ready  ## imports only point down, and the core stays pure
	$(INSTALLED_PYTHON) -m pytest -q tests/contracts/test_layers.py

readme: $(VENV)/.test-ready  ## run every block of README and docs
	$(INSTALLED_PYTHON) -m pytest -q tests/contracts/test_documents.py

check: test lint types layers readme  ## all that must hold before a change is merged

bench: $(VENV)/.test-ready  ## measure loading against other ways to do it (BENCH_OPTIONS='--help')
	$(INSTALLED_PYTHON) tools/benchmark_loading.py $(BENCH_OPTIONS)

soak: $(VENV)/.test-ready  ## the exhaustive tests: hours rather than minutes
	$(INSTALLED_PYTHON) -m pytest -n $(TEST_PROCESSES) -m slow --timeout=0

fuzz: $(VENV)/.test-ready  ## property tests of everything that reads untrusted bytes, with 1000 x the examples
	$(INSTALLED_PYTHON) -m pytest -n $(TEST_PROCESSES) --hypothesis-profile=fuzz --timeout=0 \
		tests/storage tests/ingest tests/stream tests/test_config.py

clean:  ## remove what make made, .venv included
	rm -rf .venv demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
