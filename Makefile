# From a fresh clone, with Python 3.11 to 3.14 and make alone: `make pretrain` trains, `make test` tests; see `make help`.

PYTHONS := python3.11 python3.12 python3.13 python3.14 python3 python
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for each in $(PYTHONS); do $$each -c '$(USABLE)' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
ARGS ?=

.PHONY: help setup pretrain test lint format docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: .venv/done  ## make .venv with the exact versions of constraints.txt

.venv/done: pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c '$(USABLE)' 2>/dev/null || { \
		echo "error: $(or $(PYTHON),there) is no Python of 3.11 to 3.14 with venv: make PYTHON=path/to/one" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[pretrain,finetune,sweep,cpu,pictures,slides,dicom,export,docs,dev]'
	touch $@

pretrain: setup  ## pretrain a small Vim on built-in photographs: make pretrain ARGS='--steps 50'
	$(BIN)/python -m launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		pretrain/main.py --overwrite $(ARGS)

test: setup  ## all tests that CI runs
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

lint: setup  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup  ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## the documentation as a site, in build/site; make docs ARGS=serve shows it while it is written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

clean:  ## delete the environment and caches, never a run
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build
