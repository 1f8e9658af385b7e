# umbra.mail: everything is run from here; `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help venv lock

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## Make .venv from the locked requirements (PYTHON=python3.12 chooses another Python)
	@tests/tools/venv $(PYTHON)

lock: venv ## Lock requirements.in into requirements.txt again
	@python -m venv --clear build/lock && build/lock/bin/pip install --quiet uv
	@build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	    --upgrade requirements.in --output-file requirements.txt
