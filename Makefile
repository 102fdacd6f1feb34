# Two commands matter: `make demo` and `make test`. Both need python3.11, pip, make and gcc, and install all else
# into .venv by themselves. Stamps in .venv remember what is there; a change of pyproject.toml makes them stale.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base-ready
ENGINE := $(VENV)/.engine-ready
DEV := $(VENV)/.dev-ready
ENGINE_LOG := $(VENV)/engine.log
TORCH := 2.13.0
ARGS ?=
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

say = @printf '\033[1m==> %s\033[0m\n' "$(1)" >&2

.PHONY: help demo test test-long lint format types docs generate bench check clean engine redis-server

help: ## Print these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Torch installs in the background while the demo shows what needs no model; it waits for the stamp before the rest.
demo: $(BASE) redis-server ## Show it all on this machine, within minutes (ARGS=--json for one JSON object)
	@if ! $(MAKE) -q $(ENGINE); then \
		rm -f $(ENGINE) $(ENGINE).failed; \
		set -m; { $(MAKE) $(ENGINE) || echo $(CURDIR)/$(ENGINE_LOG) >$(ENGINE).failed; } >$(ENGINE_LOG) 2>&1 </dev/null & \
		set +m; trap "kill -- -$$! 2>/dev/null || true" EXIT; \
	fi; \
	$(BIN)/thermocline demo --engine-ready $(ENGINE) $(ARGS)

test: $(DEV) redis-server ## Every promise in its short form (ARGS="-k disk" for some)
	@$(BIN)/python -m pytest -m "not faults_long" $(ARGS)

test-long: $(DEV) redis-server ## The long fault matrix too; takes a while
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## ruff: every rule but the reasoned exceptions, and the format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV) ## Let ruff mend what it can
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

types: $(DEV) ## mypy --strict on src
	@$(BIN)/mypy

docs: $(DEV) ## Build the documentation into site/, warnings as errors
	@$(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "docs: site/index.html"

generate: $(DEV) ## Write docs/reference again from the declarations
	@$(BIN)/python docs/generate.py

bench: $(ENGINE) ## Measure one budget: NAME=ttft (ARGS="--json --save"); without NAME, list them
	@$(BIN)/thermocline bench $(or $(NAME),list) $(ARGS)

check: test lint types docs ## All that .ci/run asks

clean: ## Remove everything that make made
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

engine: $(ENGINE)

# The Redis tier is tested against a real server. Where there is none and it cannot be had, those tests are skipped.
redis-server:
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || { \
		echo "no redis-server here" >&2; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
				redis-server; } >&2 </dev/null || true; \
		fi; \
		command -v redis-server >/dev/null || \
			echo "going on without it: tests of the Redis tier are skipped; hint: install the package redis-server" >&2; }

# Debian's python3 may lack ensurepip; pip can fill a venv from outside, and python3-venv is the last resort.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; hint: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(call say,making $(VENV) with $(PYTHON))
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip -q --python $(BIN)/python install pip; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		rm -rf $(VENV); apt-get update -q && apt-get install -q -y python3-venv && $(PYTHON) -m venv $(VENV); \
	else echo "error: $(PYTHON) cannot make a venv; hint: install the package python3-venv" >&2; exit 1; fi

$(BASE): pyproject.toml | $(BIN)/python
	$(call say,installing the base packages)
	@$(BIN)/python -m pip install -q -e .
	@touch $@

# One installer at a time. Only the CPU build of torch: the default one brings gigabytes of CUDA.
$(ENGINE): pyproject.toml $(BASE)
	$(call say,installing the engine: CPU torch $(TORCH) and transformers)
	@exec 9>$(VENV)/.lock; flock 9; rm -f $@.failed; $(BIN)/python -m pip --version; $(install_torch)
	@exec 9>$(VENV)/.lock; flock 9; $(BIN)/python -m pip install -q -e '.[engine,bench]'
	@touch $@

define install_torch
has_torch() { $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").partition("+")[0] != "$(TORCH)")' 2>/dev/null; }; \
	has_torch || $(BIN)/python -m pip install "torch==$(TORCH)+cpu" || { \
		echo "pip has no CPU build of torch here; asking uv" >&2; \
		$(BIN)/python -m pip install -q uv; \
		SSL_CERT_FILE="$${SSL_CERT_FILE:-$${PIP_CERT:-}}" $(BIN)/uv pip install --python $(BIN)/python \
			--torch-backend cpu "torch==$(TORCH)"; } || { \
		echo "error: found no CPU build of torch $(TORCH)" >&2; \
		echo "hint: give pip an index that has it (PIP_EXTRA_INDEX_URL), then run make again" >&2; exit 1; }
endef

$(DEV): pyproject.toml $(ENGINE)
	$(call say,installing the tools for tests and docs)
	@$(BIN)/python -m pip install -q -e '.[dev,docs]'
	@touch $@
