# make serve   install, start a router, a prefill and a decode worker here, print the URL
# make test    install, run the tests
# make fuzz    10,000 mutated requests (FUZZ=n) against a real split server
# make faults  10,000 seeded faults (FAULTS=n SEED=n) under traffic on real processes
# make faults-serve  random kills (KILLS=n SEED=n) on a whole Ray Serve cluster under traffic
# make soak    hours (SOAK=2h) of mixed traffic on real processes; nothing may fail or grow
# make check   format, lint, types, imports
# make bench   drive load at a running server
#
# Without MODEL=folder-or-hub-id, a small random model is served. PORT=9000 serves elsewhere,
# ARGS='--decode 2' passes more flags on, PYTHON=python3.12 installs with another interpreter.

SHELL := bash
PYTHON ?= python3
PORT ?= 8000
MODEL ?=
ARGS ?=
VENV ?= .venv
RATE ?= 2
DURATION ?= 20
FUZZ ?= 10000
SOAK ?= 2h
FAULTS ?= 10000
SEED ?= 1
KILLS ?= 20
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test fuzz faults faults-serve soak check format bench proto venv venv-dev clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

serve: $(VENV)/.installed
	@exec $(BIN)/baton serve $(or $(MODEL),--demo) --config cluster_configs/local.yaml \
	  --port $(PORT) --end-with-parent $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(TESTS)

fuzz: $(VENV)/.installed-dev
	@BATON_FUZZ_REQUESTS=$(FUZZ) $(BIN)/python -m pytest tests/faults/test_fuzz_requests.py

faults: $(VENV)/.installed-dev
	@mkdir -p build
	@exec $(BIN)/python -m tests.faults.campaign --runs $(FAULTS) --seed $(SEED) \
	  --json build/faults.json --markdown build/faults.md $(ARGS)

faults-serve: $(VENV)/.installed-dev
	@exec $(BIN)/python -m tests.faults.serve_campaign --runs $(KILLS) --seed $(SEED) $(ARGS)

soak: $(VENV)/.installed-dev
	@exec $(BIN)/python -m tests.soak --duration $(SOAK) $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	@$(BIN)/baton bench load --url http://127.0.0.1:$(PORT) --rate $(RATE) --duration $(DURATION) $(ARGS)

# -Irpc/pb=proto: the files land in rpc/pb and import each other from there.
proto: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Irpc/pb=proto \
	  --python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. rpc/pb/worker.proto

venv: $(VENV)/.installed
venv-dev: $(VENV)/.installed-dev

# A stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Baton needs Python 3.11 or newer; $(PYTHON) gives: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments (on Debian: apt-get install python3-venv)." >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "Installing Baton into $(VENV) (the first time takes a few minutes) ..."
	@$(PIP) install -q -c constraints.txt torch
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need ..."
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
